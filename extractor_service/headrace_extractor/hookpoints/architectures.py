"""The families of models with known hookpoints, fitted to a config.

`hook_attn_out` and `hook_mlp_out` are the terms added to the residual stream. In families that normalise or scale the
output of attention or MLP first, their place is therefore after that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from headrace_extractor.hookpoints.places import (
    BY_BLOCK_MASK,
    BY_MASK,
    BY_POSITIONS,
    EMBED,
    FINAL,
    NOT_AT_ALL,
    SITES,
    Copied,
    Cut,
    Family,
    Scaled,
    Take,
)
from headrace_models.config import Network

PARALLEL = "attention and MLP of its blocks read the same residual stream, so there is nothing between them"
POST_NORM = "its blocks normalise the residual stream itself, so what is added to it is not what leaves a sublayer"

_RESIDUAL = {"hook_resid_pre": ":in", "hook_resid_post": ":out"}
_LLAMA_BLOCK = _RESIDUAL | {
    "attn.hook_q": "self_attn.q_proj:out",
    "attn.hook_k": "self_attn.k_proj:out",
    "attn.hook_v": "self_attn.v_proj:out",
    "attn.hook_z": "self_attn.o_proj:in",
    "hook_attn_out": "self_attn:out",
    "hook_resid_mid": "post_attention_layernorm:in",
    "mlp.hook_pre": "mlp.gate_proj:out",
    "mlp.hook_post": "mlp.down_proj:in",
    "hook_mlp_out": "mlp:out",
}
_GPT2_BLOCK = _RESIDUAL | {
    "attn.hook_q": "attn.c_attn:out",
    "attn.hook_k": "attn.c_attn:out",
    "attn.hook_v": "attn.c_attn:out",
    "attn.hook_z": "attn.c_proj:in",
    "hook_attn_out": "attn:out",
    "hook_resid_mid": "ln_2:in",
    "mlp.hook_pre": "mlp.c_fc:out",
    "mlp.hook_post": "mlp.c_proj:in",
    "hook_mlp_out": "mlp:out",
}
_GPT_NEO_BLOCK = _GPT2_BLOCK | {
    "attn.hook_q": "attn.attention.q_proj:out",
    "attn.hook_k": "attn.attention.k_proj:out",
    "attn.hook_v": "attn.attention.v_proj:out",
    "attn.hook_z": "attn.attention.out_proj:in",
}
_GPTJ_BLOCK = _GPT2_BLOCK | {
    "attn.hook_q": "attn.q_proj:out",
    "attn.hook_k": "attn.k_proj:out",
    "attn.hook_v": "attn.v_proj:out",
    "attn.hook_z": "attn.out_proj:in",
    "mlp.hook_pre": "mlp.fc_in:out",
    "mlp.hook_post": "mlp.fc_out:in",
}
_FUSED_BLOCK = _RESIDUAL | {  # BLOOM, Falcon and, with another name for its attention, GPT-NeoX.
    "attn.hook_q": "self_attention.query_key_value:out",
    "attn.hook_k": "self_attention.query_key_value:out",
    "attn.hook_v": "self_attention.query_key_value:out",
    "attn.hook_z": "self_attention.dense:in",
    "hook_attn_out": "self_attention:out",
    "hook_resid_mid": "post_attention_layernorm:in",
    "mlp.hook_pre": "mlp.dense_h_to_4h:out",
    "mlp.hook_post": "mlp.dense_4h_to_h:in",
    "hook_mlp_out": "mlp:out",
}
_OPT_BLOCK = _LLAMA_BLOCK | {
    "attn.hook_z": "self_attn.out_proj:in",
    "hook_resid_mid": "final_layer_norm:in",
    "mlp.hook_pre": "fc1:out",
    "mlp.hook_post": "fc2:in",
    "hook_mlp_out": "fc2:out",
}
_GEMMA2_BLOCK = _LLAMA_BLOCK | {
    "hook_attn_out": "post_attention_layernorm:out",
    "hook_resid_mid": "pre_feedforward_layernorm:in",
    "hook_mlp_out": "post_feedforward_layernorm:out",
}
_OLMO2_BLOCK = _GEMMA2_BLOCK | {"hook_resid_mid": "mlp:in"}
_PLAIN_MLP = {"mlp.hook_pre": "mlp.c_fc:out", "mlp.hook_post": "mlp.c_proj:in"}
_GATE_UP = {"mlp.hook_pre": "mlp.gate_up_proj:out"}
_FIRST_HALF = {"mlp.hook_pre": Cut(slots=2, first=0, last=1)}
_PHI3_BLOCK = _LLAMA_BLOCK | dict.fromkeys(("attn.hook_q", "attn.hook_k", "attn.hook_v"), "self_attn.qkv_proj:out")
_GLM4_BLOCK = (
    _LLAMA_BLOCK
    | _GATE_UP
    | {
        "hook_attn_out": "post_self_attn_layernorm:out",
        "hook_mlp_out": "post_mlp_layernorm:out",
    }
)
_PHI_BLOCK = _LLAMA_BLOCK | {
    "attn.hook_z": "self_attn.dense:in",
    "mlp.hook_pre": "mlp.fc1:out",
    "mlp.hook_post": "mlp.fc2:in",
}
_LLAMA = Family(block=_LLAMA_BLOCK)
_GEMMA2 = Family(block=_GEMMA2_BLOCK)
_GPT2 = Family(blocks="h", embed="wte:out", final="ln_f", block=_GPT2_BLOCK)


def family_of(network: Network) -> Family | None:
    """Returns the family of a network, fitted to its config; None for an unknown architecture."""
    make = _FAMILIES.get(network.model_type)
    if make is None:
        return None
    family = make(network)
    if not network.looks_ahead:
        return family
    # From here on: a decoder that its config makes an encoder.
    isolation = family.isolation
    if network.model_type in _MASKS_STAY_CAUSAL and not network.masks_both_ways:
        return replace(family, causal=False, isolation=NOT_AT_ALL)
    # transformers makes the masks of encoders without regard to positions, and our mask would replace a window's.
    if network.masks_both_ways and isolation == BY_POSITIONS:
        isolation = NOT_AT_ALL if network.has_window else BY_MASK
    return replace(family, causal=False, isolation=isolation)


# In these model types attention looks both ways only in a pass that needs no mask.
_MASKS_STAY_CAUSAL = frozenset({"gemma", "gemma2"})


def _plain(family: Family) -> Callable[[Network], Family]:
    return lambda _network: family


def _gpt2(network: Network) -> Family:
    return replace(_GPT2, takes=_joined(network))


def _gptj(_network: Network) -> Family:
    return _without(replace(_GPT2, block=_GPTJ_BLOCK, attention="eager"), PARALLEL, "hook_resid_mid")


def _gpt_neox(network: Network) -> Family:
    block = {site: place.replace("self_attention", "attention") for site, place in _FUSED_BLOCK.items()}
    family = Family(embed="embed_in:out", final="final_layer_norm", block=block, takes=_interleaved(network))
    parallel = network.fields.get("use_parallel_residual", True)
    return _without(family, PARALLEL, "hook_resid_mid") if parallel else family


def _opt(network: Network) -> Family:
    family = Family(
        blocks="decoder.layers",
        embed="decoder.embed_tokens:out",
        final="decoder.final_layer_norm",
        block=_OPT_BLOCK,
        isolation=BY_MASK,
    )
    if network.fields.get("do_layer_norm_before") is False:
        family = replace(family, block=_RESIDUAL)
        return _without(family, POST_NORM, *(site for site in SITES if site not in _RESIDUAL), EMBED, FINAL)
    if network.fields.get("_remove_final_layer_norm"):
        family = _without(family, "it has no norm behind its last block", FINAL)
    if network.fields.get("word_embed_proj_dim", network.d_model) != network.d_model:
        family = _without(family, "its embeddings are narrower than its residual stream", EMBED)
    return family


def _bloom(network: Network) -> Family:
    # Its attention and MLP add the residual stream themselves; the terms added are the outputs of their last
    # projections.
    block = _FUSED_BLOCK | {"hook_attn_out": "self_attention.dense:out", "hook_mlp_out": "mlp.dense_4h_to_h:out"}
    family = Family(
        blocks="h",
        embed="word_embeddings_layernorm:out",
        final="ln_f",
        block=block,
        takes=_interleaved(network),
        attention="eager",
        isolation=BY_BLOCK_MASK,
    )
    if network.fields.get("apply_residual_connection_post_layernorm"):
        return _without(family, POST_NORM, "hook_attn_out", "hook_resid_mid", "hook_mlp_out")
    if network.fields.get("slow_but_exact") and network.fields.get("pretraining_tp", 1) > 1:
        sliced = ("attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out")
        return _without(family, "slow_but_exact computes it in slices", *sliced)
    return family


def _falcon(network: Network) -> Family:
    fields = network.fields
    family = Family(blocks="h", embed="word_embeddings:out", final="ln_f", block=_FUSED_BLOCK, isolation=BY_MASK)
    if fields.get("new_decoder_architecture"):
        takes = _grouped(network.n_kv_heads, network.n_heads // max(network.n_kv_heads, 1))
    elif fields.get("multi_query", True):
        takes = _grouped(1, network.n_heads)
    else:
        takes = _interleaved(network)
    if fields.get("alibi"):
        family = replace(family, isolation=NOT_AT_ALL)
    if fields.get("new_decoder_architecture") or fields.get("parallel_attn", True):
        family = _without(family, PARALLEL, "hook_resid_mid")
        takes = takes | {"hook_mlp_out": Copied()}  # The block adds the attention's output to this tensor in place.
    return replace(family, takes=takes)


def _phi(_network: Network) -> Family:
    return _without(Family(block=_PHI_BLOCK, final="final_layernorm"), PARALLEL, "hook_resid_mid")


def _phi3(network: Network) -> Family:
    return replace(_LLAMA, block=_PHI3_BLOCK | _GATE_UP, takes=_joined(network) | _FIRST_HALF)


def _gemma3_multimodal(_network: Network) -> Family:
    root = "language_model"
    return replace(_GEMMA2, blocks=f"{root}.layers", embed=f"{root}.embed_tokens:out", final=f"{root}.norm")


def _olmo(network: Network) -> Family:
    if network.fields.get("clip_qkv") is None:
        return _LLAMA
    return replace(_LLAMA, takes={site: Copied() for site in ("attn.hook_q", "attn.hook_k", "attn.hook_v")})


def _granite(network: Network) -> Family:
    added = Scaled(factor=float(network.fields.get("residual_multiplier", 1.0)))
    return replace(_LLAMA, takes={"hook_attn_out": added, "hook_mlp_out": added})


def _bert(_network: Network) -> Family:
    family = Family(blocks="encoder.layer", embed="", final="", block=_RESIDUAL, isolation=BY_MASK, causal=False)
    return _without(family, POST_NORM, *(site for site in SITES if site not in _RESIDUAL), EMBED, FINAL)


_FAMILIES: Mapping[str, Callable[[Network], Family]] = {
    **dict.fromkeys(
        (
            *("gemma", "helium", "llama", "ministral", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3"),
            *("qwen3_moe", "seed_oss", "smollm3"),
        ),
        _plain(_LLAMA),
    ),
    "arcee": _plain(replace(_LLAMA, block=_LLAMA_BLOCK | {"mlp.hook_pre": "mlp.up_proj:out"})),
    "bert": _bert,
    "bloom": _bloom,
    "falcon": _falcon,
    "gemma2": _plain(replace(_GEMMA2, attention="eager")),  # SDPA leaves out the soft-capping of attention scores.
    "gemma3": _gemma3_multimodal,
    "gemma3_text": _plain(_GEMMA2),
    "glm4": _plain(replace(_LLAMA, block=_GLM4_BLOCK, takes=_FIRST_HALF)),
    "gpt2": _gpt2,
    "gpt_neo": _plain(replace(_GPT2, block=_GPT_NEO_BLOCK, attention="eager")),
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
    "granite": _granite,
    "olmo": _olmo,
    "olmo2": _plain(replace(_LLAMA, block=_OLMO2_BLOCK)),
    "olmo3": _plain(replace(_LLAMA, block=_OLMO2_BLOCK)),
    "opt": _opt,
    "phi": _phi,
    "phi3": _phi3,
    "starcoder2": _plain(replace(_LLAMA, block=_LLAMA_BLOCK | _PLAIN_MLP)),
}


def _joined(network: Network) -> dict[str, Take]:
    """Takes of a fused projection with all queries, then all keys, then all values, each head after head."""
    n_heads, n_kv = network.n_heads, network.n_kv_heads
    slots = n_heads + 2 * n_kv
    return {
        "attn.hook_q": Cut(slots=slots, first=0, last=n_heads),
        "attn.hook_k": Cut(slots=slots, first=n_heads, last=n_heads + n_kv),
        "attn.hook_v": Cut(slots=slots, first=n_heads + n_kv, last=slots),
    }


def _interleaved(network: Network) -> dict[str, Take]:
    """Takes of a fused projection that holds query, key and value of the first head, then of the next."""
    return _grouped(network.n_heads, 1)


def _grouped(n_groups: int, n_queries: int) -> dict[str, Take]:
    """Takes of a fused projection that holds queries, key and value of the first group of heads, then of the next."""
    slots = n_queries + 2
    return {
        "attn.hook_q": Cut(groups=n_groups, slots=slots, first=0, last=n_queries),
        "attn.hook_k": Cut(groups=n_groups, slots=slots, first=n_queries, last=n_queries + 1),
        "attn.hook_v": Cut(groups=n_groups, slots=slots, first=n_queries + 1, last=slots),
    }


def _without(family: Family, why: str, *sites: str) -> Family:
    return replace(family, without={**family.without, **dict.fromkeys(sites, why)})
