import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from headrace_log import index as index_module
from headrace_log import retention
from headrace_log.errors import DiskFull, RowsExpired, SetCorrupt
from headrace_log.index import SegmentIndex
from headrace_log.layout import PROVENANCE, ColumnSpec, Dtype, open_segment_path, segment_path
from headrace_log.manifest import Manifest, segment_rows_for, set_id_of
from headrace_log.reader import SetReader
from headrace_log.segment import DATA_OFFSET, header_bytes
from headrace_log.segment_file import file_digest
from headrace_log.writer import SetWriter

HOOK = ColumnSpec(name="blocks.1.hook_resid_post", dtype=Dtype.FLOAT32, width=5)
HALF = ColumnSpec(name="blocks.2.hook_resid_post", dtype=Dtype.FLOAT16, width=3)
COLUMNS = (*PROVENANCE, HOOK, HALF)


def make_set(folder, *, segment_rows=10, columns=COLUMNS):
    Manifest(set_id="s", identity={"a": 1}, columns=columns, segment_rows=segment_rows).save(folder)
    return folder


def row_bytes_of(column, row):
    """Deterministic content of one row."""
    return bytes((row * 7 + i + len(column.name)) % 251 for i in range(column.row_bytes))


def write_rows(writer, n_rows, *, step=4, columns=COLUMNS):
    end = writer.next_row + n_rows
    while writer.next_row < end:
        reservation = writer.reserve(min(step, end - writer.next_row))
        for column in columns:
            rows = range(writer.next_row, writer.next_row + reservation.n_rows)
            reservation.columns[column.name][:] = b"".join(row_bytes_of(column, row) for row in rows)
        writer.commit(reservation.n_rows, {"row": writer.next_row + reservation.n_rows})


def read_all(reader, end_row, *, start=0, step=7):
    content = {column.name: b"" for column in reader.columns}
    row = start
    while row < end_row:
        run = reader.read(row, step, end_row=end_row)
        for column, view in zip(reader.columns, run.columns, strict=True):
            content[column.name] += bytes(view)
        row = run.end_row
    return content


def expected(columns, start, end):
    return {c.name: b"".join(row_bytes_of(c, row) for row in range(start, end)) for c in columns}


def names(columns=COLUMNS):
    return [column.name for column in columns]


def test_rows_come_back_as_they_were_written(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 37)
        writer.finish()

    reader = SetReader(tmp_path, names())

    assert read_all(reader, 37) == expected(COLUMNS, 0, 37)
    assert Manifest.load(tmp_path).total_rows == 37


def test_committed_rows_are_readable_while_the_segment_is_open(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        reader = SetReader(tmp_path, names())
        write_rows(writer, 3)

        assert read_all(reader, 3) == expected(COLUMNS, 0, 3)

        write_rows(writer, 40)
        assert read_all(reader, 43, start=3) == expected(COLUMNS, 3, 43)


@settings(max_examples=25, deadline=None)
@given(
    segment_rows=st.integers(1, 12),
    steps=st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=8),
    read_step=st.integers(1, 20),
)
def test_any_interleaving_of_writing_sealing_and_reading_gives_the_same_rows(
    tmp_path_factory, segment_rows, steps, read_step
):
    folder = make_set(tmp_path_factory.mktemp("set"), segment_rows=segment_rows)
    reader, seen = SetReader(folder, names()), dict.fromkeys(names(), b"")
    with SetWriter.open(folder) as writer:
        for n_rows, seal in steps:
            before = writer.next_row
            write_rows(writer, n_rows)
            if seal:
                writer.seal()
                writer.settle()
            for name, content in read_all(reader, writer.next_row, start=before, step=read_step).items():
                seen[name] += content

    assert seen == expected(COLUMNS, 0, sum(n for n, _ in steps))


def test_sealed_files_are_plain_safetensors_bit_for_bit(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 14)
        writer.finish()

    full = load_file(segment_path(tmp_path, HOOK, 0))[HOOK.name]
    short = load_file(segment_path(tmp_path, HALF, 1))[HALF.name]
    tokens = load_file(segment_path(tmp_path, PROVENANCE[0], 1))["token_id"]

    assert (full.shape, full.dtype) == ((10, 5), np.float32)
    assert (short.shape, short.dtype) == ((4, 3), np.float16)
    assert (tokens.shape, tokens.dtype) == ((4,), np.int32)
    assert full.tobytes() == expected([HOOK], 0, 10)[HOOK.name]
    assert short.tobytes() == expected([HALF], 10, 14)[HALF.name]


