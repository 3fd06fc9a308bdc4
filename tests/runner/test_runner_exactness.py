"""Rows in the log, compared with transformers' own hidden states."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fix_runner import N_LAYERS, WIDTH, documents, load, read_rows, run_command
from headrace_extractor.errors import CorpusEmpty, FieldInvalid, NonFinite
from headrace_extractor.node.runner_protocol import Committed, Extract, Finished
from headrace_extractor.runner.passes.context import isolation_of

RESID_PRE = [f"blocks.{layer}.hook_resid_pre" for layer in range(N_LAYERS)]
RESID_POST = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
SITES = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
ALL = [f"blocks.{layer}.{site}" for layer in range(N_LAYERS) for site in SITES]
HEADS = [f"blocks.{layer}.attn.hook_{site}" for layer in range(N_LAYERS) for site in "qkvz"]


@functools.cache
def reference(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()


@torch.inference_mode()
def hidden_states(path, token_ids):
    """Returns the hidden states of one sequence from the whole model: a list of [n, D] arrays."""
    out = reference(path)(input_ids=torch.tensor([token_ids]), output_hidden_states=True)
    return [state[0].numpy() for state in out.hidden_states]


def with_bos(document):
    return [1, *document.tolist()]


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_one_document_a_sequence_equals_hidden_states_exactly(tiny_model, extract):
    corpus = documents(5)
    rows, _ = extract(load(tiny_model), corpus, RESID_PRE + RESID_POST, packing="one_document")

    start = 0
    for number, document in enumerate(corpus):
        expected = hidden_states(tiny_model, with_bos(document)[:64])
        here = slice(start, start + len(expected[0]))
        start = here.stop
        assert np.array_equal(rows["token_id"][here], with_bos(document)[:64])
        assert (rows["document"][here] == number).all()
        assert np.array_equal(rows["position"][here], np.arange(len(expected[0])))
        for layer in range(N_LAYERS):
            assert np.array_equal(rows[RESID_PRE[layer]][here], expected[layer])
        for layer in range(N_LAYERS - 1):  # the last hidden state is behind the final norm
            assert np.array_equal(rows[RESID_POST[layer]][here], expected[layer + 1])
    assert start == len(rows["token_id"])


def test_last_resid_post_is_what_the_final_norm_normalises(tiny_llama, extract):
    corpus, model = documents(1), load(tiny_llama)
    rows, _ = extract(model, corpus, RESID_POST[-1:], packing="one_document")

    with torch.inference_mode():
        normed = model.model.norm(torch.from_numpy(rows[RESID_POST[-1]])).numpy()
    np.testing.assert_allclose(normed, hidden_states(tiny_llama, with_bos(corpus[0]))[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_one_another(tiny_model, extract, batch_size, attention):
    corpus = documents(20, longest=30)  # several documents in a sequence; longer ones go on in the next sequence
    model = load(tiny_model, load_options={"attn_implementation": attention})
    rows, _ = extract(model, corpus, RESID_POST[:-1], batch_size=batch_size)

    # Each piece begins with a BOS, and must give the same rows by itself.
    starts = np.flatnonzero(rows["token_id"] == 1)
    assert len(starts) > len(corpus)
    for start, end in zip(starts, [*starts[1:], len(rows["token_id"])], strict=True):
        expected = hidden_states(tiny_model, rows["token_id"][start:end].tolist())
        for layer in range(N_LAYERS - 1):
            assert relative(rows[RESID_POST[layer]][start:end], expected[layer + 1]) < 1e-4


def test_documents_may_attend_to_one_another(tiny_model, extract):
    corpus = documents(20, longest=30)
    rows, _ = extract(load(tiny_model), corpus, RESID_POST[:-1], attend_across_documents=True, batch_size=1)

    for start in range(0, len(rows["token_id"]), 64):
        expected = hidden_states(tiny_model, rows["token_id"][start : start + 64].tolist())
        for layer in range(N_LAYERS - 1):
            assert np.array_equal(rows[RESID_POST[layer]][start : start + 64], expected[layer + 1])


def test_sites_of_a_block_add_up(tiny_model, extract):
    rows, _ = extract(load(tiny_model), documents(10), ALL)

    for layer in range(N_LAYERS):
        pre, attn, mlp, post = (rows[f"blocks.{layer}.{site}"] for site in SITES)
        np.testing.assert_allclose(pre + attn + mlp, post, rtol=0, atol=1e-5)
        assert np.abs(attn).max() > 1e-2
        assert np.abs(mlp).max() > 1e-2


def test_rows_of_heads_give_the_attention_output_back(tiny_llama, make_set, make_corpus):
    model = load(tiny_llama)
    shapes = {"q": (4, 8), "k": (2, 8), "v": (2, 8), "z": (4, 8)}
    folder = make_set([*HEADS, *ALL], shapes={name: shapes[name[-1]] for name in HEADS})
    command = Extract(set_id="x", set_path=str(folder), corpus_path=str(make_corpus(documents(5))))
    rows = read_rows(folder, run_command(command, model)[-1].n_rows)

    for layer, block in enumerate(model.model.layers):
        z, k = (rows[f"blocks.{layer}.attn.hook_{site}"] for site in "zk")
        assert (z.shape[1], k.shape[1]) == (32, 16)
        with torch.inference_mode():
            projected = block.self_attn.o_proj(torch.from_numpy(z)).numpy()
        np.testing.assert_allclose(projected, rows[f"blocks.{layer}.hook_attn_out"], rtol=0, atol=1e-5)


def test_dropped_tokens_have_no_rows_and_do_not_shift_others(tiny_model, extract):
    corpus, model = documents(20), load(tiny_model)
    everything, _ = extract(model, corpus, RESID_POST)
    rows, _ = extract(model, corpus, RESID_POST, drop_special_tokens=True)

    kept = everything["token_id"] > 2
    assert 0 < kept.sum() < len(kept)
    for name, values in everything.items():
        assert np.array_equal(rows[name], values[kept])


@pytest.mark.parametrize("drop_special_tokens", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_storage_dtype_is_a_conversion_of_the_same_numbers(tiny_llama, extract, dtype, drop_special_tokens):
    corpus, model, recipe = documents(10), load(tiny_llama), {"drop_special_tokens": drop_special_tokens}
    exact, _ = extract(model, corpus, RESID_POST[1:2], **recipe)
    rows, _ = extract(model, corpus, RESID_POST[1:2], storage_dtype=dtype, **recipe)

    expected = torch.from_numpy(exact[RESID_POST[1]]).to(getattr(torch, dtype)).view(torch.int16).numpy()
    assert np.array_equal(rows[RESID_POST[1]].view(np.int16), expected)


def test_computing_in_bfloat16_stays_close(tiny_llama, extract):
    corpus = documents(10)
    exact, _ = extract(load(tiny_llama), corpus, RESID_POST[2:3])
    rows, _ = extract(load(tiny_llama, dtype="bfloat16"), corpus, RESID_POST[2:3])

    assert 0 < relative(rows[RESID_POST[2]], exact[RESID_POST[2]]) < 0.05


def test_layers_behind_the_deepest_site_do_not_run(tiny_model, extract):
    model = load(tiny_model)
    isolation_of(model.model, 64)  # Which goes through all of it.
    blocks = model.model.layers if hasattr(model.model, "layers") else model.model.h
    calls = [0] * N_LAYERS

    def count(number):
        def on_call(_module, args):
            # Two sequences: the receipt's documents go through the model one by one, and through all of it.
            calls[number] += len(args[0]) == 2

        return on_call

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(count(number))
    extract(model, documents(20), ["blocks.1.hook_attn_out", "blocks.0.hook_resid_post"])

    assert calls[0] == calls[1] > 1
    assert calls[2:] == [0, 0]


def test_numbers_do_not_depend_on_which_other_hookpoints_are_taken(tiny_model, extract):
    corpus, model = documents(10), load(tiny_model)
    alone, _ = extract(model, corpus, RESID_POST[1:2])
    together, _ = extract(model, corpus, ALL)

    assert np.array_equal(alone[RESID_POST[1]], together[RESID_POST[1]])


def test_whole_corpus_is_complete_and_counts_its_tokens(tiny_llama, extract):
    corpus = documents(10)
    rows, events = extract(load(tiny_llama), corpus, RESID_POST[:1], packing="one_document")

    n_tokens = sum(len(document) + 1 for document in corpus)
    assert events[-1] == Finished(set_id="x", n_rows=n_tokens, complete=True)
    assert [event for event in events if isinstance(event, Committed)][-1].n_tokens == n_tokens
    assert len(rows["token_id"]) == n_tokens


def test_max_rows_is_exact(tiny_llama, extract):
    corpus, model = documents(20), load(tiny_llama)
    everything, _ = extract(model, corpus, RESID_POST[:1])
    rows, events = extract(model, corpus, RESID_POST[:1], max_rows=333)

    assert events[-1] == Finished(set_id="x", n_rows=333, complete=False)
    assert np.array_equal(rows[RESID_POST[0]], everything[RESID_POST[0]][:333])


def test_complete_set_is_not_computed_again(tiny_llama, make_set, make_corpus):
    folder, corpus, model = make_set(RESID_POST[:1]), make_corpus(documents(5)), load(tiny_llama)
    command = Extract(set_id="x", set_path=str(folder), corpus_path=str(corpus))
    first = run_command(command, model)[-1]
    again = run_command(command, model)

    assert again == [first]


def test_corpus_without_a_row_is_an_error(tiny_llama, extract):
    with pytest.raises(CorpusEmpty, match="No row survives"):
        extract(load(tiny_llama), [[1, 2, 1]], RESID_POST[:1], drop_special_tokens=True)


def test_context_beyond_the_positions_of_the_model_is_refused(tiny_model, extract):
    with pytest.raises(FieldInvalid, match="512 positions"):
        extract(load(tiny_model), documents(2), RESID_POST[:1], context_size=513)
    extract(load(tiny_model), documents(2), RESID_POST[:1], context_size=512)


def with_broken_token(path, token_id, value):
    model = load(path)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[token_id] = value
    return model


def test_non_finite_values_name_their_place(tiny_model, make_set, make_corpus):
    corpus = [[5, 6, 7], [8, 9, 10, 96, 11], [12]]
    model = with_broken_token(tiny_model, 96, float("nan"))
    folder = make_set(RESID_PRE[:1], packing="one_document", segment_rows=100)
    command = Extract(set_id="x", set_path=str(folder), corpus_path=str(make_corpus(corpus)))
    with pytest.raises(NonFinite) as caught:
        run_command(command, model)

    assert caught.value.metadata == {"hookpoint": RESID_PRE[0], "document": "1", "position": "4"}
    assert len(read_rows(folder, 4)["token_id"]) == 4  # the rows before the document are kept


def test_non_finite_values_are_counted_when_allowed(tiny_model, extract):
    model = with_broken_token(tiny_model, 96, float("inf"))
    rows, events = extract(
        model, [[5, 6, 7], [8, 9, 10, 96, 11]], RESID_POST[:1], packing="one_document", allow_non_finite=True
    )

    n_broken = int((~np.isfinite(rows[RESID_POST[0]])).sum())
    assert n_broken >= WIDTH
    assert events[-1].n_non_finite == events[-2].n_non_finite == n_broken
    assert np.isfinite(rows[RESID_POST[0]][:4]).all()


def test_value_beyond_the_storage_dtype_is_found(tiny_llama, extract):
    model = with_broken_token(tiny_llama, 96, 1e6)

    with pytest.raises(NonFinite, match="float16"):
        extract(model, [[5, 96]], RESID_POST[:1], storage_dtype="float16")
    extract(model, [[5, 96]], RESID_POST[:1], storage_dtype="bfloat16")
