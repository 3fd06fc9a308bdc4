"""What goes when room is wanted: decisions over figures."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from headrace_extractor.sets.eviction import (
    CachedSet,
    Disk,
    Limits,
    available_bytes,
    excess_bytes,
    most_bytes,
    promised,
    unused,
    victims,
)
from headrace_extractor.sets.idleness import Idleness
from headrace_log.index import SegmentIndex, SegmentRecord
from headrace_log.layout import PROVENANCE, ColumnSpec, Dtype
from headrace_log.manifest import Manifest

DISK = Disk(total_bytes=10_000, free_bytes=9_000)
LIMITS = Limits(quota_bytes=1_000, idle_s=30.0, reserve_bytes=500)


def a_set(name, size_bytes=100, **fields):
    return CachedSet(folder=Path(name), **({"size_bytes": size_bytes, "sealed_bytes": size_bytes} | fields))


def names(sets):
    return [each.folder.name for each in sets]


def test_the_least_recently_used_go_first_and_no_more_than_needed():
    sets = [a_set("new", last_used=9), a_set("old", last_used=1), a_set("older", last_used=0)]

    assert names(victims(sets, 150)) == ["older", "old"]
    assert names(victims(sets, 0)) == []
    assert names(victims(sets, 1000)) == ["older", "old", "new"]


def test_nothing_goes_in_vain():
    sets = [a_set("small", 10, last_used=0), a_set("large", 500, last_used=1)]

    assert names(victims(sets, 400)) == ["large"]


def test_what_is_held_or_pinned_never_goes():
    held, pinned = a_set("held", held=True, idle_s=31), a_set("pinned", pinned=True, idle_s=31)
    sets = [held, pinned, a_set("idle", last_used=5, idle_s=31)]

    assert names(victims(sets, 1000)) == ["idle"]
    assert names(unused(sets, LIMITS)) == ["idle"]


def test_promises_count_as_if_they_were_written():
    writing = a_set("writing", 100, promised_bytes=700, peak_bytes=800, held=True)

    assert excess_bytes([writing, a_set("idle", 300)], LIMITS, DISK) == 0
    assert excess_bytes([writing, a_set("idle", 400)], LIMITS, DISK) == 100
    assert available_bytes([writing, a_set("idle", 400)], LIMITS, DISK) == 300


def test_the_disk_keeps_its_reserve_whatever_the_quota_allows():
    cramped = Disk(total_bytes=2_000, free_bytes=600)
    writing = a_set("writing", 0, promised_bytes=200, peak_bytes=200, held=True)

    assert excess_bytes([writing], LIMITS, cramped) == 100
    assert available_bytes([], LIMITS, cramped) == 100
    assert most_bytes(LIMITS, cramped) == 1_000
    assert most_bytes(Limits(quota_bytes=0, reserve_bytes=500), cramped) == 1_500


def test_without_limits_only_the_disk_counts():
    free = Limits(quota_bytes=0, idle_s=0, reserve_bytes=0)

    assert excess_bytes([a_set("large", 9_000)], free, DISK) == 0
    assert unused([a_set("ancient", idle_s=1e12)], free) == ()


def test_unused_sets_go_after_their_time():
    sets = [a_set("recent", idle_s=20), a_set("forgotten", idle_s=90), a_set("older", idle_s=91)]

    assert names(unused(sets, LIMITS)) == ["older", "forgotten"]


def test_time_that_a_server_ran_decides_before_the_wall_clock():
    sets = [a_set("used by a clock that was wrong", last_used=9e9, idle_s=90), a_set("used since", last_used=1)]

    assert names(victims(sets, 100)) == ["used by a clock that was wrong"]


def test_idleness_is_counted_from_the_last_use_on():
    counts = Idleness().after({"a": 1.0, "b": 1.0}, elapsed_s=50, wall=10)
    assert (counts.idle_s("a", 1.0), counts.idle_s("new", 3.0)) == (0, 0)
    counts = counts.after({"a": 1.0, "b": 2.0}, elapsed_s=50, wall=60)
    assert (counts.idle_s("a", 1.0), counts.idle_s("b", 2.0)) == (50, 0)
    counts = counts.after({"a": 1.0}, elapsed_s=50, wall=110)

    assert counts.seen == {"a": (1.0, 100.0)}
    assert counts.idle_s("a", 99.0) == 0
    assert not counts.jumped(elapsed_s=50, wall=170)
    assert counts.jumped(elapsed_s=50, wall=5_000_000)
    assert counts.jumped(elapsed_s=50, wall=1)


def test_idleness_outlives_a_restart_and_a_damaged_file_counts_as_none(tmp_path):
    counts = Idleness(seen={"a": (1.25, 100.5)}, wall=7.5)
    counts.save(tmp_path)

    assert Idleness.load(tmp_path) == counts
    for damaged in (b"", b"[]", b"{}", b'{"wall": 1, "sets": {"a": 1}}', b"[" * 100_000):
        (tmp_path / "idle.json").write_bytes(damaged)
        assert Idleness.load(tmp_path) == Idleness()


SETS = st.lists(
    st.builds(
        a_set,
        st.text("abc", min_size=1, max_size=3),
        st.integers(0, 500),
        last_used=st.floats(0, 100),
        held=st.booleans(),
        pinned=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda each: each.folder,
)


@given(SETS, st.integers(0, 2000))
def test_victims_are_enough_or_all_there_are_and_each_is_needed(sets, wanted):
    chosen = victims(sets, wanted)
    freed = sum(each.size_bytes for each in chosen)

    assert all(each.may_go for each in chosen)
    assert freed >= wanted or sum(each.size_bytes for each in sets if each.may_go) == freed
    assert all(freed - each.size_bytes < wanted for each in chosen)


@given(SETS, st.integers(0, 3000))
def test_what_is_available_fits_once_the_victims_are_gone(sets, free_bytes):
    disk = Disk(total_bytes=10_000, free_bytes=free_bytes)
    room = available_bytes(sets, LIMITS, disk)
    if room == 0:
        return
    fresh = CachedSet(folder=Path("fresh"), promised_bytes=room, peak_bytes=room, held=True)

    excess = excess_bytes([*sets, fresh], LIMITS, disk)

    assert sum(each.size_bytes for each in victims(sets, excess)) >= excess


def manifest(segment_rows=100):
    columns = (*PROVENANCE, *(ColumnSpec(name=name, dtype=Dtype.FLOAT32, width=8) for name in "ab"))
    return Manifest(set_id="s", identity={}, columns=columns, segment_rows=segment_rows)


def test_a_promise_counts_each_column_once_whoever_wants_it():
    whole = ["token_id", "document", "position", "a", "b"]
    there = SegmentIndex(
        records=(SegmentRecord(segment=0, first_row=0, n_rows=100, digests=dict.fromkeys(whole, "d"), resume={}),)
    )
    nothing, _ = promised(manifest(), there, [])
    one, _ = promised(manifest(), there, [(["a"], 250)])
    two, at_most = promised(manifest(), there, [(["a"], 250), (["a"], 200), (["b"], 100)])

    assert one - nothing == 150 * 32 + 2 * 8192
    assert two == one
    assert at_most - two == 50 * 32
