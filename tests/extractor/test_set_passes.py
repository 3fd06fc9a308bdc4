"""Extractions of one set share its passes: what they want is merged, and each gets the rows it would get alone."""

import asyncio
import os
import signal
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from fix_runner import documents
from headrace_extractor import errors
from headrace_extractor.extractions import drive
from headrace_extractor.extractions.values import ExtractionState
from headrace_extractor.node.runner_protocol import Committed, Extract
from headrace_extractor.node.turns import Turns
from headrace_log.index import SegmentIndex

pytestmark = pytest.mark.asyncio(loop_scope="module")

A, B, C = ("blocks.0.hook_resid_post",), ("blocks.1.hook_mlp_out",), ("blocks.2.hook_resid_pre",)
PROVENANCE = ("token_id", "document", "position")
N_DOCUMENTS = 1500
SEED = 71


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def alone(extractor):
    """Content of every column, each extracted alone."""
    node, content = extractor, {}
    for number, hookpoints in enumerate((A, B, C)):
        node.add_corpus(documents(N_DOCUMENTS, seed=SEED))
        job = await node.extract(hookpoints=hookpoints)
        content |= (await node.read(job))[0]
        await asyncio.wait([job.task])
        # The same documents are the same set: away with it.
        await asyncio.to_thread(os.rename, job.folder, node.data_dir / f"away-{number}")
    return content


@pytest_asyncio.fixture(loop_scope="module")
async def node(extractor):
    """The module's node without any set, a runner at hand, and what the runners are told in `node.commands`."""
    extractor.add_corpus(documents(2, seed=1))
    await extractor.read(await extractor.extract())
    extractor.add_corpus(documents(N_DOCUMENTS, seed=SEED))
    extractor.commands = []
    undo = [spy(runner, extractor.commands) for runner in extractor.runners]
    yield extractor
    for each in undo:
        each()
    await asyncio.gather(*(job.cancel() for job in extractor.extractions.list()))
    for job in extractor.extractions.list():
        if job.task:
            await asyncio.wait([job.task], timeout=30)
        if job.folder.exists():
            await asyncio.to_thread(os.rename, job.folder, extractor.data_dir / f"away-{job.value.id}")


def spy(runner, commands, on_event=None):
    """Notes every extraction a runner is told; `on_event` is awaited before an event goes on."""
    run = runner.run

    async def noted(command, *, ends):
        if isinstance(command, Extract):
            commands.append(command)
        async for event in run(command, ends=ends):
            if on_event:
                await on_event(command, event)
            yield event

    runner.run = noted

    def undo():
        runner.run = run

    return undo


@asynccontextmanager
async def listening(node, on_event):
    undo = [spy(runner, [], on_event) for runner in node.runners]
    yield
    for each in undo:
        each()


async def together(node, *requests):
    """Starts extractions that all wait for the same lease."""
    acquire, gate = node.registry.acquire_lease, asyncio.Event()

    async def later(*args, **kwargs):
        await gate.wait()
        async for event in acquire(*args, **kwargs):
            yield event

    node.registry.acquire_lease = later
    try:
        jobs = [await node.extract(**request) for request in requests]
        await node.until(lambda: len(jobs[0].passes._jobs) == len(jobs))
    finally:
        node.registry.acquire_lease = acquire
    gate.set()
    return jobs


def columns_of(commands):
    return [set(command.columns) - set(PROVENANCE) for command in commands]


async def check(node, alone, *jobs):
    for job in jobs:
        content, firsts, end = await node.read(job)
        assert firsts == sorted(set(firsts))
        assert end.n_rows == len(alone["position"]) // 4
        assert content == {name: alone[name] for name in job.columns}


async def test_requests_that_wait_for_the_same_set_are_one_pass(node, alone):
    one, two = await together(node, {"hookpoints": A}, {"hookpoints": B + C})

    await check(node, alone, one, two)

    assert columns_of(node.commands) == [{*A, *B, *C}]
    assert one.folder == two.folder


async def test_a_request_joins_a_pass_that_has_no_rows_yet(node, alone):
    begun, gate = asyncio.Event(), asyncio.Event()

    async def hold(command, event):
        begun.set()
        await gate.wait()

    async with listening(node, hold):
        one = await node.extract(hookpoints=A)
        await begun.wait()
        two = await node.extract(hookpoints=B)
        await node.until(lambda: one.passes._running.cut_short)
        gate.set()
        await check(node, alone, one, two)

    assert {*A, *B} in columns_of(node.commands)
    assert two.value.state == ExtractionState.DONE


