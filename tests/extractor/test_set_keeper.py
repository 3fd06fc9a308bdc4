"""Sets on a node's disk: what is evicted for whom, what stays, and what is left of it."""

import asyncio
import os
import time
from dataclasses import replace

import pytest

from fix_runner import documents
from headrace_extractor import errors
from headrace_extractor.corpora.counting import RowCount
from headrace_extractor.corpora.packing import SpecialTokens, count_rows
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.extractions import job as extraction
from headrace_extractor.extractions.values import ExtractionState
from headrace_extractor.reading.row_stream import RowStream, StreamRequest
from headrace_extractor.sets.eviction import Limits
from headrace_extractor.sets.keeper import Reservation
from headrace_extractor.sets.notes import LAST_USED_NAME, SetOrders
from headrace_extractor.sets.spec import Retention
from headrace_log.holding import Hold, nobody_holds

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1024 * 1024
RECIPE = Recipe(context_size=64, batch_size=8)
N_ROWS = count_rows(documents(200, seed=1), RECIPE, SpecialTokens(bos_id=1, eos_id=2))[0]
ROW_BYTES = 32 * 4 + 12
SET_BYTES = N_ROWS * ROW_BYTES  # about 900 KB, and some pages and papers
LIMITS = Limits(quota_bytes=7 * MIB // 2, reserve_bytes=0)  # room for three such sets


@pytest.fixture
def node(extractor, monkeypatch):
    """The module's node with the limits of these tests, no set of others, and a count of rows."""

    monkeypatch.setattr(extractor.counter, "counted", RowCount(n_rows=N_ROWS, n_tokens=N_ROWS, exact=True))
    keeper = extractor.extractions.keeper
    monkeypatch.setattr(keeper, "_limits", LIMITS)
    extractor.registry.orders.clear()
    return extractor


@pytest.fixture
def clock(node, monkeypatch):
    """The node's keeper counts by this clock."""
    keeper, made = node.extractions.keeper, FakeClock()
    for name, value in {
        "_wall": lambda: made.wall,
        "_monotonic": lambda: made.monotonic,
        "_counted_at": made.monotonic,
        "_calm_until": 0.0,
        "_idleness": replace(keeper._idleness, wall=0.0),
    }.items():
        monkeypatch.setattr(keeper, name, value)
    return made


@pytest.fixture(autouse=True)
async def empty(extractor):
    """Every test begins with an empty disk."""
    keeper = extractor.extractions.keeper
    limits, keeper._limits = keeper._limits, Limits(quota_bytes=1, reserve_bytes=0)
    extractor.registry.orders = {folder.name: SetOrders() for folder in folders(extractor)}
    await keeper.follow_orders()
    await keeper.keep_limits()
    keeper._limits = limits
    extractor.registry.orders.clear()
    assert not folders(extractor)


class FakeClock:
    def __init__(self):
        self.wall, self.monotonic = time.time(), 1000.0

    def pass_s(self, seconds):
        self.wall += seconds
        self.monotonic += seconds


def folders(node):
    return {path for path in (node.data_dir / "activations").iterdir() if not path.name.startswith(".")}


async def make(node, seed=0, **changes):
    """A finished set of about 900 KB."""
    node.add_corpus([*documents(200, seed=1), [seed + 3]])
    job = await node.extract(recipe=RECIPE, **changes)
    await ended(job)
    return job


async def ended(job):
    await asyncio.wait([job.task], timeout=30)
    assert job.value.state.ended


def use(job, seconds_ago):
    at = time.time() - seconds_ago
    os.utime(job.folder / LAST_USED_NAME, (at, at))


def leave_idle(node, job, seconds=1e9):
    """As if a server had run for so long since the last use of the job's set."""
    keeper, last_used = node.extractions.keeper, (job.folder / LAST_USED_NAME).stat().st_mtime
    keeper._idleness = replace(keeper._idleness, seen={**keeper._idleness.seen, job.folder.name: (last_used, seconds)})


async def test_the_least_recently_used_set_makes_room_for_a_new_one(node):
    first, second, third = [await make(node, seed) for seed in range(3)]
    for job, seconds_ago in ((first, 10), (second, 30), (third, 20)):
        use(job, seconds_ago)

    fourth = await make(node, 3)

    assert fourth.value.state == ExtractionState.DONE
    assert folders(node) == {first.folder, third.folder, fourth.folder}
    assert second.value.set_id not in node.registry.sets
    assert not list((node.data_dir / "activations" / ".trash").iterdir())


async def test_reading_counts_as_use(node):
    first, second, third = [await make(node, seed) for seed in range(3)]
    for job in (first, second, third):
        use(job, 30)
    await node.read(second)
    await node.read(first)

    await make(node, 3)

    assert not third.folder.exists()
    assert first.folder.exists()


@pytest.mark.fault
async def test_last_use_survives_a_restart(start_extractor):
    node = await start_extractor()
    node.add_corpus(documents(20, seed=1))
    job = await node.extract()
    await ended(job)
    use(job, 3600)
    await node.stop()

    await node.start()

    (held,), _ = await node.extractions.keeper._look({})
    assert 3590 < time.time() - held.last_used < 3700


async def test_a_set_with_a_reader_or_a_pin_is_never_taken(node):
    read, pinned, idle = [await make(node, seed) for seed in range(3)]
    for job, seconds_ago in ((read, 30), (pinned, 20), (idle, 10)):
        use(job, seconds_ago)
    node.registry.orders[pinned.value.set_id] = SetOrders(pinned=True)
    stream = RowStream(read, StreamRequest(columns=("position",)))
    try:
        fourth = await make(node, 3)
        refused = await make(node, 4) if fourth.folder.exists() and use(fourth, 0) else None
    finally:
        stream.close()

    assert refused is None
    assert folders(node) == {read.folder, pinned.folder, fourth.folder}


async def test_what_can_not_fit_now_is_refused_with_figures_and_remedy(node):
    jobs = [await make(node, seed) for seed in range(3)]
    for job in jobs:
        node.registry.orders[job.value.set_id] = SetOrders(pinned=True)

    refused = await make(node, 3)

    failure = refused.value.failure
    assert failure.reason == "DISK_FULL"
    assert "unpin" in failure.message
    assert int(failure.metadata["required_bytes"]) > int(failure.metadata["free_bytes"])
    assert all(job.folder.exists() for job in jobs)


async def test_what_can_never_fit_is_refused_before_any_work(node, monkeypatch):
    monkeypatch.setattr(node.extractions.keeper, "_limits", replace(LIMITS, quota_bytes=MIB // 2))
    runs = []
    for runner in node.runners:
        monkeypatch.setattr(runner, "run", lambda *args, **kwargs: runs.append(args))

    refused = await make(node)

    assert refused.value.failure.reason == "DISK_FULL"
    assert "never fits" in refused.value.failure.message
    assert not runs
    assert refused.value.n_rows == 0


async def test_a_window_larger_than_its_corpus_reserves_what_the_corpus_takes(node):
    job = await make(node, retention=Retention(kind="window", reader_grace_s=0.1))

    assert job.value.state == ExtractionState.DONE
    await node.until(lambda: not job.folder.exists())


async def test_two_extractions_do_not_count_on_the_same_room(node, monkeypatch):
    monkeypatch.setattr(node.extractions.keeper, "_limits", replace(LIMITS, quota_bytes=2 * MIB))
    jobs = []
    for seed in (5, 6):
        node.add_corpus([*documents(200, seed=1), [seed + 3]])
        jobs.append(await node.extract(recipe=RECIPE))
    await asyncio.gather(*(ended(job) for job in jobs))

    states = [job.value.state for job in jobs]

    assert sorted(states) == [ExtractionState.DONE, ExtractionState.FAILED]
    again = await node.extract(recipe=RECIPE)
    await ended(again)
    assert again.value.state == ExtractionState.DONE


async def test_rows_of_an_evicted_set_are_not_found_and_computed_anew_on_request(node):
    job = await make(node)
    before, _, _ = await node.read(job)
    leave_idle(node, job)
    await node.extractions.keeper.keep_limits()
    assert not job.folder.exists()

    with pytest.raises(errors.SetNotFound, match="StartExtraction"):
        RowStream(job, StreamRequest())
    again = await node.extract(recipe=RECIPE)
    after, _, _ = await node.read(again)
    await ended(again)

    assert again is not job
    assert not again.value.cached
    assert after == before
    assert (await node.read(job))[0] == before  # The rows are the same, whoever had them computed.


@pytest.mark.fault
async def test_an_ended_extraction_whose_set_is_gone_says_so_after_a_restart(start_extractor):
    node = await start_extractor()
    node.add_corpus(documents(20, seed=1))
    job = await node.extract()
    await ended(job)
    leave_idle(node, job)
    await node.extractions.keeper.keep_limits()
    await node.stop()

    await node.start()

    with pytest.raises(errors.SetNotFound):
        RowStream(node.extractions.get(job.value.id), StreamRequest())


async def test_while_the_registry_is_away_nothing_goes_that_was_pinned_when_last_heard(node):
    pinned, free, _ = [await make(node, seed) for seed in range(3)]
    leave_idle(node, pinned)
    leave_idle(node, free)
    node.registry.orders[pinned.value.set_id] = SetOrders(pinned=True, pinned_until=time.time() + 60)
    await node.extractions.keeper.follow_orders()
    node.registry.unavailable = errors.RegistryUnavailable("away")
    try:
        await node.extractions.keeper.keep_limits()
    finally:
        node.registry.unavailable = None

    assert pinned.folder.exists()
    assert not free.folder.exists()


async def test_a_pin_that_nobody_heard_of_yet_is_asked_for_before_an_eviction(node):
    job = await make(node)
    leave_idle(node, job)
    node.registry.orders[job.value.set_id] = SetOrders(pinned=True)

    await node.extractions.keeper.keep_limits()

    assert job.folder.exists()


async def test_a_pin_that_has_ended_keeps_nothing(node):
    job = await make(node)
    leave_idle(node, job)
    node.registry.orders[job.value.set_id] = SetOrders(pinned=True, pinned_until=time.time() - 1)
    await node.extractions.keeper.follow_orders()
    node.registry.orders.clear()

    await node.extractions.keeper.keep_limits()

    assert not job.folder.exists()


async def test_a_set_that_shall_go_does_so_once_nobody_reads_it(node):
    job = await make(node)
    node.registry.orders[job.value.set_id] = SetOrders(delete=True)
    stream = RowStream(job, StreamRequest(columns=("position",)))
    await node.extractions.keeper.follow_orders()
    still_there = job.folder.exists()
    stream.close()

    await node.extractions.keeper.follow_orders()

    assert still_there
    assert not job.folder.exists()
    assert job.value.set_id not in node.registry.sets


async def test_a_set_that_a_process_maps_is_not_taken_until_it_lets_go(node):
    job = await make(node)
    hold = Hold(job.folder)
    leave_idle(node, job)
    await node.extractions.keeper.keep_limits()
    still_there = job.folder.exists()
    hold.close()

    await node.extractions.keeper.keep_limits()

    assert still_there
    assert not job.folder.exists()


@pytest.mark.fault
async def test_a_crash_in_the_middle_of_a_removal_leaves_nothing(start_extractor):
    node = await start_extractor()
    node.add_corpus(documents(20, seed=1))
    job = await node.extract()
    await ended(job)
    await node.stop()
    sets = node.data_dir / "activations"
    (sets / ".trash").mkdir(exist_ok=True)
    job.folder.rename(sets / ".trash" / "half-removed")
    (sets / ("a" * 32) / "token_id").mkdir(parents=True)
    (sets / ".windows" / "xgone").mkdir()

    await node.start()

    assert {path.name for path in sets.iterdir()} == {".trash", ".windows"}
    assert not list((sets / ".trash").iterdir())
    assert not list((sets / ".windows").iterdir())


async def test_only_leftovers_of_sets_are_removed_at_start(start_extractor):
    node = await start_extractor()
    sets, theirs = node.data_dir / "activations", {"notes", "lost+found", "2" * 32 + ".bak"}
    for name in (*theirs, "0" * 32, ".windows/x1"):
        (sets / name).mkdir()
        (sets / name / "file").write_bytes(b"1")

    node.extractions.keeper.recover()
    await node.extractions.keeper.keep_limits()

    assert {folder.name for folder in folders(node)} == theirs
    assert not list((sets / ".windows").iterdir())


async def test_two_looks_at_once_do_not_take_one_another_for_readers(node):
    job = await make(node)
    looks = [asyncio.to_thread(_looks_free, job.folder, 300) for _ in range(4)]

    assert all(await asyncio.gather(*looks))


def _looks_free(folder, n_looks):
    for _ in range(n_looks):
        with nobody_holds(folder) as free:
            if not free:
                return False
    return True


async def test_a_disk_that_fills_up_has_idle_sets_evicted_and_the_extraction_goes_on(node, monkeypatch):
    idle = await make(node)
    node.add_corpus(documents(400, seed=2))
    full = [errors.DiskFull("the disk is full", metadata={"required_bytes": "1000", "free_bytes": "0"})]
    runner = node.runners[-1]
    run = runner.run

    def run_once_full(command, *, ends):
        return failing() if full else run(command, ends=ends)

    async def failing():
        raise full.pop()
        yield

    monkeypatch.setattr(runner, "run", run_once_full)
    job = await node.extract(recipe=RECIPE)
    await ended(job)

    assert job.value.state == ExtractionState.DONE
    assert not idle.folder.exists()


async def test_a_disk_that_stays_full_fails_the_extraction_which_goes_on_when_asked_again(node, monkeypatch):
    node.add_corpus(documents(200, seed=3))
    await make(node)  # Starts a runner.
    await node.extractions.keeper.keep_limits()
    node.registry.orders.update({path.name: SetOrders(pinned=True) for path in folders(node)})
    runner = node.runners[-1]
    with monkeypatch.context() as patch:

        async def failing(command, *, ends):
            raise errors.DiskFull("the disk is full", metadata={"required_bytes": "1000", "free_bytes": "0"})
            yield

        patch.setattr(runner, "run", failing)
        node.add_corpus(documents(200, seed=4))
        failed = await node.extract(recipe=RECIPE)
        await ended(failed)

    again = await node.extract(recipe=RECIPE)
    await ended(again)

    assert failed.value.failure.reason == "DISK_FULL"
    assert again.value.state == ExtractionState.DONE


async def test_an_estimate_tells_new_and_available_bytes(node):
    job = await make(node)
    spec, model = await node.extractions.check(replace(job.value.spec, hookpoints=("blocks.0.hook_resid_post",)))
    other, available = await node.extractions.space_for(spec, model, N_ROWS)
    same, _ = await node.extractions.space_for(job.value.spec, model, N_ROWS)

    assert N_ROWS * 32 * 4 <= other < N_ROWS * 32 * 4 + 2 * 8192
    assert same == 0
    assert 0 < available <= LIMITS.quota_bytes
    assert await asyncio.wait_for(node.extractions.keeper.available_bytes(job.set), 5) == available


async def test_rows_that_surely_fit_are_not_waited_for(node, monkeypatch):
    """A count that never ends holds up those only whose rows might not fit."""

    async def never(spec):
        await asyncio.Event().wait()

    monkeypatch.setattr(node.counter, "count", never)
    monkeypatch.setattr(extraction, "COUNT_WAIT_S", 600.0)
    node.add_corpus(documents(200, seed=1))
    few = await node.extract(recipe=RECIPE, max_rows=64)
    await ended(few)
    too_many = await node.extract(recipe=RECIPE, max_rows=100 * N_ROWS)
    all_of_them = await node.extract(recipe=RECIPE)
    await asyncio.sleep(0.5)

    assert few.value.state == ExtractionState.DONE
    assert {too_many.value.state, all_of_them.value.state} == {ExtractionState.QUEUED}
    for job in (too_many, all_of_them):
        await job.cancel()
        await ended(job)


async def test_what_fits_counts_what_is_there_and_promised(node):
    first, second = [await make(node, seed=seed) for seed in range(2)]
    keeper = node.extractions.keeper

    def fits(n_rows):
        return keeper.fits(Reservation(set=second.set, columns=second.columns, n_rows=n_rows))

    assert await fits(2 * N_ROWS)
    assert not await fits(5 * N_ROWS)
    await keeper.reserve("another", Reservation(set=first.set, columns=first.columns, n_rows=2 * N_ROWS))
    assert not await fits(2 * N_ROWS)
    keeper.release("another")
    assert await fits(2 * N_ROWS)


async def test_a_damaged_set_with_a_reservation_fails_no_other_extraction(node):
    damaged = await make(node)
    reservation = Reservation(set=damaged.set, columns=damaged.columns, n_rows=N_ROWS)
    await node.extractions.keeper.reserve("another", reservation)
    (damaged.folder / "manifest.json").write_text("{")

    other = await make(node, seed=1)
    node.extractions.keeper.release("another")

    assert other.value.state == ExtractionState.DONE


@pytest.mark.parametrize("jump_s", [60 * 86_400, -60 * 86_400])
async def test_a_clock_that_jumps_evicts_nothing(node, clock, jump_s):
    job, keeper = await make(node), node.extractions.keeper
    await keeper.keep_limits()

    clock.wall += jump_s
    for _ in range(3):
        clock.pass_s(60)
        await keeper.keep_limits()

    assert job.folder.exists()
    assert keeper._idleness.idle_s(job.folder.name, (job.folder / LAST_USED_NAME).stat().st_mtime) <= 240


async def test_nothing_is_evicted_within_an_hour_of_a_jump_and_unused_sets_are_afterwards(node, clock):
    job, keeper = await make(node), node.extractions.keeper
    await keeper.keep_limits()
    leave_idle(node, job)
    clock.wall += 86_400
    there = []
    for _ in range(61):
        await keeper.keep_limits()
        there.append(job.folder.exists())
        clock.pass_s(60)

    assert there == [True] * 60 + [False]
