"""Rows in 8 bits, from the forward pass to the tensor: close to the float32 rows, and the receipt shows the loss."""

import numpy as np
import pytest
import torch

from fix_system import HOOKPOINT, MODEL, WIDTH, texts
from headrace_client.values import Dtype, Recipe

EIGHT_BITS = ["int8", "float8_e4m3"]
SCALE = f"{HOOKPOINT}.scale"
# Largest errors, as a share of a row's norm: half a step of 1/127 of its largest value; a sixteenth of each value.
BOUNDS = {"int8": 0.02, "float8_e4m3": 0.0625}


@pytest.fixture(scope="module")
def extractions(system):
    """The same rows in float32 and in 8 bits, by storage dtype."""
    system.client.corpora.upload("eight-bits", documents=texts(80, seed=8))
    done = {}
    for dtype in ["float32", *EIGHT_BITS]:
        recipe = Recipe(context_size=64, storage_dtype=dtype)
        started = system.client.extractions.start(MODEL, "eight-bits", [HOOKPOINT], recipe=recipe)
        done[dtype] = system.client.extractions.wait(started.id, deadline_s=60)
    return done


def rows_of(system, extraction, **options):
    with system.client.activations(extraction, batch_size=100, columns=HOOKPOINT, **options) as batches:
        return torch.cat(list(batches))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_tensors_come_multiplied_by_their_scale(system, extractions, dtype):
    full, ours = rows_of(system, extractions["float32"]), rows_of(system, extractions[dtype])

    errors = (ours - full).norm(dim=1) / full.norm(dim=1)

    assert ours.dtype == torch.float32
    assert 0 < errors.max() < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_tensors_come_in_the_dtype_asked_for(system, extractions, dtype):
    plain = rows_of(system, extractions[dtype])
    asked = rows_of(system, extractions[dtype], dtype=torch.bfloat16)

    assert asked.dtype == torch.bfloat16
    torch.testing.assert_close(asked.float(), plain, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_chunks_come_as_they_are_stored(system, extractions, dtype):
    with system.client.chunks(extractions[dtype], columns=(HOOKPOINT, SCALE)) as stream:
        values, scales = (column for column in stream.header.columns)
        chunk = next(stream)

    assert (values.dtype, values.width, values.scale_column) == (Dtype(dtype), WIDTH, SCALE)
    assert (scales.dtype, scales.width, scales.scale_column) == (Dtype.FLOAT32, 1, "")
    assert chunk.array(HOOKPOINT).dtype.itemsize == 1
    if dtype == "int8":
        product = chunk.array(HOOKPOINT).astype(np.float32) * chunk.array(SCALE)
        assert np.array_equal(product, rows_of(system, extractions[dtype])[: chunk.n_rows].numpy())


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_the_receipt_shows_what_was_lost(extractions, dtype):
    full, ours = (extractions[name].receipt for name in ("float32", dtype))

    assert full.n_rows == ours.n_rows > 0
    assert full.worst.max_relative_error < 1e-4 < ours.worst.max_relative_error < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_statistics_are_those_of_the_values_as_read(system, extractions, dtype):
    rows = rows_of(system, extractions[dtype]).double()

    with system.client.chunks(extractions[dtype], end_row=1) as stream:
        (found,) = stream.header.statistics

    assert (found.name, found.count) == (HOOKPOINT, len(rows))
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-5, atol=1e-7)
    assert found.mean_norm == pytest.approx(rows.norm(dim=1).mean().item(), rel=1e-6)


def test_each_storage_dtype_is_a_set_of_its_own(extractions):
    assert len({extraction.set_id for extraction in extractions.values()}) == 3


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_what_is_there_is_not_computed_again(system, extractions, dtype):
    recipe = Recipe(context_size=64, storage_dtype=dtype)
    again = system.client.extractions.start(MODEL, "eight-bits", [HOOKPOINT], recipe=recipe)
    again = system.client.extractions.wait(again.id, deadline_s=60)

    assert again.cached
    assert again.receipt == extractions[dtype].receipt
