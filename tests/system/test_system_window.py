"""Backpressure from the consumer to the forward pass, and the rows that are kept for a reader that went away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fix_system import FAST, HOOKPOINT, MODEL, PATIENCE_S, Digest, columns_of, eventually, read, texts
from headrace_client import StreamTuning, errors
from headrace_client.values import ExtractionState, Window

pytestmark = pytest.mark.timeout(240)

DOCUMENTS = texts(1500, seed=2)
WINDOW_BYTES = 1024 * 1024
ROW_BYTES = 32 * 4 + 3 * 4
STREAM = "/headrace.extractor.v1.ExtractionService/StreamActivations"
# Little is read ahead, so that a consumer that stops is one that holds up.
NARROW = StreamTuning(queue_bytes=64 * 1024, chunk_bytes=8 * 1024)


def start(system, *, reader_grace_s=PATIENCE_S):
    retention = Window(window_bytes=WINDOW_BYTES, reader_grace_s=reader_grace_s)
    return system.client.extractions.start(
        MODEL, system.variant(DOCUMENTS), HOOKPOINT, recipe=FAST, retention=retention
    )


def now(system, extraction):
    return system.client.extractions.get(extraction.id)


def row_bytes_on_disk(path):
    """Bytes of all segments, without the page of each file's header."""
    return sum(file.stat().st_size - 4096 for file in Path(path).rglob("*.safetensors*"))


def test_a_client_that_stops_reading_stops_the_forward_pass_within_the_window(system):
    extraction = start(system)
    seen = []
    watching = threading.Thread(target=watch_into, args=(seen, system, extraction), daemon=True)
    watching.start()
    digest = Digest()
    with system.client.chunks(extraction, columns_of(extraction), reader="the-sleeper", tuning=NARROW) as stream:
        digest.add(next(stream))

        def stopped():
            value = now(system, extraction)
            return value if value.state is ExtractionState.WAITING else None

        waiting = eventually(stopped, "the forward pass waits")
        time.sleep(1.0)  # Long enough for a thousand forward passes.
        later = now(system, extraction)

        assert [status.reader for status in waiting.waiting_for] == ["the-sleeper"]
        assert later.n_rows == waiting.n_rows
        assert later.state is ExtractionState.WAITING
        assert later.n_rows - later.waiting_for[0].next_row <= WINDOW_BYTES // ROW_BYTES
        assert row_bytes_on_disk(extraction.path) <= WINDOW_BYTES
        assert later.rows_per_s == 0.0

        for chunk in stream:  # The reader wakes up, and no row is missing.
            digest.add(chunk)
    watching.join(PATIENCE_S)

    told = [value for value in seen if value.state is ExtractionState.WAITING]
    assert {status.reader for value in told for status in value.waiting_for} == {"the-sleeper"}
    assert seen[-1].state is ExtractionState.DONE
    assert digest.n_rows == seen[-1].n_rows > 3 * WINDOW_BYTES // ROW_BYTES
    assert digest.value == read_retained(system)


def watch_into(seen, system, extraction):
    for event in system.client.extractions.watch(extraction.id, deadline_s=PATIENCE_S):
        seen.append(event.extraction)


def read_retained(system):
    retained = system.client.extractions.start(MODEL, system.variant(DOCUMENTS), HOOKPOINT, recipe=FAST)
    return read(system.client, retained)


def test_the_slowest_of_two_readers_is_waited_for_and_both_get_every_row(system):
    extraction = start(system)
    digests = {}

    def quick():
        with system.connect().chunks(extraction, columns_of(extraction), reader="quick", tuning=NARROW) as stream:
            digests["quick"] = total = Digest()
            for chunk in stream:
                total.add(chunk)

    digests["slow"] = Digest()
    with system.client.chunks(extraction, columns_of(extraction), reader="slow", tuning=NARROW) as stream:
        digests["slow"].add(next(stream))
        reading = threading.Thread(target=quick)
        reading.start()
        waited_for = eventually(
            lambda: [
                value.waiting_for
                for value in [now(system, extraction)]
                if value.state is ExtractionState.WAITING and len(value.readers) == 2 and len(value.waiting_for) == 1
            ],
            "the forward pass waits for one of two",
        )
        for chunk in stream:
            digests["slow"].add(chunk)
    reading.join(PATIENCE_S)

    assert [status.reader for status in waited_for[0]] == ["slow"]
    assert digests["slow"].value == digests["quick"].value


