"""What a server remembers of files that it has compared, and what it makes of damage: a set by itself, no model."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from headrace_extractor.errors import DigestMismatch
from headrace_extractor.sets import integrity
from headrace_extractor.sets.activation_sets import ActivationSets
from headrace_extractor.sets.verification import Verification
from headrace_log import segment_file
from headrace_log.errors import DiskFull
from headrace_log.layout import PROVENANCE, ColumnSpec, Dtype, segment_path
from headrace_log.manifest import Manifest
from headrace_log.segment import DATA_OFFSET
from headrace_log.writer import SetWriter

HOOK = ColumnSpec(name="blocks.0.hook_resid_post", dtype=Dtype.FLOAT32, width=8)
COLUMNS = (*PROVENANCE, HOOK)
NAMES = tuple(column.name for column in COLUMNS)


def write(folder, end_row, columns=NAMES):
    with SetWriter.open(folder, columns) as writer:
        while writer.next_row < end_row:
            reservation = writer.reserve(end_row - writer.next_row)
            for view in reservation.columns.values():
                np.frombuffer(view, np.uint8)[:] = writer.next_row % 251
            writer.commit(reservation.n_rows, {})
        writer.seal()


@pytest.fixture
def sets(tmp_path):
    made = ActivationSets(tmp_path / "activations")
    made.create_folders()
    yield made
    made.close()


@pytest.fixture
def of(sets):
    """A set of 40 rows in four segments, as a server finds it that did not write it."""
    made = sets.retained("1" * 32)
    made.create(Manifest(set_id=made.id, identity={}, columns=COLUMNS, segment_rows=10), model_id="m", corpus_id="c")
    write(made.folder, 40)
    return made


@pytest.fixture
def digested(monkeypatch):
    """The segments that were read byte by byte."""
    seen, check = [], segment_file.check_sealed

    def checking(folder, column, record, **how):
        seen.append((column.name, record.segment))
        return check(folder, column, record, **how)

    monkeypatch.setattr(integrity, "check_sealed", checking)
    return seen


def flip(of, segment, column=HOOK):
    path = segment_path(of.folder, column, segment)
    content = bytearray(path.read_bytes())
    content[DATA_OFFSET + 5] ^= 1
    path.write_bytes(content)


async def test_a_file_is_compared_once_until_it_changes(of, digested):
    await of.look_for_damage(NAMES, 0)
    assert len(digested) == 16
    await of.look_for_damage(NAMES, 0)
    assert len(digested) == 16

    os.utime(segment_path(of.folder, HOOK, 2))
    await of.look_for_damage(NAMES, 0)

    assert digested[16:] == [(HOOK.name, 2)]
    assert of.n_rows(NAMES) == 40


async def test_only_rows_and_columns_that_are_wanted_are_compared(of, digested):
    await of.look_for_damage((HOOK.name,), 15)

    assert digested == [(HOOK.name, 0), (HOOK.name, 1)]


async def test_segments_that_were_sealed_since_the_server_looked_count_as_compared(of, digested):
    await of.look_for_damage(NAMES, 0)
    write(of.folder, 60)
    assert of.n_rows(NAMES) == 60
    await of.look_for_damage(NAMES, 0)
    assert len(digested) == 16

    flip(of, 5)
    await of.look_for_damage(NAMES, 0)

    assert digested[16:] == [(HOOK.name, 5)]
    assert of.n_rows(NAMES) == 50


async def test_what_is_beyond_the_eager_bytes_is_judged_by_its_size_and_left_to_its_reader(of, digested, monkeypatch):
    monkeypatch.setattr(integrity, "EAGER_BYTES", 10 * HOOK.row_bytes)
    flip(of, 2)
    os.truncate(segment_path(of.folder, HOOK, 3), DATA_OFFSET)

    await of.look_for_damage((HOOK.name,), 0)

    assert digested == [(HOOK.name, 0), (HOOK.name, 3)]
    assert of.n_rows((HOOK.name,)) == 30
    with pytest.raises(DigestMismatch) as caught:
        await of.check_segment(of.index().records[2], (HOOK,))
    assert caught.value.metadata["first_row"] == "20"
    assert of.n_rows((HOOK.name,)) == 20


async def test_damage_found_while_the_set_is_written_is_left_out_at_once_and_mended_afterwards(of):
    writer = SetWriter.open(of.folder, NAMES)
    flip(of, 1)

    await of.look_for_damage(NAMES, 0)

    assert of.n_rows(NAMES) == 10
    assert of.integrity.is_damaged
    assert segment_path(of.folder, HOOK, 1).exists()
    writer.close()
    await of.mend()
    assert not of.integrity.is_damaged
    assert not segment_path(of.folder, HOOK, 1).exists()
    write(of.folder, 20, (HOOK.name,))
    assert of.n_rows(NAMES) == 40


@pytest.mark.parametrize("looked", [True, False])
async def test_rows_computed_anew_are_no_damage_although_an_older_record_missed_their_file(of, looked):
    flip(of, 1)
    stale = of.index().records[1]
    await of.look_for_damage(NAMES, 0)
    if looked:
        assert of.n_rows(NAMES) == 10

    with SetWriter.open(of.folder, (HOOK.name,)) as writer:
        with pytest.raises(DigestMismatch, match="is missing"):
            await of.check_segment(stale, (HOOK,))
        reservation = writer.reserve(10)
        reservation.columns[HOOK.name][:] = bytes(10 * HOOK.row_bytes)
        writer.commit(10, {})
        writer.seal()
        writer.settle()
    if looked:
        assert of.n_rows(NAMES) == 40
    await of.mend()

    assert of.n_rows(NAMES) == 40
    assert not of.integrity.is_damaged
    assert segment_path(of.folder, HOOK, 1).exists()


async def test_damage_of_one_column_leaves_the_others(of):
    flip(of, 1)

    await of.look_for_damage(NAMES, 0)

    assert (of.n_rows((HOOK.name,)), of.n_rows(("token_id", "position"))) == (10, 40)


async def test_a_verification_holds_its_set_and_names_each_damaged_file(sets, of):
    for segment, column in ((0, HOOK), (3, PROVENANCE[0])):
        flip(of, segment, column)

    steps, held = [], []
    async for step in Verification(of, n_at_once=2).progress():
        steps.append(step)
        held.append(of.held)

    last = steps[-1]
    assert held[0]
    assert not of.held
    assert (last.done, last.n_files, last.n_files_total, last.n_damaged) == (True, 16, 16, 2)
    assert last.size_bytes == last.total_bytes == 40 * sum(column.row_bytes for column in COLUMNS)
    assert {(each.column, each.first_row, each.end_row) for each in last.damages} == {
        (HOOK.name, 0, 10),
        ("token_id", 30, 40),
    }
    assert of.n_rows((HOOK.name,)) == 0


async def test_a_verification_names_damage_that_waits_for_a_writer(of):
    flip(of, 1)
    with SetWriter.open(of.folder, ("token_id",)):
        await of.look_for_damage(NAMES, 0)
        steps = [step async for step in Verification(of, n_at_once=1).progress()]

    (damage,) = steps[-1].damages
    assert (damage.file, damage.column) == (str(segment_path(of.folder, HOOK, 1)), HOOK.name)
    assert (damage.first_row, damage.end_row) == (10, 20)


async def test_an_index_that_can_not_be_read_is_cut_and_reported(of):
    path = of.folder / "segments.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"garbage\n" + lines[2])

    steps = [step async for step in Verification(of, n_at_once=1).progress()]

    assert [(each.file, each.first_row) for each in steps[-1].damages] == [("segments.jsonl", 10)]
    assert of.n_rows(NAMES) == 10


@pytest.fixture(params=[DiskFull(Path("set"), required_bytes=1, free_bytes=0), OSError(errno.EROFS, "read-only")])
def unwritable(request, monkeypatch):
    """A disk to which no repair can be written."""

    def fail(*_):
        raise request.param

    monkeypatch.setattr("headrace_log.index.write_atomically", fail)


async def test_damage_on_a_disk_that_takes_no_repair_is_named_and_left_out(of, unwritable):
    flip(of, 1)

    with pytest.raises(DigestMismatch) as caught:
        await of.check_segment(of.index().records[1], (HOOK,))

    assert caught.value.metadata["first_row"] == "10"
    assert of.n_rows((HOOK.name,)) == 10
    assert of.integrity.is_damaged


def test_rows_before_an_unreadable_line_are_readable_on_a_disk_that_takes_no_repair(of, unwritable):
    path = of.folder / "segments.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"garbage\n" + lines[2])

    assert of.n_rows(NAMES) == 10


def test_an_index_that_fails_to_be_read_is_damage_and_whole_again_once_it_can_be(of):
    path = of.folder / "segments.jsonl"
    aside = path.rename(of.folder / "aside")
    path.mkdir()
    with pytest.raises(DigestMismatch, match="can't be read"):
        of.n_rows(NAMES)
    path.rmdir()
    aside.rename(path)

    assert of.n_rows(NAMES) == 40


def test_a_server_that_ends_stops_comparing(of):
    closing = threading.Event()
    closing.set()
    known = integrity.Integrity(of.folder, closing)
    flip(of, 0)

    known.look_for_damage(of.manifest(), of.index(), NAMES, 0)

    assert not known.is_damaged
