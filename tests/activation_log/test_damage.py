"""Damaged sets: what is found, what is set aside, and that the next writer makes the same bytes again."""

import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from headrace_log import repair
from headrace_log.errors import DigestMismatch, LockHeld, SetCorrupt
from headrace_log.index import SegmentIndex, dropped_rows, record_dropped
from headrace_log.layout import PROVENANCE, ColumnSpec, Dtype, segment_path
from headrace_log.locks import WRITER_LOCK_NAME, FileLock
from headrace_log.manifest import Manifest
from headrace_log.reader import SetReader
from headrace_log.segment import DATA_OFFSET
from headrace_log.segment_file import check_sealed
from headrace_log.statistics import ColumnStatistics, load_statistics, read_statistics, statistics_path
from headrace_log.writer import SetWriter

HOOK = ColumnSpec(name="blocks.1.hook_resid_post", dtype=Dtype.FLOAT32, width=5)
HALF = ColumnSpec(name="blocks.2.hook_resid_post", dtype=Dtype.FLOAT16, width=3)
COLUMNS = (*PROVENANCE, HOOK, HALF)
NAMES = [column.name for column in COLUMNS]


def summarize(column, rows, scales):
    values = np.frombuffer(rows, column.dtype.value).reshape(-1, column.width).astype(np.float64)
    mean = values.mean(axis=0)
    return ColumnStatistics(
        count=len(values), mean=mean, m2=((values - mean) ** 2).sum(axis=0), mean_norm=1.0, mean_squared_norm=1.0
    )


def row_bytes(column, row):
    dtype = {Dtype.FLOAT32: "<f4", Dtype.FLOAT16: "<f2", Dtype.INT32: "<i4"}[column.dtype]
    return np.array([row % 97 + 3 * at + len(column.name) for at in range(column.width)], dtype).tobytes()


def write(folder, end_row, columns=NAMES):
    """Writes the rows before `end_row` that the columns lack; returns the first row written."""
    with SetWriter.open(folder, columns, summarize) as writer:
        first = writer.next_row
        while writer.next_row < end_row:
            reservation = writer.reserve(min(4, end_row - writer.next_row))
            rows = range(writer.next_row, writer.next_row + reservation.n_rows)
            for column in COLUMNS:
                if column.name in columns:
                    reservation.columns[column.name][:] = b"".join(row_bytes(column, row) for row in rows)
            writer.commit(reservation.n_rows, {"row": rows.stop})
        writer.seal()
    return first


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.fixture
def folder(tmp_path):
    """A set of 47 rows in segments of 10, the last one short."""
    made = tmp_path / "set"
    Manifest(set_id="s", identity={}, columns=COLUMNS, segment_rows=10).save(made)
    write(made, 47)
    return made


def flip(path, at=DATA_OFFSET + 3):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def flip_data(path, folder):
    flip(path)


def flip_header(path, folder):
    flip(path, 40)


def truncate(path, folder):
    os.truncate(path, DATA_OFFSET + 8)


def empty(path, folder):
    path.write_bytes(b"")


def remove(path, folder):
    path.unlink()


def other_column(path, folder):
    shutil.copyfile(segment_path(folder, HALF, 2), path)


def other_segment(path, folder):
    shutil.copyfile(segment_path(folder, HOOK, 1), path)


def a_folder(path, folder):
    path.unlink()
    path.mkdir()


DAMAGES = [flip_data, flip_header, truncate, empty, remove, other_column, other_segment, a_folder]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("segment", [0, 2, 4])
def test_a_damaged_segment_is_found_and_computed_again_with_the_same_bytes(folder, damage, segment):
    before, statistics = contents(folder), load_statistics(folder, HOOK)
    record = SegmentIndex.load(folder).records[segment]
    damage(segment_path(folder, HOOK, segment), folder)

    with pytest.raises(DigestMismatch) as caught:
        check_sealed(folder, HOOK, record)
    assert (caught.value.column, caught.value.segment) == (HOOK.name, segment)
    assert (caught.value.first_row, caught.value.n_rows) == (record.first_row, record.n_rows)
    repair.set_aside(folder, {(segment, HOOK.name)})
    index = SegmentIndex.load(folder)
    assert index.n_rows([HOOK.name]) == record.first_row
    assert index.n_rows([HALF.name]) == 47
    assert index.hole_end(HOOK.name, record.first_row) == (record.end_row if segment < 4 else None)
    assert write(folder, record.end_row, [HOOK.name]) == record.first_row

    assert SegmentIndex.load(folder).n_rows(NAMES) == 47
    assert contents(folder) == before
    mended = load_statistics(folder, HOOK)
    assert (mended.count, mended.mean.tobytes(), mended.m2.tobytes()) == (
        47,
        statistics.mean.tobytes(),
        statistics.m2.tobytes(),
    )


