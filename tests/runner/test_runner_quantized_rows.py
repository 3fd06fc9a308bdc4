"""8-bit columns: their loss is bounded by their scale, and their bits depend on neither batches nor device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fix_runner import WIDTH, digests, documents, load, run_command
from headrace_extractor.corpora.packing import Cursor, TokenBatch
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.errors import NonFinite
from headrace_extractor.node.runner_protocol import Extract
from headrace_extractor.runner.passes.forward import BatchRows, DirectFetch
from headrace_extractor.runner.passes.quantized_rows import dequantize_rows, quantize_rows
from headrace_extractor.runner.passes.rows import RowSource
from headrace_log.layout import PROVENANCE, ColumnSpec, Dtype, scale_column, segment_path
from headrace_log.manifest import Manifest
from headrace_log.statistics import load_statistics
from headrace_log.writer import Reservation

SITES = ["blocks.1.hook_resid_post", "blocks.2.hook_attn_out"]
EIGHT_BITS = {"int8": torch.int8, "float8_e4m3": torch.float8_e4m3fn}


@pytest.fixture
def make_set(tmp_path):
    def make(storage_dtype, name="set", segment_rows=100):
        recipe = Recipe(context_size=64, batch_size=2, storage_dtype=storage_dtype)
        columns = [*PROVENANCE]
        for site in SITES:
            scale = scale_column(site) if storage_dtype in EIGHT_BITS else None
            columns.append(ColumnSpec(name=site, dtype=Dtype(storage_dtype), width=WIDTH, scale_column=scale))
            columns += [ColumnSpec(name=scale, dtype=Dtype.FLOAT32, width=1)] if scale else []
        folder = tmp_path / f"{name}-{storage_dtype}"
        identity = {"recipe": recipe.to_json()}
        Manifest(set_id="s", identity=identity, columns=tuple(columns), segment_rows=segment_rows).save(folder)
        return folder

    return make


def extract(folder, corpus, model, **fields):
    return run_command(Extract(set_id="x", set_path=str(folder), corpus_path=str(corpus), **fields), model)[-1]


def stored(folder, name):
    """All rows of a column, by plain safetensors."""
    column = Manifest.load(folder).column(name)
    files = [segment_path(folder, column, segment) for segment in range(len(digests(folder)))]
    return torch.cat([load_file(file)[name] for file in files])


def rows(dtype=torch.float32):
    """Ordinary rows, rows with an outlier, huge rows, tiny rows, and a row of zeros."""
    torch.manual_seed(0)
    acts = torch.randn(300, 65) * torch.logspace(-30, 30, 300)[:, None]
    acts[::7, 3] *= 1000
    acts[11] = 0
    return acts.clamp(-1e38, 1e38).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_value_is_off_by_half_a_step_at_most(dtype):
    acts = rows(dtype)
    values, scale = quantize_rows(acts, torch.int8)

    error = (dequantize_rows(values, scale).double() - acts.double()).abs()

    assert values.dtype == torch.int8
    assert bool((error <= scale.double() * (0.5 + 1e-4)).all())
    assert bool((values.abs().amax(1)[acts.abs().amax(1) > 0] == 127).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp8_value_is_off_by_a_sixteenth_of_itself_at_most(dtype):
    acts = rows(dtype)
    values, scale = quantize_rows(acts, torch.float8_e4m3fn)

    error = (dequantize_rows(values, scale).double() - acts.double()).abs()

    assert values.dtype == torch.float8_e4m3fn
    # Values below the smallest normal number, 2^-6, are multiples of 2^-9.
    assert bool((error <= torch.maximum(acts.double().abs() / 16, scale.double() * 2**-10) * (1 + 1e-4)).all())


@pytest.mark.parametrize("dtype", EIGHT_BITS.values())
def test_rows_of_zeros_come_back_as_zeros(dtype):
    values, scale = quantize_rows(torch.zeros(3, 5), dtype)

    assert torch.equal(scale, torch.zeros(3, 1))
    assert torch.equal(dequantize_rows(values, scale), torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", EIGHT_BITS.values())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_a_value_that_is_not_finite_can_not_be_read_as_numbers(dtype, bad):
    acts = torch.randn(3, 5)
    acts[1, 2] = bad

    back = dequantize_rows(*quantize_rows(acts, dtype))

    assert back.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", EIGHT_BITS.values())
def test_a_row_does_not_depend_on_its_neighbours(dtype):
    acts = rows()
    values, scale = quantize_rows(acts, dtype)

    for at in (0, 1, 77, 299):
        one, its_scale = quantize_rows(acts[at : at + 1], dtype)
        assert torch.equal(one.view(torch.int8), values[at : at + 1].view(torch.int8))
        assert torch.equal(its_scale, scale[at : at + 1])


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_stored_rows_are_the_quantized_ones_of_a_full_set(tiny_model, make_set, make_corpus, name):
    corpus, model = make_corpus(documents(25)), load(tiny_model)
    eight, full = make_set(name), make_set("float32")

    n_rows = extract(eight, corpus, model).n_rows
    extract(full, corpus, model)

    for site in SITES:
        values, scale = quantize_rows(stored(full, site), EIGHT_BITS[name])
        assert torch.equal(stored(eight, site).view(torch.int8), values.view(torch.int8))
        assert torch.equal(stored(eight, scale_column(site)), scale)
        found = load_statistics(eight, Manifest.load(eight).column(site))
        assert found.count == n_rows
        np.testing.assert_allclose(found.mean, dequantize_rows(values, scale).double().mean(0), rtol=1e-5, atol=1e-8)
    assert load_statistics(eight, Manifest.load(eight).column(scale_column(SITES[0]))) is None


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_digests_do_not_depend_on_where_runs_ended(tiny_llama, make_set, make_corpus, name):
    corpus, model = make_corpus(documents(25)), load(tiny_llama)
    whole, parts = make_set(name, "whole", segment_rows=64), make_set(name, "parts", segment_rows=64)
    n_rows = extract(whole, corpus, model).n_rows
    for max_rows in [64, 192, 448, 0]:
        last = extract(parts, corpus, model, max_rows=max_rows)

    assert last.n_rows == n_rows
    assert digests(parts) == digests(whole)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_values_that_are_not_finite_are_found_and_counted(tiny_llama, make_set, make_corpus, name):
    model = load(tiny_llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[96] = torch.nan
    corpus = make_corpus([[5, 6, 96]])

    with pytest.raises(NonFinite, match="of document 0 stored as"):
        extract(make_set(name, "strict"), corpus, model)
    allowed = extract(make_set(name, "lenient"), corpus, model, allow_non_finite=True)

    assert allowed.n_non_finite >= 2 * WIDTH


def stored_by(activations, index, batch, column, scale):
    """Stores one batch of rows; returns the log's memory."""
    n_rows = len(batch.token_ids)
    memory = {c.name: bytearray(n_rows * c.row_bytes) for c in (column, scale)}
    source = RowSource(BatchRows(batch=batch, activations=activations, index=index), [column], allow_non_finite=False)
    source.copy_to(Reservation(n_rows, {name: memoryview(each) for name, each in memory.items()}), 0)
    return memory


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_rows_quantized_on_the_device_are_stored_as_those_quantized_here(name):
    column = ColumnSpec(name="x", dtype=Dtype(name), width=65, scale_column="x.scale")
    scale = ColumnSpec(name="x.scale", dtype=Dtype.FLOAT32, width=1)
    acts, numbers = rows(), np.arange(300, dtype=np.int32)
    batch = TokenBatch(
        token_ids=numbers,
        position_ids=numbers,
        documents=numbers,
        positions=numbers,
        keep=np.ones(300, np.bool_),
        start=Cursor(),
        next=Cursor(),
    )
    values, scales = quantize_rows(acts, EIGHT_BITS[name])

    here = stored_by({"x": acts}, torch.arange(300), batch, column, scale)
    there = stored_by({"x": values, "x.scale": scales}, None, batch, column, scale)

    assert here == there
    assert any(here["x"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_digests_are_those_of_rows_copied_directly(tiny_model, make_set, make_corpus, monkeypatch, name):
    corpus, model = make_corpus(documents(40)), load(tiny_model, device="cuda:0")
    staged, direct = make_set(name, "staged"), make_set(name, "direct")
    extract(staged, corpus, model)
    monkeypatch.setattr("headrace_extractor.runner.passes.extract.fetch_for", lambda *_: DirectFetch())

    extract(direct, corpus, model)

    assert digests(staged) == digests(direct)
