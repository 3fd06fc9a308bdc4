"""Watches: events, heartbeats, the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from headrace_chassis.errors import ShuttingDown
from headrace_chassis.shutdown import Shutdown
from headrace_chassis.watch import watch


class Source:
    """Events one at a time, and whether they were closed."""

    def __init__(self, *events: str, pause_s: float = 0.0, then_wait: bool = False, error: Exception | None = None):
        self.events, self.pause_s, self.then_wait, self.error = events, pause_s, then_wait, error
        self.closed = False

    async def __call__(self) -> AsyncIterator[str]:
        try:
            for event in self.events:
                await asyncio.sleep(self.pause_s)
                yield event
            if self.error is not None:
                raise self.error
            if self.then_wait:
                await asyncio.sleep(3600)
        finally:
            self.closed = True


def watching(source: Source, shutdown: Shutdown, interval_s: float = 5.0):
    return watch(source(), heartbeat=lambda: "♥", shutdown=shutdown, interval_s=interval_s)


async def test_watch_yields_events_and_ends_with_them():
    source = Source("a", "b")

    assert [event async for event in watching(source, Shutdown())] == ["a", "b"]
    assert source.closed


async def test_silence_is_filled_with_heartbeats_and_no_event_is_lost():
    source = Source("a", "b", pause_s=0.12)

    events = [event async for event in watching(source, Shutdown(), interval_s=0.05)]

    assert [event for event in events if event != "♥"] == ["a", "b"]
    assert events.count("♥") >= 3


async def test_shutdown_ends_a_waiting_watch_at_once():
    source, shutdown = Source("a", then_wait=True), Shutdown()
    asyncio.get_running_loop().call_later(0.05, shutdown.begin)

    events = watching(source, shutdown)

    assert await anext(events) == "a"
    with pytest.raises(ShuttingDown) as caught:
        await asyncio.wait_for(anext(events), timeout=2)
    assert source.closed
    assert caught.value.retry_after_s == 1.0


async def test_shutdown_ends_a_watch_that_never_falls_silent():
    shutdown = Shutdown()
    events = watching(Source(*"abcdefgh"), shutdown)
    assert [await anext(events), await anext(events)] == ["a", "b"]

    shutdown.begin()

    with pytest.raises(ShuttingDown):
        await anext(events)


async def test_error_of_the_source_comes_through():
    source = Source("a", error=LookupError("gone"))

    with pytest.raises(LookupError, match="gone"):
        [event async for event in watching(source, Shutdown())]


async def test_closing_a_watch_closes_its_source():
    source = Source("a", then_wait=True)

    async with aclosing(watching(source, Shutdown())) as events:
        assert await anext(events) == "a"

    assert source.closed


async def test_cancelling_a_watch_closes_its_source():
    source = Source(then_wait=True)

    async def consume() -> None:
        async with aclosing(watching(source, Shutdown())) as events:
            async for _ in events:
                pass

    task = asyncio.create_task(consume())
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.wait({task}, timeout=2)

    assert task.cancelled()
    assert source.closed


async def test_watch_leaves_no_task_behind():
    before = asyncio.all_tasks()

    async with aclosing(watching(Source("a", then_wait=True), Shutdown())) as events:
        await anext(events)
    await asyncio.sleep(0)

    assert asyncio.all_tasks() == before


async def test_shutdown_check_raises_only_once_begun():
    shutdown = Shutdown()
    shutdown.check()

    shutdown.begin()

    assert shutdown.begun
    await shutdown.wait()
    with pytest.raises(ShuttingDown):
        shutdown.check()