async def test_a_request_that_comes_late_catches_up_its_own_columns_only(node, alone):
    one = await node.extract(hookpoints=A)
    await node.until(lambda: one.value.n_rows > 0)
    two = await node.extract(hookpoints=A + B)
    seen = two.value

    await check(node, alone, one, two)

    assert seen.state == ExtractionState.QUEUED
    assert columns_of(node.commands) == [{*A}, {*B}]
    assert not set(node.commands[1].columns) & set(PROVENANCE)


async def test_a_request_for_some_of_the_columns_under_way_reads_along(node, alone):
    one = await node.extract(hookpoints=A + B)
    await node.until(lambda: one.value.n_rows > 0)
    two = await node.extract(hookpoints=B, max_rows=5000)

    content, _, end = await node.read(two)
    still_running = not one.value.state.ended
    await check(node, alone, one)

    assert still_running
    assert end.n_rows >= 5000
    assert content["position"] == alone["position"][: 5000 * 4]
    assert content[B[0]] == alone[B[0]][: 5000 * 32 * 4]
    assert columns_of(node.commands)[0] == {*A, *B}
    assert len(node.commands) == 1


async def test_a_subset_that_is_there_needs_neither_pass_nor_lease(node, alone):
    await check(node, alone, await node.extract(hookpoints=A + B))
    running = await node.extract(hookpoints=C)
    await node.until(lambda: running.value.state == ExtractionState.RUNNING)
    before = len(node.commands)

    hit = await node.extract(hookpoints=B)
    await asyncio.wait([hit.task], timeout=5)

    assert hit.value.state == ExtractionState.DONE
    assert hit.value.cached
    assert len(node.commands) == before
    await check(node, alone, hit, running)


async def test_nobody_fails_for_another_ones_columns(node, alone):
    (runner,) = node.runners
    run = runner.run

    async def picky(command, *, ends):
        if isinstance(command, Extract) and B[0] in command.columns:
            raise errors.NonFinite("a value is not finite", metadata={"hookpoint": B[0]})
        async for event in run(command, ends=ends):
            yield event

    runner.run = picky
    try:
        one, two = await together(node, {"hookpoints": A}, {"hookpoints": B})
        await check(node, alone, one)
        await asyncio.wait([two.task], timeout=30)
    finally:
        runner.run = run

    assert two.value.failure.reason == "NON_FINITE"


async def test_who_is_cancelled_leaves_the_others_their_rows(node, alone):
    one, two = await together(node, {"hookpoints": A}, {"hookpoints": B})
    await node.until(lambda: two.value.n_rows > 0)

    await two.cancel()
    await asyncio.wait([two.task], timeout=30)

    assert two.value.state == ExtractionState.CANCELLED
    await check(node, alone, one)
    assert columns_of(node.commands) == [{*A, *B}, {*A}]
    await asyncio.wait([one.task], timeout=30)
    assert node.registry.leases == set()


async def test_a_reader_outlives_the_segment_that_a_cancelled_pass_gives_up(node, alone):
    """A segment that another column has is sealed whole or not at all; rows of it have been read by then."""
    await check(node, alone, await node.extract(hookpoints=C))
    one, two = await together(node, {"hookpoints": A}, {"hookpoints": B})
    some_read = asyncio.Event()
    reading = asyncio.create_task(node.read(one, on_run=lambda run: some_read.set()))
    await asyncio.wait_for(some_read.wait(), 30)

    await two.cancel()
    content, _, _ = await reading

    assert {*A} in columns_of(node.commands)  # The pass had begun, and another had to come.
    assert content == {name: alone[name] for name in one.columns}


async def test_the_first_of_two_may_leave_before_any_pass(node, alone):
    one, two = await together(node, {"hookpoints": A}, {"hookpoints": B})

    await one.cancel()
    await asyncio.wait([one.task], timeout=30)

    assert one.value.state == ExtractionState.CANCELLED
    await check(node, alone, two)


@pytest.mark.fault
async def test_a_killed_runner_costs_the_merged_ones_no_row(start_extractor, alone):
    node = await start_extractor()
    node.add_corpus(documents(N_DOCUMENTS, seed=SEED))
    jobs = await asyncio.gather(node.extract(hookpoints=A), node.extract(hookpoints=B), node.extract(hookpoints=C + A))
    for _ in range(2):
        n_runners = len(node.runners)
        await node.until(lambda: jobs[0].value.state == ExtractionState.RUNNING and jobs[0].value.n_rows > 500)
        os.kill(node.runners[-1].pid, signal.SIGKILL)
        await node.until(lambda n_runners=n_runners: len(node.runners) > n_runners)

    await check(node, alone, *jobs)