def test_only_the_rows_of_holes_are_computed_again(folder):
    before = contents(folder)
    for segment in (1, 3):
        flip(segment_path(folder, HOOK, segment))
    repair.set_aside(folder, {(1, HOOK.name), (3, HOOK.name)})
    untouched = segment_path(folder, HOOK, 2).stat().st_mtime_ns

    index = SegmentIndex.load(folder)
    assert write(folder, index.hole_end(HOOK.name, 10), [HOOK.name]) == 10
    assert SegmentIndex.load(folder).n_rows([HOOK.name]) == 30
    assert write(folder, 40, [HOOK.name]) == 30

    assert SegmentIndex.load(folder).n_rows(NAMES) == 47
    assert contents(folder) == before
    assert segment_path(folder, HOOK, 2).stat().st_mtime_ns == untouched


def test_rows_are_added_behind_a_set_whose_hole_was_filled(folder):
    flip(segment_path(folder, HOOK, 1))
    repair.set_aside(folder, {(1, HOOK.name)})
    write(folder, 20, [HOOK.name])
    write(folder, 60)

    reader = SetReader(folder, [HOOK.name])
    rows = b"".join(bytes(reader.read(row, 1, end_row=60).columns[0]) for row in range(60))
    assert rows == b"".join(row_bytes(HOOK, row) for row in range(60))
    assert load_statistics(folder, HOOK).count == 60


def test_the_damaged_file_stays_beside_its_place_until_its_column_is_written(folder):
    path = segment_path(folder, HOOK, 2)
    flip(path)
    damaged = path.read_bytes()
    repair.set_aside(folder, {(2, HOOK.name)})

    assert not path.exists()
    assert path.with_name(path.name + ".damaged").read_bytes() == damaged
    write(folder, 30, [HOOK.name])
    assert not list(folder.rglob("*.damaged"))


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"segment": "2", "first_row": 20, "rows": 10, "sha256": {}, "resume": {}}',
        b'{"segment": 2, "first_row": 20, "rows": "10", "sha256": {}, "resume": {}}',
        b'{"segment": 2, "first_row": 20, "rows": -10, "sha256": {}, "resume": {}}',
        b'{"segment": 2, "first_row": 20, "rows": 10, "sha256": [], "resume": {}}',
        b'{"segment": 2, "first_row": 20, "rows": 10, "sha256": {"a": 1}, "resume": {}}',
        b'{"segment": 2, "first_row": 20, "rows": 10, "sha256": {}, "resume": 1}',
        b'{"segment": 2, "first_row": 21, "rows": 10, "sha256": {}, "resume": {}}',
        b"\xff\x00",
        b"",
    ],
)
def test_an_index_with_a_line_that_is_none_is_typed_cut_there_and_mended(folder, garbage):
    before, path = contents(folder), folder / "segments.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + garbage + b"\n" + lines[3] + lines[4])

    with pytest.raises(SetCorrupt, match="start the extraction again"):
        SegmentIndex.load(folder)
    repair.set_aside(folder, ())
    assert SegmentIndex.load(folder).n_rows(NAMES) == 20
    assert (folder / "segments.jsonl.damaged").exists()
    assert write(folder, 47) == 20

    assert SegmentIndex.load(folder).n_rows(NAMES) == 47
    assert contents(folder) == before
    assert load_statistics(folder, HOOK).count == 47


def test_a_record_whose_rows_all_files_contradict_is_itself_at_fault(folder):
    path = folder / "segments.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    last = json.loads(lines[4])
    del last["crc32"]  # As of an earlier version.
    path.write_bytes(b"".join(lines[:4]) + json.dumps(last | {"rows": 5}).encode() + b"\n")
    manifest, record = Manifest.load(folder), SegmentIndex.load(folder).records[4]

    with pytest.raises(DigestMismatch, match="which is not its size"):
        check_sealed(folder, HOOK, record)
    assert repair.is_misrecorded(folder, manifest, record)
    assert not repair.is_misrecorded(folder, manifest, SegmentIndex.load(folder).records[3])
    truncate(segment_path(folder, HOOK, 3), folder)
    assert not repair.is_misrecorded(folder, manifest, SegmentIndex.load(folder).records[3])


