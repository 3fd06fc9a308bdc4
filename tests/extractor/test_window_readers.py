"""Several readers of a WINDOW set: nobody's rows go while it is away for a moment, and nobody waits for ever."""

import asyncio
import time
from contextlib import aclosing

import pytest

from fix_runner import documents
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.extractions.readers import FOR_GOOD, Readers, shard_key
from headrace_extractor.extractions.values import ExtractionState
from headrace_extractor.reading.reading_order import OrderRequest
from headrace_extractor.reading.row_stream import End, RowStream, StreamRequest
from headrace_extractor.sets.spec import Retention
from headrace_log.order import Shard

pytestmark = pytest.mark.asyncio(loop_scope="module")

WINDOW_BYTES = 1024 * 1024
SOON_S = 20.0
# Larger batches than usual: what is tested here are rows and readers, and passes took half of the time.
FAST = Recipe(context_size=64, batch_size=16)


async def start(extractor, seed, grace_s=60.0):
    extractor.add_corpus(documents(2000, seed=seed))
    retention = Retention(kind="window", window_bytes=WINDOW_BYTES, reader_grace_s=grace_s)
    return await extractor.extract(retention=retention, recipe=FAST)


async def read(stream, n_rows=0):
    """Token ids of so many rows at least; 0: of all that come."""
    content = b""
    async with asyncio.timeout(SOON_S), aclosing(stream.events()) as events:
        async for event in events:
            if isinstance(event, End):
                break
            if getattr(event, "columns", ()):
                content += bytes(event.columns[0])
            if n_rows and len(content) >= 4 * n_rows:
                break
    return content


def open_stream(job, reader, **request):
    return RowStream(job, StreamRequest(columns=("token_id",), reader=reader, chunk_bytes=4096, **request))


async def whole(extractor, job):
    """The same rows of a set that keeps them."""
    kept = await extractor.extract(corpus_id=job.value.spec.corpus_id, recipe=FAST)
    content, _, _ = await extractor.read(kept)
    return content["token_id"]


async def until_waiting(extractor, job):
    await extractor.until(lambda: job.value.state == ExtractionState.WAITING)


