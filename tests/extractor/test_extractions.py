"""Extractions on one node: real runners, a registry in memory."""

import asyncio
import errno
from unittest.mock import AsyncMock

import pytest

from fix_runner import documents
from headrace.extractor.v1 import extraction_pb2 as pb
from headrace.extractor.v1 import extraction_service_pb2 as service_pb
from headrace_chassis.metrics import Metrics
from headrace_chassis.shutdown import Shutdown
from headrace_extractor import errors
from headrace_extractor.corpora.packing import SpecialTokens, count_rows
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.extractions.values import ExtractionState
from headrace_extractor.reading.row_stream import RowStream, StreamRequest
from headrace_extractor.rpc.extraction_servicer import ExtractionServicer
from headrace_extractor.sets.spec import Retention
from headrace_log import retention

pytestmark = pytest.mark.asyncio(loop_scope="module")

RECIPE = Recipe(context_size=64, batch_size=2, bos="document")
SPECIAL = SpecialTokens(bos_id=1, eos_id=2)
WINDOW = Retention(kind="window", window_bytes=2 * 1024 * 1024, reader_grace_s=30.0)


def n_rows_of(seed):
    n_rows, _ = count_rows(documents(400, seed=seed), RECIPE, SPECIAL)
    return n_rows


def held_of(job):
    return job.set.report()


def rows_of(content):
    return len(content["document"]) // 4


async def test_every_row_arrives_once_and_in_order(extractor):
    extractor.add_corpus(documents(400, seed=1))
    job = await extractor.extract()

    content, firsts, end = await extractor.read(job, chunk_bytes=10_000)

    assert firsts == sorted(set(firsts))
    assert rows_of(content) == end.next_row == end.n_rows == job.value.n_rows
    assert job.value.state == ExtractionState.DONE
    assert not job.value.cached
    assert len(content["blocks.1.hook_resid_post"]) == end.n_rows * 32 * 4


async def test_a_set_is_reported_as_its_folder_is_not_as_its_last_extraction(extractor):
    extractor.add_corpus(documents(4000, seed=61))
    whole = await extractor.extract()
    _, _, end = await extractor.read(whole)
    alone = held_of(whole)

    short = await extractor.extract(max_rows=50)
    await extractor.read(short)
    again = held_of(short)
    other = await extractor.extract(hookpoints=("blocks.0.hook_resid_post",), max_rows=50)
    await extractor.until(lambda: other.value.state.ended)
    both = held_of(other)

    assert alone.complete
    assert alone.n_rows == end.n_rows
    assert end.n_rows * (32 * 4 + 12) < alone.size_bytes < 2 * end.n_rows * (32 * 4 + 12)
    assert (again.n_rows, again.complete) == (alone.n_rows, True)
    assert set(both.columns) == {*alone.columns, "blocks.0.hook_resid_post"}
    assert both.size_bytes > alone.size_bytes
    assert other.value.size_bytes == 50 * (32 * 4 + 12)
    assert 50 <= both.n_rows <= alone.n_rows
    assert both.complete == (both.n_rows == alone.n_rows)


async def test_a_deleted_set_is_reported_as_gone(extractor):
    extractor.add_corpus(documents(40, seed=62))
    job = await extractor.extract()
    await extractor.read(job)

    retention.delete_set(job.folder)

    held = held_of(job)
    assert held.deleted
    assert (held.id, held.n_rows, held.size_bytes) == (job.value.set_id, 0, 0)


async def test_a_second_request_is_a_read(extractor):
    extractor.add_corpus(documents(400, seed=2))
    first, _, _ = await extractor.read(await extractor.extract())
    n_runners = len(extractor.runners)

    job = await extractor.extract()
    second, _, _ = await extractor.read(job)

    assert second == first
    assert job.value.cached
    assert len(extractor.runners) == n_runners


async def test_rows_requested_by_number_are_those_rows(extractor):
    extractor.add_corpus(documents(400, seed=3))
    job = await extractor.extract()
    everything, _, _ = await extractor.read(job)

    some, firsts, end = await extractor.read(job, start_row=1000, end_row=1500, columns=("position",))

    assert list(some) == ["position"]
    assert some["position"] == everything["position"][4000:6000]
    assert (firsts[0], end.next_row) == (1000, 1500)