@pytest.mark.parametrize("dtype", [Dtype.BFLOAT16, Dtype.FLOAT8_E4M3, Dtype.INT8])
def test_other_dtypes_open_with_torch(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    scale = ColumnSpec(name="x.scale", dtype=Dtype.FLOAT32, width=1)
    column = ColumnSpec(name="x", dtype=dtype, width=4, scale_column="x.scale" if dtype.itemsize == 1 else None)
    columns = (*PROVENANCE, column, scale)
    with SetWriter.open(make_set(tmp_path, columns=columns)) as writer:
        write_rows(writer, 10, columns=columns)

    tensor = safetensors_torch.load_file(segment_path(tmp_path, column, 0))["x"]

    assert tensor.shape == (10, 4)
    assert tensor.view(torch.uint8).numpy().tobytes() == expected([column], 0, 10)["x"]
    assert Manifest.load(tmp_path).column("x") == column


def test_data_start_on_a_page_boundary(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 10)

    raw = segment_path(tmp_path, HOOK, 0).read_bytes()

    assert 8 + int.from_bytes(raw[:8], "little") == DATA_OFFSET == 4096


def test_recorded_digests_are_those_of_the_files(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 25)
        writer.finish()

    records = SegmentIndex.load(tmp_path).records

    assert [(r.first_row, r.n_rows) for r in records] == [(0, 10), (10, 10), (20, 5)]
    for record in records:
        for column in COLUMNS:
            assert file_digest(segment_path(tmp_path, column, record.segment)) == record.digests[column.name]


def test_an_index_parses_only_what_was_recorded_since(tmp_path, monkeypatch):
    parse, parsed = index_module._parse, []
    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 30)
        writer.settle()
        known = SegmentIndex.load(tmp_path)
        monkeypatch.setattr(index_module, "_parse", lambda *args: (parsed.append(args), parse(*args))[1])

        assert known.refreshed(tmp_path) is known
        write_rows(writer, 10)
        writer.finish()
        with (tmp_path / "segments.jsonl").open("ab") as file:
            file.write(b'{"segment": 4, "first')
        again = known.refreshed(tmp_path)

    assert len(parsed) == 1
    assert (again.n_rows(names()), again.n_rows(names(), known_rows=30)) == (40, 40)
    assert again == SegmentIndex.load(tmp_path)
    assert again.refreshed(tmp_path) is again


def test_writer_goes_on_behind_the_last_sealed_segment(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 26)
    assert not list(tmp_path.rglob("*.open"))

    with SetWriter.open(tmp_path) as writer:
        assert writer.next_row == 20
        assert writer.resume == {"row": 20}
        write_rows(writer, 6)
        writer.finish()

    assert read_all(SetReader(tmp_path, names()), 26) == expected(COLUMNS, 0, 26)