def test_a_reader_notices_that_the_index_was_replaced(folder):
    reader = SetReader(folder, [HOOK.name])
    assert reader.sealed_rows == 47
    repair.set_aside(folder, {(1, HOOK.name)})
    reader.refresh()
    assert reader.sealed_rows == 10
    write(folder, 20, [HOOK.name])
    reader.refresh()
    assert reader.sealed_rows == 47


def test_a_reader_notices_that_the_index_was_replaced_by_a_file_of_the_same_inode(folder):
    path = folder / "segments.jsonl"
    reader, index, whole = SetReader(folder, [HOOK.name]), SegmentIndex.load(folder), path.read_bytes()
    repair.set_aside(folder, {(1, HOOK.name)})
    write(folder, 67, [name for name in NAMES if name != HOOK.name])
    replaced = path.read_bytes()
    assert len(replaced) > len(whole)
    path.write_bytes(whole)
    reader.refresh()
    index = index.refreshed(folder)
    path.write_bytes(replaced)  # In place.

    reader.refresh()

    assert reader.sealed_rows == 10
    assert index.refreshed(folder).records == SegmentIndex.load(folder).records


def test_a_reader_forgets_a_file_that_was_damaged_under_it_once_its_rows_were_computed_again(folder):
    reader = SetReader(folder, [HOOK.name], keep_segments=16)
    whole = bytes(reader.read(10, 10, end_row=20).columns[0])
    with segment_path(folder, HOOK, 1).open("r+b") as file:  # In place: the reader's descriptor sees it too.
        file.seek(DATA_OFFSET)
        file.write(b"\xff" * 20)
    repair.set_aside(folder, {(1, HOOK.name)})
    write(folder, 20, [HOOK.name])

    reader.forget_replaced_files()

    assert bytes(reader.read(10, 10, end_row=20).columns[0]) == whole


def test_a_set_has_one_writer_and_no_repair_meanwhile(folder, monkeypatch):
    monkeypatch.setattr("headrace_log.writer._WRITER_WAIT_S", 0.1)
    with SetWriter.open(folder):
        with pytest.raises(LockHeld, match=str(os.getpid())):
            SetWriter.open(folder)
        with pytest.raises(LockHeld):
            repair.set_aside(folder, {(1, HOOK.name)})

    assert write(folder, 50) == 47


def test_a_writer_waits_for_one_that_is_about_to_end(folder):
    first = SetWriter.open(folder)
    ends = threading.Timer(0.3, first.close)
    ends.start()

    assert write(folder, 50) == 47
    ends.join()


def test_a_manifest_that_another_process_keeps_locked_is_an_error_in_the_end(folder, monkeypatch):
    monkeypatch.setattr("headrace_log.manifest._LOCK_WAIT_S", 0.1)
    with FileLock(folder / "manifest.lock"), pytest.raises(LockHeld, match=str(os.getpid())):
        Manifest.update(folder, lambda manifest: manifest)


