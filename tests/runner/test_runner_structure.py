"""Decoders whose hookpoints are in no table: only proven hookpoints are offered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from fix_architectures import small_config
from fix_zoo import N_TOKENS_ZOO, ZOO, random_model, zoo_batch, zoo_config, zoo_model
from headrace_extractor.errors import FieldInvalid, HookpointNotFound, ModelUnsupported
from headrace_extractor.hookpoints.places import BY_MASK, BY_POSITIONS, NOT_AT_ALL
from headrace_extractor.runner.hooks.binding import anatomy_of, bind, check_identity, offered_sites
from headrace_extractor.runner.models.loading import LoadedModel
from headrace_extractor.runner.passes.context import isolation_of
from headrace_extractor.runner.passes.forward import forward_rows

SUBLAYERS = ("hook_attn_out", "hook_mlp_out")
PARALLEL = {"falcon", "falcon-new", "gpt_neox", "gptj", "phi"}


def stranger(name, **changes):
    """A model of the zoo with an unknown type, so that its structure is searched."""
    model = random_model(zoo_config(name, **changes))
    model.config.model_type = "abacus"
    return model


# The output is scaled before it is added, or is added inside a module: no module gives the value that is added.
NOT_FOUND = {"granite"}


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"bert"}))
def test_what_is_found_is_what_the_table_says(name):
    model, known = stranger(name), anatomy_of(zoo_model(name))
    found = anatomy_of(model)
    check_identity(model)

    for layer in range(3):
        for site in ("hook_resid_pre", "hook_resid_post", *(() if name in NOT_FOUND else SUBLAYERS)):
            ours, theirs = (each.points[f"blocks.{layer}.{site}"] for each in (found, known))
            assert ours.unavailable == "", site
            assert same_numbers(model, ours, name, theirs), site


@pytest.mark.parametrize("name", ["gemma2", "glm4", "olmo2"])
def test_a_large_residual_stream_does_not_hide_what_is_added_to_it(name):
    """In bfloat16 1000 + 1 is 1000, and so is 1000 + 2: the output before the norm seems to add up too."""
    model = random_model(zoo_config(name), torch.bfloat16)
    model.config.model_type = "abacus"
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10_000)

    for part in ("attn_out", "mlp_out"):
        found = anatomy_of(model).points[f"blocks.1.hook_{part}"].module
        assert found == anatomy_of(zoo_model(name)).points[f"blocks.1.hook_{part}"].module


def same_numbers(model, ours, name, theirs):
    ids = zoo_batch([[5, 6, 7, 8, 9]])
    one = forward_rows(model, ids, bind(model, [ours.name]))[ours.name]
    other = forward_rows(zoo_model(name), ids, bind(zoo_model(name), [theirs.name]))[theirs.name]
    return torch.equal(one, other)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "opt", "starcoder2"])
def test_the_middle_of_a_serial_block_is_found(name):
    point = anatomy_of(stranger(name)).points["blocks.1.hook_resid_mid"]

    assert point.module == anatomy_of(zoo_model(name)).points["blocks.1.hook_resid_mid"].module


# BLOOM's modules add the residual stream to the output of their projections. In others the config does not tell the
# width of the MLP, or not every block has one.
NO_PROJECTION = {
    ("bloom", "attn.hook_z"),
    *((name, "mlp.hook_post") for name in ("bloom", "gpt2", "gptj", "qwen3_moe")),
}


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"bert"}))
def test_what_enters_the_last_projections_is_found_where_there_is_one(name):
    model, known = stranger(name), anatomy_of(zoo_model(name))
    for site in ("attn.hook_z", "mlp.hook_post"):
        ours, theirs = (each.points[f"blocks.1.{site}"] for each in (anatomy_of(model), known))
        if theirs.unavailable or (name, site) in NO_PROJECTION:
            assert ours.unavailable
        else:
            assert ours.module == theirs.module


@pytest.mark.parametrize("name", sorted(PARALLEL))
def test_a_parallel_block_has_no_middle(name):
    assert "between" in anatomy_of(stranger(name)).points["blocks.1.hook_resid_mid"].unavailable


def test_what_can_not_be_proven_is_refused_site_by_site():
    model = stranger("granite")
    check_identity(model)

    with pytest.raises(HookpointNotFound, match="adds up with the residual stream"):
        bind(model, ["blocks.1.hook_attn_out"])
    with pytest.raises(HookpointNotFound, match="abacus"):
        bind(model, ["blocks.1.attn.hook_q"])
    assert [site.name for site in bind(model, ["blocks.1.hook_resid_post"])] == ["blocks.1.hook_resid_post"]
    assert bind(model, ["layers.1.self_attn:out"])


def test_how_documents_are_kept_apart_is_found_out():
    ways = {name: anatomy_of(stranger(name)).isolation for name in ("llama", "gpt_neo", "opt", "falcon", "bloom")}

    assert ways == {
        "llama": BY_POSITIONS,
        "gpt_neo": BY_POSITIONS,
        "opt": BY_MASK,
        "falcon": BY_MASK,
        "bloom": NOT_AT_ALL,
    }
    model = stranger("bloom")
    with pytest.raises(FieldInvalid, match="one_document"):
        forward_rows(model, zoo_batch([[3, 4, 5], [6, 7]]), bind(model, ["blocks.1.hook_resid_post"]))


def test_sparse_attention_that_picks_the_best_tokens_of_a_sequence_keeps_no_documents_apart():
    model = random_model(small_config("deepseek_v32"))
    anatomy = anatomy_of(model)

    assert (anatomy.isolation, anatomy.causal) == (NOT_AT_ALL, False)
    with pytest.raises(FieldInvalid, match="one_document"):
        forward_rows(model, zoo_batch([[3, 4, 5], [6, 7]]), bind(model, ["blocks.1.hook_resid_post"]))


class TallyConfig(PretrainedConfig):
    model_type = "tally"


class TallyBlock(nn.Module):
    """Mixes tokens by a causal mean: it has no attention, no positions, and no module named MLP."""

    def __init__(self, width):
        super().__init__()
        self.token_mixer = nn.Linear(width, width)
        self.channel_ffn = nn.Linear(width, width)

    def forward(self, hidden_states):
        counts = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        hidden_states = hidden_states + self.token_mixer(hidden_states.cumsum(1) / counts)
        return hidden_states + self.channel_ffn(hidden_states)


class Tally(PreTrainedModel):
    config_class = TallyConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(TallyBlock(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids, use_cache=False):
        hidden_states = self.wte(input_ids)
        for block in self.stack:
            hidden_states = block(hidden_states)
        return hidden_states


def test_a_network_of_another_kind_is_found_by_what_adds_up():
    model = Tally(TallyConfig(hidden_size=16, num_hidden_layers=2, vocab_size=N_TOKENS_ZOO)).eval()
    check_identity(model)
    points = anatomy_of(model).points

    assert points["blocks.1.hook_attn_out"].module == "stack.1.token_mixer:out"
    assert points["blocks.1.hook_mlp_out"].module == "stack.1.channel_ffn:out"
    assert points["blocks.1.hook_resid_mid"].module == "stack.1.channel_ffn:in"
    assert anatomy_of(model).isolation == NOT_AT_ALL


def test_rows_of_a_network_that_takes_no_positions_come_without():
    model = Tally(TallyConfig(hidden_size=16, num_hidden_layers=2, vocab_size=N_TOKENS_ZOO)).eval()
    sites = bind(model, ["blocks.1.hook_resid_post"])
    rows = forward_rows(model, zoo_batch([[3, 4, 5]]), sites)["blocks.1.hook_resid_post"]

    with torch.inference_mode():
        assert torch.equal(rows, model(torch.tensor([[3, 4, 5]]))[0])
    with pytest.raises(FieldInvalid, match="one_document"):
        forward_rows(model, zoo_batch([[3, 4, 5], [6, 7]]), sites)


LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97}
UNMET = {
    "gpt_bigcode": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "codegen": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "exaone4": {**LLAMA, "num_key_value_heads": 2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64},
    "stablelm": {**LLAMA, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("name", UNMET)
def test_architectures_outside_the_table_are_proven_and_isolated(name):
    model = random_model(AutoConfig.for_model(name, **{"vocab_size": N_TOKENS_ZOO, **UNMET[name]}))
    check_identity(model)
    sites = offered_sites(model)
    documents = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
    packed = forward_rows(model, zoo_batch(documents), sites)
    alone = [forward_rows(model, zoo_batch([document]), sites) for document in documents]

    assert {site.name.split(".")[2] for site in sites} >= {"hook_resid_post", "hook_attn_out", "hook_mlp_out"}
    for site, rows in packed.items():
        torch.testing.assert_close(rows, torch.cat([each[site] for each in alone]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pad_token_id", [0, 1, 4])
def test_a_model_that_numbers_positions_from_another_number_does_so_itself(pad_token_id):
    """RoBERTa's positions begin behind the row of its padding token."""
    config = AutoConfig.for_model("roberta", **LLAMA, max_position_embeddings=64, pad_token_id=pad_token_id)
    model = random_model(config)
    sites = bind(model, ["blocks.1.hook_resid_post"])
    ids = [5, 60, 7, 8, 9]
    with torch.inference_mode():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states

    assert torch.equal(forward_rows(model, zoo_batch([ids]), sites)["blocks.1.hook_resid_post"], states[2][0])
    with pytest.raises(FieldInvalid, match="one_document"):
        forward_rows(model, zoo_batch([ids, ids]), sites)
    assert loaded(model).n_positions == 64 - pad_token_id - 1


def loaded(model):
    return LoadedModel(model=model, device=model.device, files_path=Path(), measured_bytes=0, files=())


def test_a_window_is_not_given_up_for_isolation():
    config = AutoConfig.for_model(
        "gpt_oss",
        **LLAMA,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        sliding_window=16,
    )
    model = random_model(config)

    # A mask would replace the window, which shows in longer sequences.
    assert isolation_of(model, 12).holds
    assert isolation_of(model, 64).holds == (anatomy_of(model).isolation == BY_POSITIONS)


def test_a_model_without_a_list_of_blocks_is_refused():
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=2, vocab_size=97, state_size=4)
    model = random_model(config, attention="eager")
    model.layers = nn.Sequential(*model.layers)

    with pytest.raises(ModelUnsupported, match="no list of 2 blocks"):
        offered_sites(model)
