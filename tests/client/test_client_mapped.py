"""Rows from the set's files where this process sees them; from messages where it does not."""

import errno
import fcntl
import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT, SECOND, Fault
from headrace_client import Backoff, Reading, StreamTuning, errors
from headrace_client.values import PLAIN
from headrace_log.holding import HOLD_NAME
from headrace_log.layout import PROVENANCE, ColumnSpec, Dtype
from headrace_log.manifest import Manifest
from headrace_log.writer import SetWriter

COLUMNS = ["token_id", HOOKPOINT, SECOND]
FAST = StreamTuning(backoff=Backoff(first_s=0.01, most_s=0.05))
INLINE = replace(FAST, transport="inline")
MAPPED = replace(FAST, transport="mapped")


@pytest.fixture
def folder(tmp_path, scripted_extractor):
    """The scripted extractor's rows in segments of 150."""
    hookpoints = [
        ColumnSpec(name=name, dtype=Dtype.FLOAT32, width=scripted_extractor.d) for name in (HOOKPOINT, SECOND)
    ]
    manifest = Manifest(set_id="set-1", identity={}, columns=(*PROVENANCE, *hookpoints), segment_rows=150)
    manifest.save(tmp_path)
    rows = {column.name: scripted_extractor.column(column.name) for column in manifest.columns}
    with SetWriter.open(tmp_path) as writer:
        while writer.next_row < scripted_extractor.n_rows:
            row = writer.next_row
            reserved = writer.reserve(scripted_extractor.n_rows - row)
            for name, view in reserved.columns.items():
                view[:] = np.ascontiguousarray(rows[name][row : row + reserved.n_rows]).tobytes()
            writer.commit(reserved.n_rows, {})
        writer.finish()
    (tmp_path / "nonce").write_text(scripted_extractor.nonce)
    scripted_extractor.folder = tmp_path
    scripted_extractor.extraction.path = str(tmp_path)
    return tmp_path


def eventually(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def read(client, tuning=FAST, reading=PLAIN):
    with client.chunks(EXTRACTION_ID, COLUMNS, reading=reading, tuning=tuning) as stream:
        got = {name: [] for name in COLUMNS}
        mapped = []
        for chunk in stream:
            mapped.append(stream.progress().mapped)
            for name in COLUMNS:
                got[name].append(chunk.array(name).copy())
    return {name: np.concatenate(parts) for name, parts in got.items()}, mapped


def transports(scripted_extractor):
    return [request.transport for request in scripted_extractor.calls["StreamActivations"]]


@pytest.mark.parametrize("rows_per_chunk", [64, 1000])
@pytest.mark.parametrize("reading", [Reading(), Reading(order="shuffled", seed=3, block_rows=100)])
def test_mapped_rows_are_those_of_the_messages(client, scripted_extractor, folder, rows_per_chunk, reading):
    scripted_extractor.rows_per_chunk = rows_per_chunk

    inline, _ = read(client, INLINE, reading)
    mapped, _ = read(client, MAPPED, reading)

    assert transports(scripted_extractor) == [0, 2]
    for name in COLUMNS:
        assert mapped[name].tobytes() == inline[name].tobytes()


def test_rows_are_mapped_by_themselves_where_the_folder_is(client, scripted_extractor, folder):
    got, _ = read(client)

    assert transports(scripted_extractor) == [2]
    np.testing.assert_array_equal(got["token_id"], scripted_extractor.column("token_id"))


def test_a_client_elsewhere_does_not_even_ask(client, scripted_extractor, folder):
    scripted_extractor.extraction.path = "/nowhere/to/be/seen"

    read(client)

    assert transports(scripted_extractor) == [0]


def other_nonce(folder, extractor):
    (folder / "nonce").write_text("another server's")


def no_nonce(folder, extractor):
    (folder / "nonce").unlink()


def no_segment(folder, extractor):
    (folder / HOOKPOINT / "float32" / "00000003.safetensors").unlink()


def empty_segment(folder, extractor):
    (folder / HOOKPOINT / "float32" / "00000003.safetensors").write_bytes(b"")


def no_index(folder, extractor):
    (folder / "segments.jsonl").unlink()


def no_column(folder, extractor):
    manifest = Manifest.load(folder)
    Manifest.save(manifest.__class__(**{**asdict(manifest), "columns": manifest.columns[:-1]}), folder)


def other_width(folder, extractor):
    manifest = Manifest.load(folder)
    narrow = tuple(replace(column, width=4) if column.width == 8 else column for column in manifest.columns)
    replace(manifest, columns=narrow).save(folder)


HARM = pytest.mark.parametrize(
    "harm", [other_nonce, no_nonce, no_segment, empty_segment, no_index, no_column, other_width]
)


def asdict(manifest):
    return {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}


@HARM
def test_what_does_not_fit_goes_inline_without_gap_or_duplicate(client, scripted_extractor, folder, harm):
    harm(folder, scripted_extractor)

    got, _ = read(client)

    for name in COLUMNS:
        np.testing.assert_array_equal(got[name], scripted_extractor.column(name))
    assert transports(scripted_extractor) == [2, 0]


@HARM
def test_who_insists_on_files_gets_a_typed_error(client, scripted_extractor, folder, harm):
    harm(folder, scripted_extractor)

    with pytest.raises(errors.FailedPrecondition) as caught:
        read(client, MAPPED)

    assert caught.value.reason == "NOT_MAPPABLE"
    assert "AUTO" in caught.value.remedy


def test_a_folder_that_can_not_be_locked_goes_inline(client, scripted_extractor, folder, monkeypatch):
    """As on NFS without a lock daemon."""
    (folder / HOLD_NAME).touch()

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)

    got, _ = read(client)

    np.testing.assert_array_equal(got[SECOND], scripted_extractor.column(SECOND))
    assert transports(scripted_extractor) == [2, 0]


