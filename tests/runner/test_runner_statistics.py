"""The runner's statistics equal numpy's over all stored rows."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

from fix_runner import documents, load, read_rows, run_command
from headrace_extractor.node.runner_protocol import Committed, Extract, Finished, Load, Loaded
from headrace_extractor.runner.passes.statistics import summarize
from headrace_log.layout import ColumnSpec, Dtype
from headrace_log.manifest import Manifest
from headrace_log.statistics import load_statistics

SITES = ["blocks.1.hook_resid_post", "blocks.2.hook_attn_out"]


def assert_statistics_of(found, values):
    values = values.astype(np.float64)
    norms = np.sqrt((values**2).sum(1))
    assert found.count == len(values)
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.m2, ((values - values.mean(0)) ** 2).sum(0), rtol=1e-9, atol=1e-12)
    assert found.mean_norm == pytest.approx(norms.mean(), rel=1e-12)
    assert found.mean_squared_norm == pytest.approx((norms**2).mean(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n_rows", "width"), [(1, 1), (3, 7), (1000, 96), (3, 50_000), (333, 1024)])
def test_statistics_of_memory_are_numpys(dtype, n_rows, width):
    torch.manual_seed(n_rows)
    # One element in a hundred is as far from zero as the outliers of real models.
    rows = (torch.randn(n_rows, width) + 1000.0 * (torch.arange(width) % 100 == 3)).to(dtype)
    memory = memoryview(rows.view(torch.uint8).numpy().reshape(-1))

    found = summarize(ColumnSpec(name="x", dtype=Dtype(str(dtype).removeprefix("torch.")), width=width), memory, None)

    assert_statistics_of(found, rows.double().numpy())


@pytest.mark.parametrize(("name", "dtype"), [("int8", torch.int8), ("float8_e4m3", torch.float8_e4m3fn)])
def test_values_of_eight_bits_are_multiplied_by_their_scale_first(name, dtype):
    rows, scales = (torch.randn(500, 80) * 20).to(dtype), torch.rand(500, 1)
    memory = [memoryview(values.view(torch.uint8).numpy().reshape(-1)) for values in (rows, scales)]
    column = ColumnSpec(name="x", dtype=Dtype(name), width=80, scale_column="x.scale")

    assert_statistics_of(summarize(column, *memory), rows.double().mul(scales).numpy())


@pytest.mark.parametrize("max_rows", [[0], [1, 70, 71, 300, 0]])
def test_an_extraction_leaves_the_statistics_of_its_rows(tiny_llama, make_set, make_corpus, max_rows):
    folder, corpus, model = make_set(SITES), make_corpus(documents(25)), load(tiny_llama)
    for limit in max_rows:
        command = Extract(set_id="x", set_path=str(folder), corpus_path=str(corpus), max_rows=limit)
        last = run_command(command, model)[-1]

    rows, manifest = read_rows(folder, last.n_rows), Manifest.load(folder)
    for name in SITES:
        assert_statistics_of(load_statistics(folder, manifest.column(name)), rows[name])
        assert manifest.statistics[name]["count"] == last.n_rows


@pytest.mark.fault
def test_statistics_are_right_after_runners_were_killed(tiny_llama, make_set, make_corpus, start_runner):
    folder, corpus = make_set(SITES, segment_rows=300), make_corpus(documents(200, longest=120))
    command = Extract(set_id="x", set_path=str(folder), corpus_path=str(corpus))
    for rows_before_the_kill in (700, 2_000, 4_500):
        runner = start_runner()
        runner.send(Load(files_path=str(tiny_llama), device="cpu", dtype="float32"))
        runner.until(Loaded)
        runner.send(command)
        while runner.until(Committed).n_rows < rows_before_the_kill:
            pass
        runner.signal(signal.SIGKILL)
        assert runner.wait() == -signal.SIGKILL

    last = start_runner()
    last.send(Load(files_path=str(tiny_llama), device="cpu", dtype="float32"))
    last.until(Loaded)
    last.send(command)
    end = last.until(Finished)

    assert end.n_rows > 5_000
    rows, manifest = read_rows(folder, end.n_rows), Manifest.load(folder)
    for name in SITES:
        assert_statistics_of(load_statistics(folder, manifest.column(name)), rows[name])
        assert sorted(manifest.receipt) == sorted(SITES)