def test_a_client_that_dies_frees_everything_it_held(system, reader_process):
    extraction = start(system, reader_grace_s=5.0)
    folder = Path(extraction.path)
    reader = reader_process(extraction)
    reader.read_some()
    eventually(lambda: now(system, extraction).state is ExtractionState.WAITING, "the forward pass waits")
    assert [residency.n_leases for residency in system.client.residencies.list(model=MODEL)] == [1]
    assert system.extractor.metric("headrace_streams_open", method=STREAM) == 1
    assert folder.exists()

    reader.kill()

    eventually(lambda: system.extractor.metric("headrace_streams_open", method=STREAM) == 0, "the stream is gone")
    ended = eventually(lambda: [v for v in [now(system, extraction)] if v.ended], "the extraction ends")[0]
    assert (ended.state, ended.failure.reason) == (ExtractionState.FAILED, "READER_STALLED")
    assert ended.readers == ()
    eventually(lambda: not folder.exists(), "the window is gone")
    eventually(lambda: system.client.residencies.list(model=MODEL)[0].n_leases == 0, "the lease is back")
    with pytest.raises((errors.ReaderStalled, errors.RowsExpired)):
        read(system.client, extraction)


def test_a_client_that_died_may_come_back_at_its_row_within_the_grace(system, reader_process):
    extraction = start(system)
    digest = Digest()
    with system.client.chunks(extraction, columns_of(extraction), tuning=NARROW) as stream:
        while digest.n_rows < 3000:
            digest.add(next(stream))
    reader = reader_process(extraction, digest.n_rows)
    assert reader.read_some() > digest.n_rows
    reader.kill()

    # It had released no row. A new reader of its name takes its place: the forward pass waits for the new one only.
    again = {"start_row": digest.n_rows, "reader": "the-trainer"}
    with system.client.chunks(extraction, columns_of(extraction), **again, tuning=NARROW) as stream:
        for chunk in stream:
            digest.add(chunk)

    assert digest.value == read_retained(system)


def test_a_pull_that_is_killed_goes_on_without_a_gap(system, tmp_path):
    extraction = start(system)
    out = tmp_path / "rows"
    command = [sys.executable, "-m", "headrace_cli", "--registry", system.registry.address]
    command += ["pull", extraction.id, "--out", str(out)]
    environment = {**os.environ, "HEADRACE_TOKEN": system.token}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as first:
        eventually(lambda: next_row_of(out), "rows are on disk")
        first.kill()
    at_kill = next_row_of(out)

    subprocess.run(command, env=environment, check=True, timeout=PATIENCE_S, capture_output=True)

    n_rows = now(system, extraction).n_rows
    digest = Digest()
    columns = {name: np.fromfile(out / f"{name}.safetensors", np.uint8, offset=4096) for name in columns_of(extraction)}
    digest.add(SimpleNamespace(first_row=0, end_row=n_rows, arrays=columns))
    assert 0 < at_kill < n_rows
    assert digest.value == read_retained(system)


def next_row_of(out):
    return json.loads((out / "pull.json").read_text())["next_row"] if (out / "pull.json").exists() else 0


class ReaderProcess:
    """A client in its own process, which reads one chunk and then no more."""

    def __init__(self, system, extraction, start_row):
        arguments = [system.registry.address, system.token, extraction.id, str(start_row)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )

    def read_some(self):
        """Waits for the chunk; returns the row after it."""
        return int(self._process.stdout.readline())

    def kill(self):
        self._process.kill()
        self._process.wait(10)
        self._process.stdout.close()


READER = """
import sys, time
from headrace_client import HeadraceClient, StreamTuning

registry, token, extraction, start_row = sys.argv[1:]
client = HeadraceClient.connect(registry, token=token)
place = {"start_row": int(start_row), "reader": "the-trainer"}
stream = client.chunks(extraction, **place, tuning=StreamTuning(queue_bytes=65536, chunk_bytes=8192))
next(stream)
print(stream.next_row, flush=True)
time.sleep(300)
"""


@pytest.fixture
def reader_process(system):
    readers = []

    def start(extraction, start_row=0):
        readers.append(ReaderProcess(system, extraction, start_row))
        return readers[-1]

    yield start
    for reader in readers:
        reader.kill()
