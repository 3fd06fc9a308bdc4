"""One segment is sealed in the background while the next is written; nothing is sealed behind one that failed."""

import gc
import threading
from pathlib import Path

import numpy as np
import pytest

from headrace_log.index import SegmentIndex
from headrace_log.layout import OPEN_SUFFIX, PROVENANCE, ColumnSpec, Dtype
from headrace_log.manifest import Manifest
from headrace_log.reader import SetReader
from headrace_log.statistics import ColumnStatistics
from headrace_log.writer import SetWriter

HOOK = ColumnSpec(name="blocks.1.hook_resid_post", dtype=Dtype.FLOAT32, width=5)
SEGMENT_ROWS = 10
DEADLINE_S = 20


def open_files():
    return sorted(path for fd in Path("/proc/self/fd").iterdir() if (path := _target(fd)).endswith(OPEN_SUFFIX))


def _target(fd):
    try:
        return fd.readlink().as_posix().removesuffix(" (deleted)")
    except FileNotFoundError:
        return ""


class Sealing:
    """A `summarize` that holds a sealing until `go_on`, or lets it fail."""

    def __init__(self, *, fails=False):
        self.begun, self._go_on, self._fails = threading.Event(), threading.Event(), fails

    def __call__(self, column, rows, scales):
        self.begun.set()
        assert self._go_on.wait(DEADLINE_S), "held for good"
        if self._fails:
            raise OSError("the disk is gone")
        zeros = np.zeros(column.width)
        n_rows = rows.nbytes // column.row_bytes
        return ColumnStatistics(count=n_rows, mean=zeros, m2=zeros, mean_norm=0.0, mean_squared_norm=0.0)

    def go_on(self):
        self._go_on.set()


@pytest.fixture
def folder(tmp_path):
    Manifest(set_id="s", identity={}, columns=(*PROVENANCE, HOOK), segment_rows=SEGMENT_ROWS).save(tmp_path)
    return tmp_path


def write(writer, n_rows):
    end = writer.next_row + n_rows
    while writer.next_row < end:
        reservation = writer.reserve(end - writer.next_row)
        rows = np.arange(writer.next_row, writer.next_row + reservation.n_rows, dtype=np.float32)
        reservation.columns[HOOK.name][:] = np.repeat(rows, HOOK.width).tobytes()
        writer.commit(reservation.n_rows, {"row": writer.next_row + reservation.n_rows})


def read(folder, n_rows):
    reader, row, found = SetReader(folder, [HOOK.name]), 0, []
    while row < n_rows:
        run = reader.read(row, n_rows, end_row=n_rows)
        found += np.frombuffer(run.columns[0], np.float32)[:: HOOK.width].tolist()
        row = run.end_row
    return found


def test_rows_are_written_and_read_behind_a_segment_that_is_being_sealed(folder):
    sealing = Sealing()
    with SetWriter.open(folder, summarize=sealing) as writer:
        write(writer, SEGMENT_ROWS + 7)

        assert sealing.begun.wait(DEADLINE_S)
        assert not SegmentIndex.load(folder).records
        assert read(folder, SEGMENT_ROWS + 7) == list(range(SEGMENT_ROWS + 7))

        sealing.go_on()
        writer.finish()

    assert [record.n_rows for record in SegmentIndex.load(folder).records] == [SEGMENT_ROWS, 7]
    assert read(folder, SEGMENT_ROWS + 7) == list(range(SEGMENT_ROWS + 7))


def test_the_index_counts_values_that_are_not_finite(folder):
    with SetWriter.open(folder) as writer:
        for count in (2, 0, 3):
            reservation = writer.reserve(SEGMENT_ROWS // 2)
            writer.commit(reservation.n_rows, {}, {HOOK.name: count} if count else None)
        writer.seal()

    index = SegmentIndex.load(folder)
    assert [record.non_finite for record in index.records] == [{HOOK.name: 2}, {HOOK.name: 3}]
    assert index.n_non_finite([HOOK.name], SEGMENT_ROWS) == 2
    assert index.n_non_finite([HOOK.name], SEGMENT_ROWS + 1) == 5
    assert index.n_non_finite(["token_id"], SEGMENT_ROWS + 1) == 0
    with SetWriter.open(folder) as writer:
        assert writer.n_non_finite == 5


def test_a_segment_after_a_short_one_begins_when_that_is_recorded(folder):
    sealing = Sealing()
    with SetWriter.open(folder, summarize=sealing) as writer:
        write(writer, 3)
        writer.seal()
        threading.Timer(0.2, sealing.go_on).start()

        write(writer, 2)

        assert [record.n_rows for record in SegmentIndex.load(folder).records] == [3]
        assert read(folder, 5) == list(range(5))


def test_nothing_is_sealed_behind_a_segment_whose_sealing_failed(folder):
    sealing = Sealing(fails=True)
    with pytest.raises(OSError, match="the disk is gone"), SetWriter.open(folder, summarize=sealing) as writer:
        write(writer, SEGMENT_ROWS + 7)
        sealing.go_on()
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                writer.seal()

    assert not SegmentIndex.load(folder).records
    del writer
    gc.collect()
    assert not open_files()

    sealing = Sealing()
    sealing.go_on()
    with SetWriter.open(folder, summarize=sealing) as writer:
        assert writer.next_row == 0
        write(writer, SEGMENT_ROWS + 7)
        writer.finish()
    assert read(folder, SEGMENT_ROWS + 7) == list(range(SEGMENT_ROWS + 7))