async def test_whoever_asks_again_while_an_extraction_is_being_cancelled_gets_another(extractor):
    extractor.add_corpus(documents(4000, seed=36))
    job = await extractor.extract()
    await extractor.until(lambda: job.value.n_rows > 0)

    await job.cancel()
    again = await extractor.extract()
    content, _, _ = await extractor.read(again)

    assert again is not job
    assert job.value.state == ExtractionState.CANCELLED
    assert again.value.state == ExtractionState.DONE
    assert rows_of(content) == again.value.n_rows


async def test_equal_requests_share_one_extraction(extractor):
    extractor.add_corpus(documents(400, seed=7))

    one, two = await asyncio.gather(extractor.extract(), extractor.extract())

    assert one is two


async def test_repeated_request_id_answers_with_the_first_extraction(extractor):
    extractor.add_corpus(documents(400, seed=8))
    job = await extractor.extract()
    request_id = "6f1b6a1e-9c0e-4b7e-8a63-0c5f7d1e2a3b"
    first = await extractor.extractions.start(request_id, job.value.spec)
    await extractor.read(job)

    second = await extractor.extractions.start(request_id, job.value.spec)

    assert second.id == first.id


async def test_max_rows_is_exact_and_can_be_extended(extractor):
    extractor.add_corpus(documents(400, seed=9))
    content, _, end = await extractor.read(await extractor.extract(max_rows=777))
    assert (rows_of(content), end.n_rows) == (777, 777)

    job = await extractor.extract()
    whole, _, _ = await extractor.read(job)

    assert whole["position"][: 777 * 4] == content["position"]
    assert rows_of(whole) == n_rows_of(9)
    assert job.value.n_rows_computed == n_rows_of(9) - 777


async def test_an_extraction_cancelled_before_its_first_step_is_cancelled(extractor):
    extractor.add_corpus(documents(20, seed=6))
    job = await extractor.extract()  # Nothing was awaited since its task was made.
    await job.cancel()
    await extractor.until(lambda: job.value.state.ended)

    assert job.value.state == ExtractionState.CANCELLED


async def test_an_extraction_ends_although_its_rows_can_not_be_read(extractor, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    extractor.add_corpus(documents(4000, seed=97))
    job = await extractor.extract()
    monkeypatch.setattr(job.set, "n_rows", fail)
    await job.cancel()
    await extractor.until(lambda: job.value.state.ended)

    assert (job.value.state, job.value.n_rows) == (ExtractionState.CANCELLED, 0)


async def test_cancelled_extraction_keeps_its_rows_and_says_so(extractor):
    extractor.add_corpus(documents(4000, seed=12))
    job = await extractor.extract()
    await extractor.until(lambda: job.value.n_rows > 0)

    await job.cancel()
    await extractor.until(lambda: job.value.state.ended)

    assert job.value.state == ExtractionState.CANCELLED
    with pytest.raises(errors.ExtractionCancelled):
        await extractor.read(job)
    assert extractor.registry.leases == set()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model_id": "other"}, errors.ModelNotFound, "other"),
        ({"model_id": ""}, errors.FieldInvalid, "model_id"),
        ({"corpus_id": "other"}, errors.CorpusNotFound, "other"),
        ({"hookpoints": ("blocks.1.hook_resid_pots",)}, errors.HookpointNotFound, "hook_resid_pots"),
        ({"hookpoints": ("blocks.9.hook_resid_post",)}, errors.HookpointNotFound, "9"),
        ({"hookpoints": ()}, errors.FieldInvalid, "hookpoint"),
        ({"recipe": Recipe(context_size=1024)}, errors.FieldInvalid, "context_size"),
        ({"recipe": Recipe(chat_template=True)}, errors.FieldInvalid, "chat_template"),
        ({"max_rows": -1}, errors.FieldInvalid, "max_rows"),
        ({"retention": Retention(kind="window", window_bytes=5)}, errors.FieldInvalid, "window_bytes"),
    ],
)
async def test_bad_requests_are_refused_with_a_reason(extractor, changes, error, words):
    extractor.add_corpus(documents(400, seed=10))
    before = extractor.extractions.list()

    with pytest.raises(error, match=words):
        await extractor.extract(**changes)

    assert extractor.extractions.list() == before


