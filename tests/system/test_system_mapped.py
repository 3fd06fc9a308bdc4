"""Rows from the set's own files, while the forward pass writes them and while things are killed: the same bytes."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from fix_system import HOOKPOINT, MODEL, PATIENCE_S, SLOW, At, Digest, columns_of, eventually, read, texts
from headrace_client import Reading, StreamTuning, errors
from headrace_client.values import ExtractionState, Retain, Window

pytestmark = pytest.mark.timeout(300)

DOCUMENTS = texts(1200, seed=1, longest=10)
WINDOW = Window(window_bytes=1024 * 1024, reader_grace_s=PATIENCE_S)
NARROW = {"queue_bytes": 64 * 1024, "chunk_bytes": 8 * 1024}
N_ROUNDS = int(os.environ.get("HEADRACE_FAULT_ROUNDS", "4"))
FIRST_SEED = int(os.environ.get("HEADRACE_FAULT_SEED", "1"))


def start(system, retention=None):
    return system.client.extractions.start(
        MODEL, system.variant(DOCUMENTS), HOOKPOINT, recipe=SLOW, retention=retention or Retain()
    )


def read_mapped(client, extraction, *, on_rows=lambda n_rows: None, **tuning):
    """Digests of all rows, and how many of them came out of files."""
    digest, n_mapped = Digest(), 0
    tuned = StreamTuning(transport="mapped", **tuning)
    with client.chunks(extraction, columns_of(extraction), tuning=tuned) as stream:
        for chunk in stream:
            digest.add(chunk)
            n_mapped += chunk.n_rows * isinstance(chunk.buffers[0].obj, np.ndarray)
            on_rows(digest.n_rows)
    return digest.value, n_mapped


def shuffled(client, extraction, transport):
    """All rows by their document and position, in the order of a seed."""
    reading = Reading(order="shuffled", seed=3, block_rows=100)
    tuning = StreamTuning(transport=transport)
    with client.chunks(extraction, columns_of(extraction), reading=reading, tuning=tuning) as stream:
        return [b"".join(bytes(buffer) for buffer in chunk.buffers) for chunk in stream]


@pytest.fixture(scope="module")
def quiet(system):
    """A finished set, and the digests of its rows as messages."""
    extraction = start(system)
    system.client.extractions.wait(extraction.id, deadline_s=PATIENCE_S)
    return extraction, read(system.client, extraction, transport="inline")


def test_a_finished_set_is_mapped_whole_without_being_asked_for(system, quiet):
    extraction, expected = quiet

    with system.client.chunks(extraction, columns_of(extraction)) as stream:
        next(stream)
        assert stream.progress().mapped
    assert read_mapped(system.client, extraction) == (expected, int(expected["n_rows"]))


def test_shuffled_rows_are_the_same_either_way(system, quiet):
    extraction, _ = quiet

    assert shuffled(system.client, extraction, "mapped") == shuffled(system.client, extraction, "inline")


def test_a_window_is_mapped_while_it_moves(system, quiet):
    _, expected = quiet
    extraction = start(system, WINDOW)
    eventually(
        lambda: system.client.extractions.get(extraction.id).state in (ExtractionState.WAITING, ExtractionState.DONE),
        "the window is full",
    )

    got, n_mapped = read_mapped(system.client, extraction, **NARROW)

    assert got == expected
    assert n_mapped > 0


def test_a_window_that_is_not_mapped_by_itself_either_is_read_without_gap(system, quiet):
    _, expected = quiet

    assert read(system.client, start(system, WINDOW), **NARROW) == expected


def test_a_window_is_not_shuffled(system, quiet):
    extraction = start(system, WINDOW)

    stream = system.client.chunks(extraction, reading=Reading(order="shuffled"))
    with stream, pytest.raises(errors.InvalidArgument) as caught:
        next(stream)

    assert "RETAIN" in str(caught.value)
    system.client.extractions.cancel(extraction.id)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_rows_of_8_bits_are_scaled_either_way(system, dtype):
    recipe = replace(SLOW, storage_dtype=dtype)
    corpus = system.variant(texts(100, seed=5))
    exact = system.client.extractions.start(MODEL, corpus, HOOKPOINT, recipe=SLOW)
    small = system.client.extractions.start(MODEL, corpus, HOOKPOINT, recipe=recipe)

    rows = {}
    for name, extraction, transport in (
        ("exact", exact, "auto"),
        ("inline", small, "inline"),
        ("mapped", small, "mapped"),
    ):
        system.client.extractions.wait(extraction.id, deadline_s=PATIENCE_S)
        tuning = StreamTuning(transport=transport)
        with system.client.activations(extraction, batch_size=64, tuning=tuning) as stream:
            rows[name] = torch.cat(list(stream))

    assert rows["inline"].dtype == torch.float32
    assert torch.equal(rows["inline"], rows["mapped"])
    error = (rows["inline"] - rows["exact"]).norm() / rows["exact"].norm()
    assert 0 < error < 0.05


# -- killed and back ---------------------------------------------------------------------------------------------------


def runner(system, supervisor, pause_s):
    system.kill_runner()


def extractor(system, supervisor, pause_s):
    if system.extractor.running:
        system.kill_extractor()
        supervisor.later(pause_s, system.extractor.start)


VICTIMS = (runner, extractor)


@pytest.mark.fault
@pytest.mark.parametrize("retention", [Retain(), WINDOW], ids=["retain", "window"])
@pytest.mark.parametrize("victim", VICTIMS)
def test_mapped_rows_come_once_although_something_is_killed(fragile, supervisor, victim, retention):
    expected = read(fragile.client, start(fragile), transport="inline")
    extraction = start(fragile, retention)
    kill = At(int(expected["n_rows"]) // 4, lambda: victim(fragile, supervisor, 0.5))

    got, _ = read_mapped(fragile.client, extraction, on_rows=kill, **NARROW)

    assert got == expected
    assert kill.done


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + N_ROUNDS))
def test_mapped_rows_come_once_whatever_is_killed(fragile, supervisor, seed):
    """Kills runner and extractor at random rows; the reader starts when a part of the rows is sealed."""
    dice = random.Random(seed)
    expected = read(fragile.client, start(fragile), transport="inline")
    extraction = start(fragile, WINDOW)
    eventually(
        lambda: fragile.client.extractions.get(extraction.id).state in (ExtractionState.WAITING, ExtractionState.DONE),
        "the window is full",
    )
    plan = [(dice.uniform(0.0, 0.9), victim, dice.uniform(0.2, 1.5)) for victim in VICTIMS]
    kills = [
        At(int(int(expected["n_rows"]) * part), lambda v=victim, p=pause: v(fragile, supervisor, p))
        for part, victim, pause in plan
    ]

    def on_rows(n_rows):
        for kill in kills:
            kill(n_rows)

    got, n_mapped = read_mapped(fragile.client, extraction, on_rows=on_rows, **NARROW)

    assert got == expected, plan
    assert n_mapped > 0
    assert all(kill.done for kill in kills)
