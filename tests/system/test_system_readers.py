"""Four trainers on four layers of one extraction, each at its own pace, one late: each gets exactly its rows."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fix_system import MODEL, N_LAYERS, PATIENCE_S, SLOW, read, texts
from headrace_client import StreamTuning, errors
from headrace_client.values import Retain, Window

pytestmark = pytest.mark.timeout(240)

LAYERS = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
PACES_S = [0.002, 0.01, 0.002, 0.004]  # Pauses between batches; the second is five times the first.
WINDOW = Window(window_bytes=1024 * 1024, reader_grace_s=PATIENCE_S)
NARROW = StreamTuning(queue_bytes=64 * 1024, chunk_bytes=8 * 1024)


def train(system, extraction, layer, pace_s, *, start_row=0, on_batch=lambda n_rows: None):
    """Takes all batches of a layer at a pace; returns digests by column, and its first row."""
    digests = {name: hashlib.sha256() for name in ("document", "position", layer)}
    with system.client.activations(
        extraction, columns=list(digests), batch_size=100, start_row=start_row, tuning=NARROW
    ) as stream:
        for batch in stream:
            for name, rows in batch.items():
                digests[name].update(rows.numpy())
            on_batch(stream.next_row)
            time.sleep(pace_s)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def start(system, retention):
    corpus = system.variant(texts(300, seed=11, longest=10))
    return system.client.extractions.start(MODEL, corpus, LAYERS, recipe=SLOW, retention=retention)


def expected(system, extraction, layer, *, start_row=0):
    """Digests of the rows that an undisturbed reader of a retained extraction gets."""
    digests = {name: hashlib.sha256() for name in ("document", "position", layer)}
    inline = StreamTuning(transport="inline")
    with system.client.chunks(extraction, list(digests), start_row=start_row, tuning=inline) as stream:
        for chunk in stream:
            for name, digest in digests.items():
                digest.update(chunk.array(name))
    return {name: digest.hexdigest() for name, digest in digests.items()}


@pytest.fixture(scope="module")
def retained(system):
    """A finished extraction of the same rows."""
    extraction = start(system, Retain())
    return system.client.extractions.wait(extraction.id, deadline_s=PATIENCE_S)


@pytest.mark.parametrize("retention", [Retain(), WINDOW], ids=["retain", "window"])
def test_each_of_four_trainers_gets_exactly_its_rows(system, retained, retention):
    extraction = start(system, retention)
    under_way = threading.Event()

    def on_batch(n_rows):
        if n_rows > retained.n_rows // 2:
            under_way.set()

    def late(layer, pace_s):
        assert under_way.wait(PATIENCE_S)
        try:
            return train(system, extraction, layer, pace_s), 0
        except errors.RowsExpired as exc:
            # The window has moved on, and keeps moving: a late reader begins 1000 rows after the first it still holds.
            row = int(exc.metadata["first_available_row"]) + 1000
            return train(system, extraction, layer, pace_s, start_row=row), row

    with ThreadPoolExecutor(len(LAYERS)) as pool:
        early = [
            pool.submit(train, system, extraction, layer, pace_s, on_batch=on_batch)
            for layer, pace_s in zip(LAYERS[:-1], PACES_S[:-1], strict=True)
        ]
        last = pool.submit(late, LAYERS[-1], PACES_S[-1])
        got = [one.result(PATIENCE_S) for one in early]
        latecomer, first_row = last.result(PATIENCE_S)

    assert got == [expected(system, retained, layer) for layer in LAYERS[:-1]]
    assert latecomer == expected(system, retained, LAYERS[-1], start_row=first_row)
    assert (first_row > 0) == isinstance(retention, Window)


def test_all_readers_read_what_one_reads(system, retained):
    with ThreadPoolExecutor(8) as pool:
        ways = [{"transport": way} for way in ("inline", "mapped")] * 4
        got = list(pool.map(lambda way: read(system.client, retained, **way), ways))

    assert all(one == got[0] for one in got)