def test_who_insists_where_the_server_can_not_gets_a_typed_error(client, scripted_extractor):
    with pytest.raises(errors.FailedPrecondition) as caught:
        read(client, MAPPED)

    assert caught.value.reason == "NOT_MAPPABLE"


def test_a_mapped_stream_survives_cuts(client, scripted_extractor, folder):
    scripted_extractor.faults.extend([Fault("cut", after=3), Fault("no_end", after=2), Fault("cut", after=0)])

    got, _ = read(client)

    np.testing.assert_array_equal(got[SECOND], scripted_extractor.column(SECOND))
    assert transports(scripted_extractor) == [2, 2, 2, 2]


def test_what_was_handed_out_outlives_the_stream_and_the_set(client, scripted_extractor, folder):
    with client.chunks(EXTRACTION_ID, HOOKPOINT, tuning=MAPPED) as stream:
        chunks = list(stream)

    shutil.rmtree(folder)

    got = np.concatenate([chunk.array(HOOKPOINT) for chunk in chunks])
    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT))
    with pytest.raises(ValueError, match="read-only"):
        chunks[0].array(HOOKPOINT)[0] = 0


@pytest.mark.parametrize("copy", [True, False])
def test_batches_of_mapped_rows_belong_to_the_caller(client, scripted_extractor, folder, copy):
    tuning = replace(MAPPED, copy=copy)
    with client.activations(EXTRACTION_ID, HOOKPOINT, batch_size=300, tuning=tuning) as stream:
        assert stream.header.mapped
        batches = []
        for batch in stream:
            batches.append(batch.clone())
            batch.fill_(-1)

    np.testing.assert_array_equal(np.concatenate(batches), scripted_extractor.column(HOOKPOINT))
    again, _ = read(client)
    np.testing.assert_array_equal(again[HOOKPOINT], scripted_extractor.column(HOOKPOINT))


@pytest.mark.parametrize(
    ("dtype", "copy", "same_memory"), [(None, False, True), (torch.float64, False, False), (None, True, False)]
)
def test_only_messages_that_need_no_conversion_are_not_copied(
    client, scripted_extractor, folder, dtype, copy, same_memory
):
    tuning = replace(INLINE, copy=copy)
    with client.activations(EXTRACTION_ID, HOOKPOINT, batch_size=20, dtype=dtype, tuning=tuning) as stream:
        first, second = next(stream), next(stream)

    behind = second.data_ptr() - first.data_ptr() == first.numel() * first.element_size()
    assert behind == same_memory


def test_rows_of_files_are_read_straight_into_the_batch(client, scripted_extractor, folder, monkeypatch):
    monkeypatch.setattr("headrace_log.reader._Blocks.views", None)  # Memory in between.
    with client.activations(EXTRACTION_ID, HOOKPOINT, batch_size=200, tuning=MAPPED) as stream:
        rows = torch.cat(list(stream)).numpy()

    np.testing.assert_array_equal(rows, scripted_extractor.column(HOOKPOINT))


def test_rows_of_files_that_have_shrunk_since_they_were_found_are_data_loss(client, scripted_extractor, folder):
    tuning = replace(MAPPED, queue_bytes=1 << 30)
    with client.activations(EXTRACTION_ID, HOOKPOINT, batch_size=20, tuning=tuning) as stream:
        next(stream)
        eventually(lambda: stream.progress().queued_bytes > 0)
        for file in (folder / HOOKPOINT / "float32").glob("*.safetensors"):
            os.truncate(file, 4100)
        with pytest.raises(errors.DigestMismatch) as caught:
            list(stream)

    assert caught.value.reason == "DIGEST_MISMATCH"
    assert "cut short" in caught.value.message
