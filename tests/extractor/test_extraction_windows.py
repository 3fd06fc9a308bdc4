"""WINDOW sets: rows that go when they are released, and what is left without a reader."""

import asyncio

import pytest

from fix_runner import documents
from headrace_extractor import errors
from headrace_extractor.extractions.values import ExtractionState
from headrace_extractor.reading.row_stream import RowStream, StreamRequest
from headrace_extractor.sets.spec import Retention
from headrace_log import retention
from headrace_log.manifest import Manifest

pytestmark = pytest.mark.asyncio(loop_scope="module")

WINDOW = Retention(kind="window", window_bytes=2 * 1024 * 1024, reader_grace_s=30.0)


def a_window(**changes):
    return Retention(**(WINDOW.to_json() | changes))


def rows_of(content):
    return len(content["document"]) // 4


async def test_window_stops_the_forward_pass_behind_a_reader_that_stops(extractor):
    extractor.add_corpus(documents(4000, seed=13))
    job = await extractor.extract(retention=WINDOW)
    manifest = Manifest.load(job.folder)
    stream = RowStream(job, StreamRequest(reader="the slow one", explicit_release=True))
    try:
        await extractor.until(lambda: job.value.state == ExtractionState.WAITING)

        assert [reader.reader for reader in job.value.waiting_for] == ["the slow one"]
        assert job.value.n_rows * manifest.row_bytes <= WINDOW.window_bytes
        stopped_at = job.value.n_rows
        await asyncio.sleep(0.5)
        assert job.value.n_rows == stopped_at

        job.release("the slow one", stopped_at)
        await extractor.until(lambda: job.value.n_rows > stopped_at)
    finally:
        stream.close()
        await job.cancel()


async def test_window_gives_every_row_although_it_never_holds_them_all(extractor):
    extractor.add_corpus(documents(2000, seed=14))
    largest = 0

    def watch(run):
        nonlocal largest
        largest = max(largest, retention.size_bytes(job.folder))

    job = await extractor.extract(retention=WINDOW)
    content, firsts, end = await extractor.read(job, chunk_bytes=50_000, on_run=watch)

    assert rows_of(content) == end.n_rows > 4 * WINDOW.window_bytes // Manifest.load(job.folder).row_bytes
    assert firsts == sorted(set(firsts))
    # Headers are beside the rows.
    assert largest <= WINDOW.window_bytes + 64 * 4096


async def test_window_without_a_reader_frees_everything_after_its_grace(extractor):
    extractor.add_corpus(documents(4000, seed=15))
    job = await extractor.extract(retention=a_window(reader_grace_s=0.3))

    await extractor.until(lambda: job.value.state == ExtractionState.FAILED)
    await extractor.until(lambda: not job.folder.exists())

    assert job.value.failure.reason == "READER_STALLED"
    assert extractor.registry.leases == set()


async def test_disconnected_reader_frees_everything_after_the_grace(extractor):
    extractor.add_corpus(documents(4000, seed=16))
    job = await extractor.extract(retention=a_window(reader_grace_s=0.3))
    stream = RowStream(job, StreamRequest())
    events = stream.events()
    await anext(events)

    await events.aclose()
    stream.close()

    await extractor.until(lambda: not job.folder.exists())
    assert job.value.readers == ()
    assert extractor.registry.leases == set()


async def test_reader_can_come_back_within_the_grace(extractor):
    extractor.add_corpus(documents(2000, seed=17))
    job = await extractor.extract(retention=a_window(reader_grace_s=20.0))
    head = RowStream(job, StreamRequest(end_row=500, explicit_release=True))
    async for _ in head.events():
        pass
    head.close()

    content, firsts, end = await extractor.read(job, start_row=500)

    assert firsts[0] == 500
    assert rows_of(content) == end.n_rows - 500


async def test_rows_that_went_by_are_out_of_range(extractor):
    extractor.add_corpus(documents(2000, seed=18))
    job = await extractor.extract(retention=WINDOW)
    stream = RowStream(job, StreamRequest())
    async for event in stream.events():
        if getattr(event, "first_row", 0) > 20_000:
            break

    with pytest.raises(errors.RowsExpired) as caught:
        RowStream(job, StreamRequest(start_row=0))

    assert int(caught.value.metadata["first_available_row"]) > 0
    stream.close()
    await job.cancel()


async def test_ended_window_is_not_computed_again_after_a_restart(start_extractor):
    extractor = await start_extractor()
    extractor.add_corpus(documents(3000, seed=23))
    job = await extractor.extract(retention=a_window(reader_grace_s=0.2))
    await extractor.until(lambda: job.value.n_rows > 0)
    await job.cancel()
    await extractor.until(lambda: job.value.state.ended)
    await extractor.stop()

    await extractor.start()

    assert all(job.value.state.ended for job in extractor.extractions.list())
    await extractor.until(lambda: not job.folder.exists())


@pytest.mark.parametrize("name", ["manifest.json", "dropped.json"])
async def test_a_node_starts_with_a_damaged_window_and_frees_it(start_extractor, name):
    extractor = await start_extractor()
    extractor.add_corpus(documents(3000, seed=24))
    job = await extractor.extract(retention=a_window())
    await extractor.until(lambda: job.value.n_rows > 0)
    await extractor.stop()
    (job.folder / name).write_bytes(b"\xff")

    await extractor.start()

    again = extractor.extractions.get(job.value.id).value
    assert (again.state, again.failure.reason) == (ExtractionState.FAILED, "DIGEST_MISMATCH")
    assert "start it again" in again.failure.message
    assert not job.folder.exists()


async def test_a_node_starts_with_a_damaged_manifest_of_a_set_that_is_kept(start_extractor):
    extractor = await start_extractor()
    extractor.add_corpus(documents(3000, seed=25))
    job = await extractor.extract()
    await extractor.until(lambda: job.value.n_rows > 0)
    await extractor.stop()
    (job.folder / "manifest.json").write_bytes(b"\xff")

    await extractor.start()

    again = extractor.extractions.get(job.value.id)
    await extractor.until(lambda: again.value.state.ended)
    assert again.value.failure.reason == "DIGEST_MISMATCH"
    assert "delete the set" in again.value.failure.message
    assert job.folder.exists()
