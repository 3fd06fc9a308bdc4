"""Documents in one sequence are kept apart, which each loaded model has to show, or are refused together.

The right rows are computed here: one document alone, by transformers, with a plain hook on the block.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig

from fix_zoo import DECODERS, random_model, zoo_config, zoo_model
from headrace_extractor.errors import FieldInvalid
from headrace_extractor.runner.hooks.binding import anatomy_of
from headrace_extractor.runner.hooks.rounding import in_float32
from headrace_extractor.runner.models.loading import LoadedModel
from headrace_extractor.runner.passes.context import isolation_of

N_TOKENS = 97
_SMALL = {
    "vocab_size": N_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_STRANGERS = {
    # Its window, of 8 tokens on both sides, is named `local_attention`.
    "modernbert": {
        "local_attention": 16,
        "global_attn_every_n_layers": 2,
        "max_position_embeddings": 256,
        "cls_token_id": 3,
        "sep_token_id": 4,
    },
    # Queries are scaled by their place in the sequence, from place 31 on.
    "llama4_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "max_position_embeddings": 256,
        "floor_scale": 32,
        "attn_scale": 0.5,
        "attn_temperature_tuning": True,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 128,
    },
    # A state space beside the attention, which knows of no documents.
    "falcon_h1": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
        "max_position_embeddings": 256,
    },
    "mamba": {"state_size": 8, "time_step_rank": 4},
}


@functools.cache
def stranger(model_type):
    return random_model(AutoConfig.for_model(model_type, **{**_SMALL, **_STRANGERS[model_type]}))


@pytest.fixture
def rows_of(extract, tmp_path):
    """Extracts what leaves block 2; returns the rows and the documents they belong to."""

    def run(model, documents, **recipe):
        loaded = LoadedModel(model=model, device=torch.device("cpu"), files_path=tmp_path, measured_bytes=0, files=())
        rows, _ = extract(loaded, documents, ["blocks.2.hook_resid_post"], bos="none", **recipe)
        return rows["blocks.2.hook_resid_post"], rows["document"]

    return run


def documents(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(5, N_TOKENS, length).astype(np.int32) for length in lengths]


@torch.inference_mode()
def alone(model, document):
    """What leaves block 2 for one document, by transformers alone."""
    seen = []
    block = anatomy_of(model).blocks[2]
    handle = block.register_forward_hook(
        lambda _m, _a, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    model(input_ids=torch.from_numpy(document).long()[None], use_cache=False)
    handle.remove()
    return seen[0][0].numpy()


def assert_exact(model, rows, texts, tolerance):
    values, document = rows
    for number, text in enumerate(texts):
        expected = alone(model, text)
        errors = np.linalg.norm(values[document == number] - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert errors.shape == (len(text),)
        assert errors.max() <= tolerance, number


@pytest.mark.parametrize("model_type", _STRANGERS)
def test_a_document_in_a_sequence_of_its_own_is_exact(model_type, rows_of):
    texts = documents(90, 5, 41)
    model = stranger(model_type)

    assert_exact(model, rows_of(model, texts, packing="one_document", context_size=128), texts, 0)


@pytest.mark.parametrize(("model_type", "limit"), [("modernbert", 8), ("llama4_text", 31)])
def test_packed_documents_are_exact_as_long_as_no_length_of_the_config_is_passed(model_type, limit, rows_of):
    texts = documents(3, limit - 3, limit, 2)
    model = stranger(model_type)

    rows = rows_of(model, texts, context_size=limit)

    assert_exact(model, rows, texts, 1e-5)


@pytest.mark.parametrize(("model_type", "limit"), [("modernbert", 8), ("llama4_text", 31)])
def test_beyond_such_a_length_packing_is_refused_with_the_longest_context_that_is_right(model_type, limit, rows_of):
    with pytest.raises(FieldInvalid, match=f"one_document, or a context_size of at most {limit}") as caught:
        rows_of(stranger(model_type), documents(90, 5, 41), context_size=64)

    assert caught.value.field == "spec.recipe.context_size"


@pytest.mark.parametrize("model_type", ["falcon_h1", "mamba"])
def test_a_state_that_runs_through_the_sequence_refuses_packing(model_type, rows_of):
    with pytest.raises(FieldInvalid, match="one_document") as caught:
        rows_of(stranger(model_type), documents(90, 5, 41), context_size=64)

    assert caught.value.field == "spec.recipe.packing"


def test_documents_that_may_see_one_another_need_no_proof(rows_of):
    texts = documents(40, 24)
    model = stranger("falcon_h1")

    values, _ = rows_of(model, texts, context_size=64, attend_across_documents=True)

    assert np.array_equal(values, alone(model, np.concatenate(texts)))


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "falcon-alibi"] + ["bert"])
def test_every_known_architecture_keeps_documents_apart_up_to_rounding(name):
    verdict = isolation_of(zoo_model(name), 64)

    assert verdict.holds
    assert verdict.error < 2e-5


@pytest.mark.parametrize("name", ["bloom", "falcon", "gemma2", "gpt2", "gpt_neo", "llama", "olmo2", "opt", "phi3"])
def test_weights_of_16_bits_do_not_hide_what_rounding_is(name):
    model = random_model(zoo_config(name), torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    verdict = isolation_of(model, 64)

    assert verdict.holds
    assert verdict.error < 2e-5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


class _Leak(nn.Module):
    """Adds a little of the token before, as a state space does, whichever document it is of."""

    def __init__(self, inner, share):
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, hidden):
        values = self.inner(hidden)
        return values + self.share * nn.functional.pad(values, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.05, 0.001])
def test_a_leak_far_below_rounding_is_seen(dtype, share):
    model = random_model(zoo_config("llama"), dtype)
    assert isolation_of(random_model(zoo_config("llama"), dtype), 48).holds
    model.layers[1].mlp = _Leak(model.layers[1].mlp, share)

    verdict = isolation_of(model, 48)

    assert not verdict.holds
    assert verdict.error > verdict.bound


class _NoNumbers(nn.Module):
    """Gives no numbers for what is packed, as a mask does that lets a row see nothing."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden) * (torch.nan if hidden.shape[:2] == (2, 48) else 1)


