"""Several readers of a WINDOW set: nobody's rows go while it is away for a moment, and nobody waits for ever."""

import asyncio
from contextlib import aclosing

import pytest
from fix_runner import documents

from extractor_service.readers import FOR_GOOD
from extractor_service.row_stream import End, RowStream, StreamRequest
from extractor_service.values import ExtractionState, Retention
from extractor_service.ways import OrderRequest

pytestmark = pytest.mark.asyncio(loop_scope="module")

WINDOW_BYTES = 1024 * 1024
SOON_S = 20.0


async def start(extractor, seed, grace_s=60.0):
    extractor.add_corpus(documents(2000, seed=seed))
    retention = Retention(kind="window", window_bytes=WINDOW_BYTES, reader_grace_s=grace_s)
    return await extractor.extract(retention=retention)


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
    kept = await extractor.extract(corpus_id=job.value.spec.corpus_id)
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