async def test_waiting_in_line_is_no_trouble(node, monkeypatch):
    """A runner that dies twice, and long in line between: a deadline that counts the line would be over."""
    monkeypatch.setattr(drive, "RECOVERY_DEADLINE_S", 1.5)
    (runner,) = node.runners
    run, jobs, told = runner.run, [], []

    async def dies_twice(command, *, ends):
        told.append(command.set_id)
        if len(told) > 4:
            async for event in run(command, ends=ends):
                yield event
            return
        if len(told) % 2:  # The one behind it finds the runner dead at once.
            await asyncio.sleep(2.0)
        raise errors.RunnerLost("the process died")

    monkeypatch.setattr(runner, "run", dies_twice)
    for seed in (84, 85):
        node.add_corpus(documents(50, seed=seed))
        jobs.append(await node.extract(hookpoints=A))
    await asyncio.wait([job.task for job in jobs], timeout=60)

    assert len(set(told[:2])) == len(set(told[2:4])) == 2
    assert [job.value.state for job in jobs] == [ExtractionState.DONE] * 2


async def test_after_a_crash_nobody_reads_rows_that_were_not_sealed(start_extractor, alone):
    node = await start_extractor()
    node.add_corpus(documents(2, seed=1))
    await node.read(await node.extract())
    node.add_corpus(documents(N_DOCUMENTS, seed=SEED))
    never = asyncio.Event()

    async def hold(command, event):
        if job.value.n_rows > 500:
            await never.wait()

    async with listening(node, hold):
        job = await node.extract(hookpoints=A)
        await node.until(lambda: job.value.n_rows > 500)
        assert await node.extract(hookpoints=A) is job  # Which is noted, together with how far it is.
        await node.stop()
    n_sealed = SegmentIndex.load(job.folder).n_rows(job.columns)

    await node.start()

    assert n_sealed == 0
    await check(node, alone, node.extractions.get(job.value.id))


@pytest.mark.fault
async def test_a_restarted_node_goes_on_with_all_of_them(start_extractor, alone):
    node = await start_extractor()
    node.add_corpus(documents(N_DOCUMENTS, seed=SEED))
    jobs = await asyncio.gather(node.extract(hookpoints=A), node.extract(hookpoints=B))
    await node.until(lambda: jobs[0].value.n_rows > 500)
    await node.stop()

    await node.start()

    await check(node, alone, *(node.extractions.get(job.value.id) for job in jobs))


async def test_rows_of_different_lengths_are_each_as_long_as_asked_for(node, alone):
    one, two = await together(node, {"hookpoints": A, "max_rows": 777}, {"hookpoints": B})

    content, _, end = await node.read(one)
    await check(node, alone, two)
    await asyncio.wait([one.task], timeout=30)

    assert (end.n_rows, one.value.n_rows, one.value.state) == (777, 777, ExtractionState.DONE)
    assert content[A[0]] == alone[A[0]][: 777 * 32 * 4]
    assert sum(A[0] in command.columns for command in node.commands) == 1


async def test_turns_are_first_come_first_served_and_everyone_knows_the_place():
    turns, order, places = Turns(), [], {1: [], 2: [], 3: []}
    gates = [asyncio.Event() for _ in range(4)]

    async def visit(number):
        async with turns.turn(places.get(number, []).append):
            order.append(number)
            await gates[number].wait()

    visits = []
    for number in range(4):
        visits.append(asyncio.create_task(visit(number)))
        await asyncio.sleep(0)
    visits[1].cancel()
    for gate in gates:
        gate.set()
    await asyncio.gather(*visits, return_exceptions=True)

    assert order == [0, 2, 3]
    assert places == {1: [1], 2: [2, 1], 3: [3, 2, 1]}


async def test_extractions_of_different_sets_take_turns_on_a_runner(node):
    begun, gate = asyncio.Event(), asyncio.Event()

    async def hold(command, event):
        if isinstance(event, Committed):
            begun.set()
            await gate.wait()

    async with listening(node, hold):
        first = await node.extract(hookpoints=A)
        await begun.wait()
        waiting = []
        for seed in (81, 82, 83):
            node.add_corpus(documents(50, seed=seed))
            waiting.append(await node.extract(hookpoints=A))
        await node.until(lambda: all(job.value.queue_position for job in waiting))
        positions = [job.value.queue_position for job in waiting]
        gate.set()
        await asyncio.gather(*(asyncio.wait([job.task], timeout=30) for job in [first, *waiting]))

    assert positions == [1, 2, 3]
    paths = [command.set_path for command in node.commands]
    assert paths == [str(job.folder) for job in [first, *waiting]]