def test_a_lock_ends_with_its_process(tmp_path):
    program = (
        "import os, sys, signal; from pathlib import Path; from headrace_log.locks import FileLock; "
        "lock = FileLock(Path(sys.argv[1])); print('held', flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / WRITER_LOCK_NAME)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    process.stdout.readline()
    with pytest.raises(LockHeld) as caught:
        FileLock(tmp_path / WRITER_LOCK_NAME)
    assert caught.value.holder == str(process.pid)
    process.kill()
    process.wait(10)
    process.stdout.close()

    FileLock(tmp_path / WRITER_LOCK_NAME).close()


@pytest.mark.parametrize("how", ["before it is opened", "while it is open"])
def test_a_file_that_shrinks_under_a_reader_is_an_error_and_ends_no_process(folder, how):
    program = (
        "import os, sys; from pathlib import Path; from headrace_log.errors import SetCorrupt; "
        "from headrace_log.reader import SetReader; folder, path, how = sys.argv[1:]; "
        "reader = SetReader(Path(folder), ['blocks.1.hook_resid_post']); "
        "reader.read(0, 1, end_row=47) if how == 'while it is open' else None; "
        "os.truncate(path, 4100)\n"
        "try: reader.read(0, 10, end_row=47)\n"
        "except SetCorrupt as exc: print(exc)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(segment_path(folder, HOOK, 0)), how],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )

    assert "is cut short; start the extraction again" in done.stdout


@pytest.mark.parametrize("content", ["", "{}", '{"first_row": "x"}', '{"first_row": -1}', "[]", "[" * 100_000])
def test_a_record_of_dropped_rows_that_is_none_is_typed(folder, content):
    (folder / "dropped.json").write_text(content)

    with pytest.raises(SetCorrupt, match="names no row"):
        SetReader(folder, NAMES)


def flips(content):
    """Each copy of `content` with one bit flipped."""
    for at in range(len(content)):
        for bit in range(8):
            yield content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def test_no_flipped_bit_of_a_manifest_passes_for_another_manifest(folder):
    path, manifest = folder / "manifest.json", Manifest.load(folder)
    whole = path.read_bytes()

    n_typed = 0
    for content in flips(whole):
        path.write_bytes(content)
        try:
            assert Manifest.load(folder) == manifest  # The bit was in the name of the check sum.
        except SetCorrupt:
            n_typed += 1

    assert n_typed > 8 * len(whole) - 8 * len("crc32")


def test_no_flipped_bit_of_a_record_passes_for_another_record(folder):
    path = folder / "segments.jsonl"
    first = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(first)
    index = SegmentIndex.load(folder)

    n_typed = 0
    for content in flips(first[:-1]):
        path.write_bytes(content + b"\n")
        try:
            assert SegmentIndex.load(folder).records == index.records
        except SetCorrupt:
            n_typed += 1

    assert n_typed > 8 * len(first) - 8 * len(',"crc32":') - 8


def test_no_flipped_bit_of_a_record_of_dropped_rows_passes_for_another_one(folder):
    record_dropped(folder, 20)
    path = folder / "dropped.json"
    whole = path.read_bytes()

    n_typed = 0
    for content in flips(whole):
        path.write_bytes(content)
        try:
            assert dropped_rows(folder) == 20
        except SetCorrupt:
            n_typed += 1

    assert n_typed > 8 * len(whole) - 8 * len("crc32") - 8


def test_no_flipped_bit_of_a_statistics_file_passes_for_other_statistics(folder):
    path = statistics_path(folder, HOOK, 4)
    due = load_statistics(folder, HOOK)

    n_unread = 0
    for content in flips(path.read_bytes()):
        path.write_bytes(content)
        found = read_statistics(path, HOOK)
        n_unread += found is None
        same = found is None or (
            (found.count, found.mean_norm, found.mean_squared_norm) == (due.count, due.mean_norm, due.mean_squared_norm)
            and np.array_equal(found.mean, due.mean)
            and np.array_equal(found.m2, due.m2)
        )
        assert same

    assert n_unread > 8 * 2 * due.mean.nbytes


def test_files_of_an_earlier_version_have_no_check_sums(folder):
    manifest, index = Manifest.load(folder), SegmentIndex.load(folder)
    document = json.loads((folder / "manifest.json").read_bytes())
    del document["crc32"]
    (folder / "manifest.json").write_text(json.dumps(document))
    lines = [json.loads(line) for line in (folder / "segments.jsonl").read_bytes().splitlines()]
    for line in lines:
        del line["crc32"]
    (folder / "segments.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "dropped.json").write_text('{"first_row": 10}')

    assert dropped_rows(folder) == 10
    assert Manifest.load(folder) == manifest
    assert SegmentIndex.load(folder).records == index.records


@pytest.mark.parametrize("name", ["segments.jsonl", "dropped.json"])
def test_a_folder_in_the_place_of_an_index_or_a_record_of_dropped_rows_is_typed(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()

    with pytest.raises(SetCorrupt, match=f"{name} can't be read"):
        SetReader(folder, NAMES)


def test_a_folder_in_the_place_of_a_manifest_is_typed(folder):
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()

    with pytest.raises(SetCorrupt, match=r"manifest\.json can't be read"):
        Manifest.load(folder)