@pytest.mark.parametrize(
    ("request_fields", "words"),
    [
        ({"chunk_bytes": 4_000_000}, "chunk_bytes"),
        ({"chunk_bytes": 17 * 2**20, "allow_large_chunks": True}, "chunk_bytes"),
        ({"start_row": -1}, "start_row"),
        ({"start_row": 9, "end_row": 3}, "end_row"),
        ({"columns": ("position", "position")}, "twice"),
        ({"reader": "x" * 256}, "255"),
    ],
)
async def test_bad_stream_requests_are_refused(request_fields, words):
    with pytest.raises(errors.FieldInvalid, match=words):
        StreamRequest(**request_fields)


async def test_cancelling_answers_with_the_state_after(extractor):
    extractor.add_corpus(documents(3000, seed=23))
    job = await extractor.extract()
    await extractor.until(lambda: job.value.n_rows > 0)
    servicer = ExtractionServicer(
        extractor.extractions, decode_tokens=AsyncMock(), metrics=Metrics(), shutdown=Shutdown()
    )

    answer = await servicer.CancelExtraction(service_pb.CancelExtractionRequest(extraction_id=job.id), None)

    assert answer.extraction.state == pb.EXTRACTION_STATE_CANCELLED
    assert answer.extraction.n_rows == job.value.n_rows > 0
    again = await servicer.CancelExtraction(service_pb.CancelExtractionRequest(extraction_id=job.id), None)
    assert again == answer


async def test_the_next_extraction_hears_nothing_of_a_cancelled_one(extractor):
    extractor.add_corpus(documents(3000, seed=21))
    first = await extractor.extract()
    await extractor.until(lambda: first.value.n_rows > 0)
    extractor.add_corpus(documents(400, seed=22))
    second = await extractor.extract()

    first.task.cancel()
    first.end_reason = errors.ExtractionCancelled("test")
    content, firsts, end = await extractor.read(second)

    assert end.n_rows == rows_of(content) == n_rows_of(22)
    assert firsts == sorted(set(firsts))
    assert first.value.state == ExtractionState.CANCELLED


async def test_an_extraction_behind_another_one_says_that_it_is_queued(extractor):
    extractor.add_corpus(documents(3000, seed=34))
    first = await extractor.extract(retention=WINDOW)
    await extractor.until(lambda: first.value.state == ExtractionState.WAITING)
    extractor.add_corpus(documents(400, seed=35))

    second = await extractor.extract()
    await extractor.until(lambda: second.value.queue_position == 1)

    assert second.value.state == ExtractionState.QUEUED
    await first.cancel()
    assert (await extractor.read(second))[2].n_rows == n_rows_of(35)
    assert second.value.queue_position == 0


async def test_an_extraction_that_ends_is_reported_at_once(extractor):
    """Its set may be deleted as soon as the registry knows that no extraction holds it."""
    extractor.add_corpus(documents(3000, seed=83))
    job = await extractor.extract()
    await extractor.until(lambda: job.value.n_rows > 0)
    reported = asyncio.Queue()

    async def report(each):
        await reported.put((each.value.id, each.value.state, each.set.holders))

    reporting = asyncio.create_task(extractor.extractions.report_changes(report, interval_s=600))
    await asyncio.sleep(0.05)
    await job.cancel()
    async with asyncio.timeout(10):
        while (word := await reported.get())[0] != job.value.id or not word[1].ended:
            pass
    reporting.cancel()

    assert word == (job.value.id, ExtractionState.CANCELLED, ())


async def test_whoever_lets_go_of_a_set_is_reported_at_once(extractor):
    """Not at the next interval: somebody may wait to delete it."""
    extractor.add_corpus(documents(50, seed=81))
    job = await extractor.extract()
    await asyncio.wait([job.task], timeout=30)
    reported = asyncio.Queue()

    async def report(job):
        await reported.put((job.value.id, len(job.set.holders)))

    reporting = asyncio.create_task(extractor.extractions.report_changes(report, interval_s=600.0))
    try:
        async with asyncio.timeout(30):
            RowStream(job, StreamRequest()).close()
            await _reports_of(job, reported)  # And of all that other tests have left to report.
            stream = RowStream(job, StreamRequest())
            await asyncio.sleep(0.2)
            before = reported.qsize()
            stream.close()
            found = await _reports_of(job, reported)
    finally:
        reporting.cancel()
    assert before == 0
    assert found == 0


async def _reports_of(job, reported):
    """Holders in the next report of a set, which is the last one of its round."""
    while True:
        extraction_id, n_holders = await reported.get()
        if extraction_id == job.value.id:
            return n_holders
