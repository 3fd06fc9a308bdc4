"""Every entry of the model catalog can be used: built narrow from its config class, its probe layers are captured."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from fix_seeds import save_tokenizer
from fix_zoo import random_model, zoo_batch
from headrace_extractor.corpora.tokenizer import Tokenizer
from headrace_extractor.hookpoints.catalogue import Catalogue
from headrace_extractor.runner.hooks.binding import bind, check_identity
from headrace_extractor.runner.passes.forward import forward_rows
from headrace_models.config import Network
from headrace_models.unsupported import why_unsupported
from headrace_registry.sizing.catalog import CATALOG

N_LAYERS = 4
DOCUMENTS = [list(range(5, 35)), [7, 8, 9], list(range(40, 52))]
# The settings of a family under the names that its config class has.
_GPT2 = {
    "n_layer": "n_layers",
    "n_embd": "d_model",
    "n_head": "n_heads",
    "n_inner": "d_mlp",
    "n_positions": "context_window",
}
_OTHERS = {
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "d_head",
    "intermediate_size": "d_mlp",
    "max_position_embeddings": "context_window",
}
_OPT = {**_OTHERS, "ffn_dim": "d_mlp", "word_embed_proj_dim": "d_model"}
ENTRIES = pytest.mark.parametrize("entry", CATALOG.entries, ids=lambda entry: entry.name)


def config_of(entry, **changes):
    """Returns the config of an entry's class, with `changes` of the network's numbers."""
    network = entry.network
    numbers = {name: getattr(network, name) for name in network.__slots__} | changes
    kind = network.model_type
    names = {"gpt2": _GPT2, "opt": _OPT}.get(kind, _OTHERS)
    settings = {setting: numbers[name] for setting, name in names.items()}
    settings |= {"vocab_size": numbers["vocab_size"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings["tie_word_embeddings"] = network.tied_embeddings
    if entry.d_embed:  # OPT-350m.
        narrow = entry.d_embed * numbers["d_model"] // network.d_model
        settings |= {"word_embed_proj_dim": narrow, "do_layer_norm_before": False}
    if kind == "gemma3":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14}
        special = {"mm_tokens_per_image": 4, "image_token_index": 96}
        return AutoConfig.for_model(kind, text_config=settings, vision_config=vision, **special)
    return AutoConfig.for_model(kind, **settings)


@functools.cache
def narrow_model(*wanted):
    """Returns a small model of a kind; entries whose numbers stand in the same proportions share one."""
    entry = next(entry for entry in CATALOG.entries if proportions(entry) == wanted)
    _, heads_per_group, wide, _ = wanted
    n_kv_heads = min(2, entry.network.n_kv_heads)
    n_heads, d_head = n_kv_heads * heads_per_group, 8
    d_model = n_heads * d_head // (2 if wide else 1)
    return random_model(
        config_of(
            entry,
            n_layers=N_LAYERS,
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_head=d_head,
            d_mlp=3 * d_model,
            vocab_size=97,
            context_window=64,
        )
    )


def proportions(entry):
    """The kind of an entry, its query heads per group, whether its heads are wider than its stream, its embeddings."""
    network = entry.network
    wide = network.n_heads * network.d_head > network.d_model
    return network.model_type, network.n_heads // network.n_kv_heads, wide, entry.d_embed


@ENTRIES
def test_the_config_of_an_entry_is_not_refused_and_has_its_probe_layers(entry):
    config = config_of(entry).to_dict()
    wanted = [f"blocks.{layer}.hook_resid_post" for layer in entry.probe_layers]
    points = Catalogue(Network.of_config(config)).resolve(wanted)

    assert why_unsupported(config) == ""
    assert [point.name for point in points] == wanted
    assert {point.shape for point in points} == {(entry.network.d_model,)}


@ENTRIES
def test_the_probe_layers_of_an_entry_are_captured_packed_as_alone(entry):
    model = narrow_model(*proportions(entry))
    check_identity(model)
    layers = replace(entry, network=replace(entry.network, n_layers=N_LAYERS)).probe_layers
    sites = bind(
        model, [f"blocks.{layer}.{site}" for layer in layers for site in ("hook_resid_pre", "hook_resid_post")]
    )
    packed = forward_rows(model, zoo_batch(DOCUMENTS), sites)

    assert layers == (1, 2, 3)
    for name, rows in packed.items():
        alone = [forward_rows(model, zoo_batch([document]), sites)[name] for document in DOCUMENTS]
        torch.testing.assert_close(rows, torch.cat(alone), rtol=1e-3, atol=1e-4)
        assert float(rows.abs().max()) > 1e-2
    with torch.inference_mode():
        states = model(torch.tensor([DOCUMENTS[0]]), output_hidden_states=True).hidden_states
    alone = forward_rows(model, zoo_batch(DOCUMENTS[:1]), sites)
    for layer in layers:
        assert torch.equal(alone[f"blocks.{layer}.hook_resid_pre"], states[layer][0])


@pytest.mark.parametrize("kind", sorted({entry.network.model_type for entry in CATALOG.entries}))
def test_the_tokenizer_class_of_an_entry_is_read(kind, tmp_path):
    name = TOKENIZER_MAPPING_NAMES.get(kind) or "LlamaTokenizer"
    tokenizer = save_tokenizer("GPT2Tokenizer" if name == "TokenizersBackend" else name, tmp_path)
    text = "the weather\nin the north, é"

    found = Tokenizer.load(tmp_path).encode_batch([text])[0].tolist()
    assert found == tokenizer(text, add_special_tokens=False).input_ids
    assert math.prod(found) != 0