def test_a_new_set_has_no_resume_point(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        assert (writer.next_row, writer.resume) == (0, None)


def test_columns_can_be_added_to_rows_that_exist(tmp_path):
    make_set(tmp_path, columns=(*PROVENANCE, HOOK))
    with SetWriter.open(tmp_path) as writer:
        write_rows(writer, 13, columns=(*PROVENANCE, HOOK))
        writer.finish()
    Manifest.load(tmp_path).with_columns([HALF]).save(tmp_path)

    with SetWriter.open(tmp_path, [HALF.name]) as writer:
        assert writer.next_row == 0
        write_rows(writer, 13, columns=[HALF])
        writer.finish()

    assert SegmentIndex.load(tmp_path).n_rows(names()) == 13
    assert read_all(SetReader(tmp_path, names()), 13) == expected(COLUMNS, 0, 13)


def test_segments_renamed_but_not_recorded_are_written_again(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 20)
    lines = (tmp_path / "segments.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "segments.jsonl").write_bytes(lines[0] + lines[1][:17])

    with SetWriter.open(tmp_path) as writer:
        assert writer.next_row == 10
        assert not segment_path(tmp_path, HOOK, 1).exists()
        write_rows(writer, 10)

    assert read_all(SetReader(tmp_path, names()), 20) == expected(COLUMNS, 0, 20)


WRITER_PROGRAM = """
    import sys
    from pathlib import Path
    sys.path[:0] = {path!r}
    from test_log import COLUMNS, write_rows
    from headrace_log.writer import SetWriter
    with SetWriter.open(Path(sys.argv[1])) as writer:
        while writer.next_row < 3000:
            write_rows(writer, 1)
            print(writer.next_row, flush=True)
        writer.finish()
"""


@pytest.mark.parametrize("kill_at", [1, 9, 10, 11, 30, 95, 250])
def test_kill_at_any_point_leaves_a_set_that_opens_and_can_be_finished(tmp_path, kill_at):
    folder = make_set(tmp_path / "set")
    program = textwrap.dedent(WRITER_PROGRAM.format(path=[str(Path(__file__).parent), *sys.path]))
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE)
    for line in process.stdout:
        if int(line) == kill_at:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    process.wait(10)

    with SetWriter.open(folder) as writer:
        assert writer.next_row % 10 == 0
        sealed = writer.next_row
        assert read_all(SetReader(folder, names()), sealed) == expected(COLUMNS, 0, sealed)
        write_rows(writer, kill_at + 20 - sealed if sealed < kill_at + 20 else 5)
        writer.finish()
        end = writer.next_row
    assert read_all(SetReader(folder, names()), end) == expected(COLUMNS, 0, end)


def test_reader_survives_the_death_of_a_writer(tmp_path):
    make_set(tmp_path)
    writer = SetWriter.open(tmp_path)
    reader = SetReader(tmp_path, names())
    write_rows(writer, 15)
    assert read_all(reader, 15) == expected(COLUMNS, 0, 15)
    writer.close()  # Gives up rows 10 to 14.

    with SetWriter.open(tmp_path) as second:
        reader.forget_files()
        write_rows(second, 9)
        assert read_all(reader, 19, start=12) == expected(COLUMNS, 12, 19)


def open_files(folder):
    links = (path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    return [str(link) for link in links if str(folder) in str(link)]


@pytest.mark.parametrize(("keep", "n_found_again"), [(1, 0), (2, 1), (3, 3)])
def test_a_reader_going_back_and_forth_keeps_some_segments_open(tmp_path, keep, n_found_again):
    folder = make_set(tmp_path)
    with SetWriter.open(folder) as writer:
        write_rows(writer, 50)
    reader = SetReader(folder, [HOOK.name, HALF.name], keep_segments=keep)
    at_first = {row: read_all(reader, row + 3, start=row) for row in (40, 3, 12, 33, 20)}
    n_open = len(open_files(folder))
    before = list(reader._opened.values())
    again = {row: read_all(reader, row + 3, start=row) for row in (20, 33, 12)}
    found_again = [files for files in before if any(files is other for other in reader._opened.values())]
    del before
    reader.close()

    assert at_first[40] == expected([HOOK, HALF], 40, 43)
    assert all(again[row] == at_first[row] == expected([HOOK, HALF], row, row + 3) for row in again)
    assert n_open == 2 * keep
    assert len(found_again) == n_found_again
    del found_again
    assert not open_files(folder)


def test_memory_of_runs_is_used_again_once_no_view_of_it_is_left(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 50)
    reader = SetReader(tmp_path, [HOOK.name, HALF.name])

    kept = [reader.read(row, 5, end_row=50) for row in (0, 5)]
    views = [np.frombuffer(run.columns[0], np.uint8) for run in kept]
    del kept
    addresses = {views[0].ctypes.data, views[1].ctypes.data}
    assert all(bytes(view) == expected([HOOK], 5 * at, 5 * at + 5)[HOOK.name] for at, view in enumerate(views))
    for row in (10, 15, 20):
        fresh = np.frombuffer(reader.read(row, 5, end_row=50).columns[0], np.uint8)
        assert fresh.ctypes.data not in addresses
        assert bytes(views[0]) == expected([HOOK], 0, 5)[HOOK.name]
    del views, fresh
    for row in (25, 30, 35):
        again = np.frombuffer(reader.read(row, 5, end_row=50).columns[0], np.uint8)
    assert len(reader._blocks._free) <= 3
    assert bytes(again) == expected([HOOK], 35, 40)[HOOK.name]


def test_dropping_a_window_removes_whole_segments_only(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 35)
        writer.settle()

        assert retention.drop_before(tmp_path, 25, SegmentIndex.load(tmp_path)) == 20
        assert retention.drop_before(tmp_path, 25, SegmentIndex.load(tmp_path)) == 20

        reader = SetReader(tmp_path, names())
        assert not segment_path(tmp_path, HOOK, 1).exists()
        with pytest.raises(RowsExpired) as caught:
            reader.read(19, 1, end_row=35)
        assert caught.value.first_available_row == 20
        assert read_all(reader, 35, start=20) == expected(COLUMNS, 20, 35)


def test_a_writer_goes_on_in_a_window_whose_segments_are_gone(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 30)
    retention.drop_before(tmp_path, 30, SegmentIndex.load(tmp_path))

    with SetWriter.open(tmp_path) as writer:
        assert (writer.next_row, writer.resume) == (30, {"row": 30})


def test_missing_segment_is_corruption_with_a_remedy(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 10)
    segment_path(tmp_path, HOOK, 0).unlink()

    with pytest.raises(SetCorrupt, match="start the extraction again"):
        SetReader(tmp_path, names()).read(0, 1, end_row=10)


def test_truncated_segment_is_corruption_instead_of_a_crash(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 10)
    os.truncate(segment_path(tmp_path, HOOK, 0), 4100)

    with pytest.raises(SetCorrupt, match="cut short"):
        SetReader(tmp_path, names()).read(0, 1, end_row=10)


def test_full_disk_is_an_error_before_any_row_is_written(tmp_path, monkeypatch):
    def no_space(fd, offset, size):
        raise OSError(28, "No space left on device")

    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 10)
        monkeypatch.setattr(os, "posix_fallocate", no_space)

        with pytest.raises(DiskFull) as caught:
            writer.reserve(1)

        monkeypatch.undo()
        assert caught.value.required_bytes > DATA_OFFSET
        assert not open_segment_path(tmp_path, PROVENANCE[0], 1).exists()
        write_rows(writer, 10)
    assert read_all(SetReader(tmp_path, names()), 20) == expected(COLUMNS, 0, 20)


def test_set_id_depends_on_content_not_on_order():
    assert set_id_of({"a": 1, "b": {"c": 2}}) == set_id_of({"b": {"c": 2}, "a": 1})
    assert set_id_of({"a": 1}) != set_id_of({"a": 2})


def test_segment_rows_fill_the_segment_size():
    rows = segment_rows_for(COLUMNS, 1000)

    assert rows * sum(c.row_bytes for c in COLUMNS) <= 1000 < (rows + 1) * sum(c.row_bytes for c in COLUMNS)
    assert segment_rows_for(COLUMNS, 1) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', json.dumps({"format": 1, "set_id": "x"})])
def test_foreign_manifest_is_corrupt(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)

    with pytest.raises(SetCorrupt):
        Manifest.load(tmp_path)


def test_deleted_set_leaves_nothing(tmp_path):
    folder = make_set(tmp_path / "set")
    with SetWriter.open(folder) as writer:
        write_rows(writer, 25)
        assert retention.size_bytes(folder) > 25 * sum(c.row_bytes for c in COLUMNS)

    retention.delete_set(folder)

    assert not folder.exists()


def test_golden_segment_header():
    text = (
        b'{"__metadata__":{"format":"headrace","first_row":"20"},'
        b'"blocks.1.hook_resid_post":{"dtype":"F32","shape":[4,5],"data_offsets":[0,80]}}'
    )

    assert header_bytes(HOOK, first_row=20, n_rows=4) == (4088).to_bytes(8, "little") + text + b" " * (4088 - len(text))


def test_a_segment_of_other_columns_is_sealed_whole_or_not_at_all(tmp_path):
    make_set(tmp_path, columns=(*PROVENANCE, HOOK))
    with SetWriter.open(tmp_path) as writer:
        write_rows(writer, 20, columns=(*PROVENANCE, HOOK))
    Manifest.update(tmp_path, lambda manifest: manifest.with_columns([HALF]))

    with SetWriter.open(tmp_path, [HALF.name]) as writer:
        write_rows(writer, 14, columns=[HALF])
        writer.seal()
        assert writer.next_row == 10

    assert SegmentIndex.load(tmp_path).n_rows(names()) == 10
    with SetWriter.open(tmp_path, [HALF.name]) as writer:
        write_rows(writer, 10, columns=[HALF])
    assert read_all(SetReader(tmp_path, names()), 20) == expected(COLUMNS, 0, 20)


def test_what_vanishes_while_a_set_is_counted_counts_no_more(tmp_path):
    (tmp_path / "column").mkdir()
    (tmp_path / "column" / "00000000.safetensors").write_bytes(b"12345")
    (tmp_path / "column" / "00000001.safetensors.open").write_bytes(b"123")
    (tmp_path / "column" / "gone").symlink_to(
        tmp_path / "nothing"
    )  # Listed by the folder, but absent when its size is read.

    assert retention.sizes(tmp_path) == (5, 3)
    assert retention.sizes(tmp_path / "never") == (0, 0)


SHUFFLED_READER = """
import resource, sys
from pathlib import Path
from headrace_log.errors import TooManyFiles
from headrace_log.reader import KEPT_SEGMENTS, SetReader

resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
reader = SetReader(Path(sys.argv[1]), sys.argv[2:], keep_segments=KEPT_SEGMENTS)
n_read = 0
try:
    while True:
        n_read += reader.read(n_read, 10, end_row=200).n_rows
except TooManyFiles as exc:
    print(n_read, exc.max_files, exc)
reader.close()
print(bytes(reader.read(190, 10, end_row=200).columns[0]).hex())
"""


def test_a_reader_without_a_descriptor_left_says_so_and_lets_go_of_those_it_has(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write_rows(writer, 200, step=10)
        writer.finish()

    command = [sys.executable, "-c", SHUFFLED_READER, str(tmp_path), *names()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)

    refused, rest = done.stdout.splitlines()
    n_read, max_files, *_ = refused.split()
    assert 0 < int(n_read) < 16 * 10
    assert max_files == "40"
    assert "ulimit -n" in refused
    assert rest == expected(COLUMNS, 190, 200)[names()[0]].hex()
