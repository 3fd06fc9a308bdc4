"""Rows are the same with and without pinned buffers and a side stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fix_runner import documents, load
from fix_zoo import random_model, zoo_batch, zoo_config
from headrace_extractor.runner.hooks.binding import offered_sites
from headrace_extractor.runner.passes.forward import DirectFetch, StagedFetch, fetch_for, forward_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NAMES = ["blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"]


def on_cuda(path, dtype="float32"):
    return load(path, device="cuda:0", dtype=dtype)


@pytest.mark.parametrize("storage_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("drop_special_tokens", [False, True])
def test_staged_rows_equal_those_copied_directly(tiny_model, extract, monkeypatch, storage_dtype, drop_special_tokens):
    recipe = {"storage_dtype": storage_dtype, "drop_special_tokens": drop_special_tokens}
    model, corpus = on_cuda(tiny_model), documents(100)
    assert isinstance(fetch_for(model.device, {}), StagedFetch)
    staged, _ = extract(model, corpus, NAMES, **recipe)
    monkeypatch.setattr("headrace_extractor.runner.passes.extract.fetch_for", lambda *_: DirectFetch())
    direct, _ = extract(model, corpus, NAMES, **recipe)

    assert staged.keys() == direct.keys()
    assert all(np.array_equal(staged[name], direct[name]) for name in staged)


def test_max_rows_is_exact_one_batch_behind(tiny_llama, extract):
    model, corpus = on_cuda(tiny_llama), documents(100)
    everything, _ = extract(model, corpus, NAMES)
    rows, events = extract(model, corpus, NAMES, max_rows=333)

    assert events[-1].n_rows == 333
    assert np.array_equal(rows[NAMES[2]], everything[NAMES[2]][:333])


def test_cuda_agrees_with_the_cpu(tiny_model, extract):
    corpus = documents(30)
    ours, _ = extract(on_cuda(tiny_model), corpus, NAMES)
    theirs, _ = extract(load(tiny_model), corpus, NAMES)

    for name in NAMES:
        assert np.abs(ours[name] - theirs[name]).max() < 1e-4 * np.abs(theirs[name]).max()


def test_float16_is_allowed_and_memory_is_measured(tiny_llama):
    assert on_cuda(tiny_llama, "float16").measured_bytes == torch.cuda.memory_reserved(0) > 0


@pytest.mark.parametrize("name", ["bloom", "falcon", "gemma2", "gpt_neo", "gptj", "llama", "opt", "phi3", "qwen3_moe"])
def test_every_way_of_isolation_works_on_cuda(name):
    model = random_model(zoo_config(name)).to("cuda:0")
    sites = offered_sites(model)
    pieces = [np.arange(3, 3 + length) for length in (7, 20, 5, 17, 15)]
    packed = forward_rows(model, zoo_batch(pieces), sites)
    alone = [forward_rows(model, zoo_batch([piece]), sites) for piece in pieces]

    for site, rows in packed.items():
        expected = torch.cat([each[site] for each in alone])
        assert float((rows - expected).abs().max()) < 1e-3 * float(expected.abs().max()), site
