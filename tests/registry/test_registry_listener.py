"""Wakeups between replicas: few notifications for many changes, and none of one's own."""

from __future__ import annotations

import asyncio
import contextlib
import time

import psycopg

from fix_registry import until
from headrace_registry.postgres.server.listener import Listener
from headrace_registry.postgres.server.pool import Database
from headrace_registry.wakeups import Wakeups


@contextlib.asynccontextmanager
async def replica(url):
    """One replica's wakeups, listening."""
    database, wakeups = Database(url), Wakeups(poll_s=600)
    await database.open()
    listener = Listener(url, database, wakeups)
    running = asyncio.create_task(listener.run())
    try:
        async with asyncio.timeout(20):
            await listener.listening.wait()
        yield wakeups
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await database.close()


async def test_a_change_wakes_the_others_and_not_oneself_again(database_url):
    async with replica(database_url) as one, replica(database_url) as two:
        before_one, before_two = one.generation, two.generation
        waiting = asyncio.create_task(two.wait(before_two))
        one.wake()
        async with asyncio.timeout(20):
            await waiting
        two.wake()
        await until(lambda: one.generation == before_one + 2)

        assert two.generation == before_two + 2


async def test_many_changes_at_once_are_few_notifications(database_url):
    async with (
        replica(database_url) as wakeups,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn,
    ):
        await conn.execute("LISTEN headrace_registry")
        begun = time.monotonic()
        for _ in range(300):
            wakeups.wake()
            await asyncio.sleep(0.001)
        took_s = time.monotonic() - begun
        heard = [notice async for notice in conn.notifies(timeout=1.0)]

        assert 1 <= len(heard) <= took_s / 0.05 + 2


async def test_a_wait_ends_with_news_or_with_its_time():
    wakeups = Wakeups(poll_s=0.01)
    seen = wakeups.generation
    async with asyncio.timeout(20):
        await wakeups.wait(seen)
    assert wakeups.generation == seen

    slow = Wakeups(poll_s=600)
    waiting = asyncio.create_task(slow.wait(slow.generation))
    await asyncio.sleep(0)
    slow.heard()
    async with asyncio.timeout(20):
        await waiting
        await slow.wait(0)
