"""Statistics cover all sealed rows, however the rows were cut into segments and runs."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from headrace_log import retention
from headrace_log.index import SegmentIndex
from headrace_log.layout import PROVENANCE, ColumnSpec, Dtype
from headrace_log.manifest import Manifest
from headrace_log.statistics import ColumnStatistics, load_statistics, statistics_path
from headrace_log.writer import SetWriter

HOOK = ColumnSpec(name="blocks.1.hook_resid_post", dtype=Dtype.FLOAT32, width=5)
OTHER = ColumnSpec(name="blocks.2.hook_resid_post", dtype=Dtype.FLOAT32, width=3)
COLUMNS = (*PROVENANCE, HOOK, OTHER)


def rows_of(column, first, end):
    """Rows as numbers: a function of column and row alone."""
    return np.stack(
        [np.random.default_rng([column.width, row]).normal(3, 2, column.width) for row in range(first, end)]
    )


def summarize(column, rows, scales):
    return statistics_of(np.frombuffer(rows, np.float32).reshape(-1, column.width))


def statistics_of(rows):
    rows = rows.astype(np.float64)
    norms = np.sqrt((rows**2).sum(1))
    deviations = rows - rows.mean(0)
    return ColumnStatistics(
        count=len(rows),
        mean=rows.mean(0),
        m2=(deviations**2).sum(0),
        mean_norm=norms.mean(),
        mean_squared_norm=(norms**2).mean(),
    )


def make_set(folder, columns=COLUMNS):
    Manifest(set_id="s", identity={}, columns=columns, segment_rows=10).save(folder)
    return folder


def write(writer, end, columns=(HOOK, OTHER), step=4):
    while writer.next_row < end:
        reservation = writer.reserve(min(step, end - writer.next_row))
        first = writer.next_row
        for column in columns:
            values = rows_of(column, first, first + reservation.n_rows).astype(np.float32)
            reservation.columns[column.name][:] = values.tobytes()
        writer.commit(reservation.n_rows, {"row": first + reservation.n_rows})


def assert_statistics(folder, column, n_rows):
    found, due = load_statistics(folder, column), statistics_of(rows_of(column, 0, n_rows).astype(np.float32))
    assert found.count == n_rows
    np.testing.assert_allclose(found.mean, due.mean, rtol=1e-12)
    np.testing.assert_allclose(found.m2, due.m2, rtol=1e-12)
    assert found.mean_norm == pytest.approx(due.mean_norm, rel=1e-13)
    assert found.mean_squared_norm == pytest.approx(due.mean_squared_norm, rel=1e-13)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.statistics"))


def test_statistics_are_those_of_all_sealed_rows(tmp_path):
    with SetWriter.open(make_set(tmp_path), summarize=summarize) as writer:
        write(writer, 37)
        writer.finish()

    assert_statistics(tmp_path, HOOK, 37)
    assert_statistics(tmp_path, OTHER, 37)
    assert files(tmp_path) == [
        "blocks.1.hook_resid_post/float32/00000003.statistics",
        "blocks.2.hook_resid_post/float32/00000003.statistics",
    ]


def test_rows_of_the_open_segment_do_not_count(tmp_path):
    with SetWriter.open(make_set(tmp_path), summarize=summarize) as writer:
        assert load_statistics(tmp_path, HOOK) is None
        write(writer, 27)
        writer.settle()

        assert_statistics(tmp_path, HOOK, 20)


def test_ten_interrupted_pieces_have_the_statistics_of_one(tmp_path):
    make_set(tmp_path)
    for piece in range(10):
        with SetWriter.open(tmp_path, summarize=summarize) as writer:
            write(writer, 13 * (piece + 1), step=1 + piece)
            if piece % 2:
                writer.seal()  # In the other runs the open segment is lost.
    with SetWriter.open(tmp_path, summarize=summarize) as writer:
        write(writer, 131)
        writer.finish()

    assert_statistics(tmp_path, HOOK, 131)
    assert_statistics(tmp_path, OTHER, 131)


def test_a_column_added_later_has_its_own(tmp_path):
    make_set(tmp_path, (*PROVENANCE, HOOK))
    with SetWriter.open(tmp_path, summarize=summarize) as writer:
        write(writer, 25, columns=[HOOK])
        writer.finish()
    Manifest.update(tmp_path, lambda manifest: manifest.with_columns([OTHER]))

    with SetWriter.open(tmp_path, [OTHER.name], summarize) as writer:
        write(writer, 20, columns=[OTHER])
    assert_statistics(tmp_path, OTHER, 20)
    with SetWriter.open(tmp_path, [OTHER.name], summarize) as writer:
        write(writer, 25, columns=[OTHER])
        writer.finish()

    assert_statistics(tmp_path, HOOK, 25)
    assert_statistics(tmp_path, OTHER, 25)
    assert sorted(Manifest.load(tmp_path).statistics) == [HOOK.name, OTHER.name]


def test_the_manifest_says_where_the_vectors_are(tmp_path):
    with SetWriter.open(make_set(tmp_path), summarize=summarize) as writer:
        write(writer, 31)
        writer.finish()

    entry = json.loads((tmp_path / "manifest.json").read_text())["statistics"][HOOK.name]
    vectors, due = load_file(tmp_path / entry["file"]), statistics_of(rows_of(HOOK, 0, 31).astype(np.float32))

    assert entry["count"] == 31
    assert entry["mean_norm"] == pytest.approx(due.mean_norm)
    assert entry["mean_squared_norm"] == pytest.approx(due.mean_squared_norm)
    np.testing.assert_allclose(vectors["mean"], due.mean)
    np.testing.assert_allclose(vectors["m2"], due.m2)


def test_what_a_window_let_go_still_counts(tmp_path):
    with SetWriter.open(make_set(tmp_path), summarize=summarize) as writer:
        write(writer, 40)
        writer.settle()
        retention.drop_before(tmp_path, 40, SegmentIndex.load(tmp_path))
    with SetWriter.open(tmp_path, summarize=summarize) as writer:
        write(writer, 55)
        writer.finish()

    assert_statistics(tmp_path, HOOK, 55)


def test_a_set_that_nobody_summarised_is_when_it_goes_on(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write(writer, 30)
    assert load_statistics(tmp_path, HOOK) is None

    with SetWriter.open(tmp_path, summarize=summarize) as writer:
        write(writer, 45)
        writer.finish()

    assert_statistics(tmp_path, HOOK, 45)


def test_there_are_none_where_rows_went_unseen(tmp_path):
    with SetWriter.open(make_set(tmp_path)) as writer:
        write(writer, 30)
    retention.drop_before(tmp_path, 20, SegmentIndex.load(tmp_path))

    with SetWriter.open(tmp_path, summarize=summarize) as writer:
        write(writer, 55)
        writer.finish()

    assert load_statistics(tmp_path, HOOK) is None
    assert Manifest.load(tmp_path).statistics == {}
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\x10",
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x02\0\0\0\0\0\0\0[]",
        b'\x14\0\0\0\0\0\0\0{"__metadata__": []}',
    ],
)
def test_a_damaged_file_is_as_good_as_none(tmp_path, damaged):
    with SetWriter.open(make_set(tmp_path), summarize=summarize) as writer:
        write(writer, 10)
    statistics_path(tmp_path, HOOK, 0).write_bytes(damaged)
    assert load_statistics(tmp_path, HOOK) is None

    with SetWriter.open(tmp_path, summarize=summarize) as writer:
        write(writer, 20)

    assert_statistics(tmp_path, HOOK, 20)


def test_a_crash_before_the_record_leaves_the_statistics_of_the_last_recorded_segment(tmp_path, monkeypatch):
    with SetWriter.open(make_set(tmp_path), summarize=summarize) as writer:
        write(writer, 20)
    with pytest.raises(KeyboardInterrupt), SetWriter.open(tmp_path, summarize=summarize) as writer:
        monkeypatch.setattr(SegmentIndex, "append", interrupt)
        write(writer, 30)
        writer.seal()
    monkeypatch.undo()
    assert len(files(tmp_path)) == 4

    assert_statistics(tmp_path, HOOK, 20)
    with SetWriter.open(tmp_path, summarize=summarize) as writer:
        assert len(files(tmp_path)) == 2
        write(writer, 30)
    assert_statistics(tmp_path, HOOK, 30)


def interrupt(*args):
    raise KeyboardInterrupt


WRITER_PROGRAM = """
    import sys
    from pathlib import Path
    sys.path[:0] = {path!r}
    from test_statistics import summarize, write
    from headrace_log.writer import SetWriter
    with SetWriter.open(Path(sys.argv[1]), summarize=summarize) as writer:
        for end in range(1, 3000):
            write(writer, end)
            print(end, flush=True)
"""


@pytest.mark.fault
@pytest.mark.parametrize("kill_at", [9, 10, 11, 20, 21, 35, 100, 110])
def test_a_kill_at_any_point_leaves_right_statistics(tmp_path, kill_at):
    folder = make_set(tmp_path / "set")
    program = textwrap.dedent(WRITER_PROGRAM.format(path=[str(Path(__file__).parent), *sys.path]))
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE)
    for line in process.stdout:
        if int(line) == kill_at:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    process.wait(10)

    if n_sealed := SegmentIndex.load(folder).n_rows([HOOK.name]):
        assert_statistics(folder, HOOK, n_sealed)
    with SetWriter.open(folder, summarize=summarize) as writer:
        write(writer, n_sealed + 15)
        writer.finish()
    assert_statistics(folder, HOOK, n_sealed + 15)
    assert len(files(folder)) == 2