def test_rows_that_are_no_numbers_when_packed_are_not_apart():
    model = random_model(zoo_config("llama"))
    model.layers[1].mlp = _NoNumbers(model.layers[1].mlp)

    assert not isolation_of(model, 48).holds


def test_a_proof_without_memory_is_no_verdict():
    model = random_model(zoo_config("llama"))

    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    handle = model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        isolation_of(model, 48)
    handle.remove()

    assert isolation_of(model, 48).holds


def test_a_proof_is_made_once_and_counts_for_shorter_sequences():
    model, calls = random_model(zoo_config("llama")), []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(0))
    isolation_of(model, 64)
    n_calls = len(calls)

    assert isolation_of(model, 64).holds
    assert isolation_of(model, 33).holds
    assert len(calls) == n_calls
    assert isolation_of(model, 65 - 1) is isolation_of(model, 2)


def test_blocks_compute_in_float32_and_get_their_own_weights_back():
    model = random_model(zoo_config("llama"), torch.bfloat16)
    ids, seen = torch.arange(3, 20)[None], []
    weights = [parameter.data_ptr() for parameter in model.parameters()]
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).last_hidden_state
        handle = model.layers[1].mlp.register_forward_hook(lambda _m, _a, output: seen.append(output.dtype))
        with in_float32(model.layers):
            model(input_ids=ids, use_cache=False)
        handle.remove()

        assert seen == [torch.float32]
        assert [parameter.data_ptr() for parameter in model.parameters()] == weights
        assert torch.equal(model(input_ids=ids, use_cache=False).last_hidden_state, plain)


def test_weights_are_put_back_when_a_pass_ends_in_the_middle_of_a_block():
    model = random_model(zoo_config("llama"), torch.bfloat16)
    weights = [parameter.data_ptr() for parameter in model.parameters()]

    def fail(*_):
        raise KeyError

    handle = model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyError), torch.no_grad(), in_float32(model.layers):
        model(input_ids=torch.arange(3, 20)[None], use_cache=False)
    handle.remove()

    assert [parameter.data_ptr() for parameter in model.parameters()] == weights