async def test_rows_of_a_reader_that_was_cut_off_wait_for_it(extractor):
    job = await start(extractor, seed=51)
    fast, slow = open_stream(job, "fast"), open_stream(job, "slow")
    head = await read(slow, 500)
    slow.close()
    reading = asyncio.create_task(read(fast))
    await until_waiting(extractor, job)
    waiting_for = job.value.waiting_for

    again = open_stream(job, "slow", start_row=len(head) // 4)
    tail, content = await asyncio.gather(read(again), reading)
    again.close()
    fast.close()

    assert [status.reader for status in waiting_for] == ["slow"]
    assert head + tail == content == await whole(extractor, job)


async def test_rows_that_were_sent_to_the_last_wait_until_they_are_released(extractor):
    """Their reader may be killed before it has brought them to safety."""
    job = await start(extractor, seed=56)
    fast, slow = open_stream(job, "fast"), open_stream(job, "slow", end_row=500, explicit_release=True)
    await read(slow)
    slow.close()
    reading = asyncio.create_task(read(fast))
    await until_waiting(extractor, job)
    waiting_for = job.value.waiting_for

    job.release("slow", FOR_GOOD)
    content = await reading
    fast.close()

    assert [(status.reader, status.next_row) for status in waiting_for] == [("slow", 0)]
    assert content == await whole(extractor, job)


async def test_a_reader_that_has_released_all_it_was_sent_holds_nobody_up(extractor):
    job = await start(extractor, seed=57)
    fast, slow = open_stream(job, "fast"), open_stream(job, "slow", end_row=500, explicit_release=True)
    await read(slow)
    job.release("slow", 500)
    slow.close()

    content = await read(fast)
    fast.close()

    assert content == await whole(extractor, job)


async def test_what_a_reader_releases_after_its_end_was_sent_counts(extractor):
    """A client has up to its queue's bytes before it when the server is done with it."""
    job = await start(extractor, seed=58)
    fast, slow = open_stream(job, "fast"), open_stream(job, "slow", end_row=500, explicit_release=True)
    await read(slow)
    slow.close()
    reading = asyncio.create_task(read(fast))
    await until_waiting(extractor, job)
    job.release("slow", 250)
    half = job.value.waiting_for

    job.release("slow", 500)
    content = await reading
    fast.close()

    assert [(status.reader, status.next_row) for status in half] == [("slow", 0)]
    assert content == await whole(extractor, job)


async def test_what_a_new_connection_has_released_outlasts_the_one_that_broke():
    """The server may notice later than the client that a connection is dead."""
    readers = Readers()
    broken = readers.attach("me", 0)
    readers.release("me", 100, until=time.monotonic() + 60)
    readers.attach("me", 500)
    readers.release("me#2", 400, until=time.monotonic() + 60)
    readers.detach(broken, back_until=time.monotonic() + 60)

    assert readers.released_row(0) == 500
    assert readers.all_back()


async def test_a_connection_that_has_released_nothing_has_what_the_broken_one_had_left():
    readers = Readers()
    broken = readers.attach("me", 0)
    readers.attach("me", 500)
    readers.release("me", 100, until=time.monotonic() + 60)
    readers.detach(broken, back_until=time.monotonic() + 60)

    assert readers.released_row(0) == 100


async def test_a_shard_that_left_for_good_while_it_was_away_is_expected_no_more():
    readers, until = Readers(), time.monotonic() + 60
    keys = [shard_key(Shard(index, 2)) for index in range(2)]
    first = readers.attach("rank-0", 0, shard=keys[0])
    readers.expect(2, 0, until=until)
    readers.detach(first, back_until=until)
    readers.release("rank-0", FOR_GOOD, until=until)
    readers.attach("rank-1", 700, shard=keys[1])
    readers.release("rank-1", 900, until=until)
    readers.expect(2, 0, until=until)

    assert [status.reader for status in readers.slowest()] == ["rank-1"]


async def test_a_reader_that_says_good_bye_holds_nobody_up(extractor):
    job = await start(extractor, seed=52)
    fast, slow = open_stream(job, "fast"), open_stream(job, "slow")
    await read(slow, 500)
    slow.close()
    job.release("slow", FOR_GOOD)

    content = await read(fast)
    fast.close()

    assert content == await whole(extractor, job)


async def test_a_reader_that_says_good_bye_before_it_closes_holds_nobody_up(extractor):
    job = await start(extractor, seed=53)
    fast, slow = open_stream(job, "fast"), open_stream(job, "slow")
    await read(slow, 500)
    job.release("slow", FOR_GOOD)
    slow.close()

    content = await read(fast)
    fast.close()

    assert content == await whole(extractor, job)


async def test_a_reader_that_does_not_come_back_is_waited_for_no_longer_than_its_grace(extractor):
    job = await start(extractor, seed=54, grace_s=1.0)
    fast, slow = open_stream(job, "fast"), open_stream(job, "slow")
    await read(slow, 500)
    slow.close()
    reading = asyncio.create_task(read(fast))
    await until_waiting(extractor, job)
    waiting_for = job.value.waiting_for

    content = await reading
    fast.close()

    assert [status.reader for status in waiting_for] == ["slow"]
    assert content == await whole(extractor, job)


async def test_the_first_rows_of_a_shard_wait_for_it(extractor):
    job = await start(extractor, seed=55)
    first = open_stream(job, "rank-0", order=OrderRequest(shard_index=0, shard_count=2, block_rows=64))
    reading = asyncio.create_task(read(first))
    await until_waiting(extractor, job)
    waiting_for = job.value.waiting_for

    second = open_stream(job, "rank-1", order=OrderRequest(shard_index=1, shard_count=2, block_rows=64))
    other, one = await asyncio.gather(read(second), reading)
    first.close()
    second.close()

    assert [status.reader for status in waiting_for] == ["shard 1 of 2"]
    assert len(one) == len(other) > 4 * 1000
    rows = await whole(extractor, job)
    assert (one[:256], other[:256]) == (rows[:256], rows[256:512])
