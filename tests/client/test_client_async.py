"""The client for asyncio: the same calls and errors, and a cancelled coroutine cancels its call."""

import asyncio
import inspect
import time

import pytest

import headrace
from fix_scripted_extractor import EXTRACTION_ID, Fault
from headrace_client import AsyncHeadraceClient, HeadraceClient, Listing, errors
from headrace_client.aio import AsyncPart


@pytest.fixture
async def aclient(registry_host):
    async with AsyncHeadraceClient.connect(registry_host.address, deadline_s=5) as one:
        yield one


# Rows are for the synchronous client; a client for asyncio closes by a coroutine of its own.
LEFT_OUT = {"connect", "close", "chunks", "activations", "source"}


def test_every_call_of_the_client_is_there_but_streams_of_rows(registry_host):
    with HeadraceClient.connect(registry_host.address) as sync:
        parts = {name: part for name, part in vars(sync).items() if not name.startswith("_")} | {"": sync}
    client = AsyncHeadraceClient(sync)

    assert parts.keys() - {""} == {name for name, part in vars(client).items() if isinstance(part, AsyncPart)}
    for name, part in parts.items():
        wanted = {one for one, _ in inspect.getmembers(type(part), inspect.isfunction) if not one.startswith("_")}
        known = {one for one in dir(type(getattr(client, name) if name else client)) if not one.startswith("_")}
        assert wanted - LEFT_OUT == known - LEFT_OUT, name


def test_connect_takes_the_same_options():
    assert inspect.signature(headrace.connect_async) == inspect.signature(headrace.connect)


async def test_calls_give_the_values_and_errors_of_the_synchronous_client(aclient):
    made = await aclient.models.register(hub="a/b", id="tiny")
    listed = await aclient.models.list()

    assert isinstance(listed, Listing)
    assert listed == [made]
    assert [node.id for node in await aclient.nodes()] == ["n1"]
    with pytest.raises(errors.ModelNotFound):
        await aclient.models.get("nope")


async def test_a_watch_is_an_async_iterator(aclient):
    rows = [event.extraction.n_rows async for event in aclient.extractions.watch(EXTRACTION_ID)]

    assert rows == [0, 200, 400, 600, 800, 1000]


async def test_callbacks_are_called_on_the_event_loop(aclient):
    loop, seen = asyncio.get_running_loop(), []

    done = await aclient.extractions.wait(
        EXTRACTION_ID, lambda now: seen.append((now.n_rows, asyncio.get_running_loop()))
    )
    await asyncio.sleep(0)

    assert done.state == "DONE"
    assert [rows for rows, _ in seen] == [0, 200, 400, 600, 800, 1000]
    assert {one for _, one in seen} == {loop}


async def test_many_calls_go_on_at_once(aclient, scripted_registry):
    scripted_registry.hang.add("GetModel")
    await aclient.models.register(hub="a/b", id="tiny")
    calls = [asyncio.create_task(aclient.models.get("tiny")) for _ in range(8)]
    await until(lambda: len(scripted_registry.calls["GetModel"]) == 8)

    scripted_registry.hang.clear()

    assert {one.id for one in await asyncio.gather(*calls)} == {"tiny"}


async def test_a_cancelled_coroutine_cancels_its_call(aclient, scripted_registry):
    await aclient.models.register(hub="a/b", id="tiny")
    scripted_registry.hang.add("GetModel")
    call = asyncio.create_task(aclient.models.get("tiny"))
    await until(lambda: scripted_registry.calls["GetModel"])

    began_s = time.monotonic()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: idle(aclient))

    assert time.monotonic() - began_s < 3, "the call's own deadline is 5 s"


async def test_a_watch_that_is_left_or_cancelled_ends_its_stream(aclient, scripted_extractor):
    scripted_extractor.faults.append(Fault("hang", after=2))

    async def follow():
        async for _ in aclient.extractions.watch(EXTRACTION_ID):
            pass

    watch = asyncio.create_task(follow())
    await until(lambda: scripted_extractor.calls["WatchExtraction"])
    watch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watch
    await until(lambda: idle(aclient))

    async for event in aclient.extractions.watch(EXTRACTION_ID):
        assert event.extraction.n_rows == 0
        break
    await until(lambda: idle(aclient))


async def until(condition, deadline_s=4.0):
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.01)


def idle(client):
    """True if no thread of the client is at work."""
    return client._threads._idle_semaphore._value == len(client._threads._threads)
