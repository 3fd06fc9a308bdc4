"""A set as an object: what it remembers of its files, when it looks again, and how long it lives."""

import asyncio
import gc
import weakref

import pytest

from fix_runner import documents
from headrace_extractor.extractions import extractions as module
from headrace_extractor.extractions.drive import SetPasses
from headrace_extractor.sets import activation_set
from headrace_extractor.sets.activation_set import Kind
from headrace_extractor.sets.activation_sets import ActivationSets
from headrace_extractor.sets.spec import Retention
from headrace_log import retention
from headrace_log.index import SegmentIndex, SegmentRecord
from headrace_log.layout import PROVENANCE
from headrace_log.manifest import Manifest

COLUMNS = ("token_id", "document", "position")


class FakeUser:
    def __init__(self, name="x1", *, holds_set=True):
        self.holds_set = self.holds_set_itself = holds_set
        self.reader_names = (f"reader of {name}",) if holds_set else ()
        self.id = name


@pytest.fixture
def sets(tmp_path):
    made = ActivationSets(tmp_path / "activations")
    made.create_folders()
    return made


def create(of):
    of.create(Manifest(set_id=of.id, identity={}, columns=PROVENANCE, segment_rows=8), model_id="m", corpus_id="c")


def seal(of, segment, n_rows=8):
    record = SegmentRecord(
        segment=segment, first_row=8 * segment, n_rows=n_rows, digests=dict.fromkeys(COLUMNS, "0"), resume={}
    )
    SegmentIndex.load(of.folder).append(of.folder, record)


def test_rows_that_a_runner_seals_are_seen(sets):
    of = sets.retained("1" * 32)
    create(of)
    assert of.n_rows(COLUMNS) == 0

    seal(of, 0)
    seal(of, 1)

    assert of.n_rows(COLUMNS) == 16


def test_a_manifest_is_read_once_until_it_changes(sets, monkeypatch):
    loads = []
    load = Manifest.load.__func__
    monkeypatch.setattr(Manifest, "load", classmethod(lambda cls, folder: loads.append(folder) or load(cls, folder)))
    of = sets.retained("1" * 32)
    create(of)
    for _ in range(3):
        of.manifest()
    assert len(loads) == 1

    Manifest.update(of.folder, lambda known: Manifest(**{**vars_of(known), "total_rows": 5}))
    loads.clear()

    assert of.manifest().total_rows == 5
    assert len(loads) == 1


def vars_of(manifest):
    return {name: getattr(manifest, name) for name in Manifest.__slots__}


def test_a_set_made_anew_in_the_same_folder_has_none_of_the_rows_before(sets):
    of = sets.retained("1" * 32)
    create(of)
    seal(of, 0)
    seal(of, 1)
    assert of.n_rows(COLUMNS) == 16

    retention.delete_set(of.folder)
    assert (of.exists, of.n_rows(COLUMNS)) == (False, 0)
    create(of)
    seal(of, 0, n_rows=3)

    assert of.n_rows(COLUMNS) == 3


def test_a_slow_look_at_an_old_set_gives_its_index_to_no_new_one(sets, monkeypatch):
    """A thread reads the index while the set is evicted and made anew in the same folder."""
    of = sets.retained("1" * 32)
    create(of)
    seal(of, 0)
    seal(of, 1)
    refreshed = SegmentIndex.refreshed

    def evicted_meanwhile(index, folder):
        monkeypatch.undo()
        found = refreshed(index, folder)
        retention.delete_set(folder)
        create(of)
        of.manifest()
        return found

    monkeypatch.setattr(SegmentIndex, "refreshed", evicted_meanwhile)
    of.index()

    assert of.n_rows(COLUMNS) == 0


def test_windows_that_are_gone_from_disk_are_none(sets):
    (sets.folder / ".windows").rmdir()

    assert list(sets.window_folders()) == []


def test_kind_and_place_follow_from_how_a_set_is_asked_for(sets):
    kept, window = sets.retained("1" * 32), sets.window("1" * 32, "x1")

    assert (kept.kind, window.kind) == (Kind.RETAIN, Kind.WINDOW)
    assert kept.id == window.id
    assert kept.folder != window.folder
    create(kept)
    create(window)
    assert [folder.name for folder in sets.retained_folders()] == ["1" * 32]
    assert [folder.name for folder in sets.window_folders()] == ["x1"]


def test_a_set_is_held_while_one_of_its_users_needs_it(sets):
    of = sets.retained("1" * 32)
    create(of)
    assert not of.held
    of.users += [FakeUser("x0", holds_set=False), FakeUser("x1"), FakeUser("x2")]

    assert of.held
    assert sets.held_folders() == {of.folder}
    assert of.holders == ("reader of x1", "reader of x2", "x1", "x2")
    assert of.report(holders=of.holders).holders == of.holders
    del of.users[1:]
    assert not of.held


def test_a_set_has_one_object_while_it_is_in_use_and_none_after(sets):
    of = sets.retained("1" * 32)
    assert sets.retained("1" * 32) is of

    gone = weakref.ref(of)
    del of
    gc.collect()

    assert gone() is None


async def ended_extractions(extractor):
    """Runs an extraction of either kind to its end; returns weak references to their sets and passes."""
    extractor.add_corpus(documents(50, seed=91))
    window = await extractor.extract(retention=Retention(kind="window", reader_grace_s=0.05))
    await extractor.until(lambda: window.value.state.ended and not window.folder.exists())
    kept = await extractor.extract()
    await extractor.read(kept)
    await extractor.until(lambda: kept.value.state.ended)
    await asyncio.wait([window.task, kept.task], timeout=30)  # Each gives its lease back before it is forgotten.
    assert isinstance(kept.passes, SetPasses)
    return [weakref.ref(each) for each in (window.set, window.passes, kept.set, kept.passes)]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_set_and_its_passes_go_with_the_last_extraction_that_is_remembered(extractor, monkeypatch):
    monkeypatch.setattr(module, "MAX_ENDED", 0)
    left = await ended_extractions(extractor)

    extractor.add_corpus(documents(50, seed=92))
    other = await extractor.extract()
    await extractor.until(lambda: other.value.state.ended)
    gc.collect()

    assert [each() for each in left] == [None] * 4
    assert [job.value.id for job in extractor.extractions.list()] == [other.value.id]


def test_a_nonce_is_short_and_never_the_same(sets):
    of = sets.retained("1" * 32)
    create(of)

    assert len(of.nonce()) == 32
    assert of.nonce() == of.nonce()
    (of.folder / activation_set.NONCE_NAME).write_text("of another server")
    assert of.nonce() != "of another server"
