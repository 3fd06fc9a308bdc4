import asyncio
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from fix_extractor import model_info
from fix_runner import documents
from transformers import AutoModelForCausalLM

from activation_log import retention
from activation_log.manifest import Manifest
from extractor_service import errors
from extractor_service.held_set import HeldSet
from extractor_service.packing import SpecialTokens, count_rows
from extractor_service.recipe import Recipe
from extractor_service.row_stream import RowStream, StreamRequest
from extractor_service.set_passes import MAX_FRUITLESS_TRIES, RECOVERY_DEADLINE_S
from extractor_service.values import ExtractionState, Retention

pytestmark = pytest.mark.asyncio(loop_scope="module")

RECIPE = Recipe(context_size=64, batch_size=2)
SPECIAL = SpecialTokens(bos_id=1, eos_id=2)
BROKEN_TOKEN = 96
WINDOW = Retention(kind="window", window_bytes=2 * 1024 * 1024, reader_grace_s=30.0)


def a_window(**changes):
    return Retention(**(WINDOW.to_json() | changes))


def n_rows_of(seed):
    n_rows, _ = count_rows(documents(400, seed=seed), RECIPE, SPECIAL)
    return n_rows


def held_of(job):
    return HeldSet.at(job.folder, set_id=job.value.set_id)


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


async def test_killed_runner_costs_no_row_and_no_bit(extractor, start_extractor):
    extractor.add_corpus(documents(400, seed=4))
    quiet, _, _ = await extractor.read(await extractor.extract())
    other = await start_extractor()
    other.add_corpus(documents(400, seed=4))
    job = await other.extract(retention=a_window(window_bytes=64 * 1024 * 1024))
    killed = []

    def kill_once(run):
        if not killed and run.end_row > 2000:
            killed.append(other.runners[-1].pid)
            os.kill(killed[0], signal.SIGKILL)

    disturbed, firsts, _ = await other.read(job, chunk_bytes=20_000, on_run=kill_once)

    assert killed
    assert len(other.runners) == 2
    assert firsts == sorted(set(firsts))
    assert disturbed == quiet


async def test_a_runner_that_always_dies_ends_in_runner_lost(start_extractor, monkeypatch):
    extractor = await start_extractor()
    extractor.add_corpus(documents(400, seed=5))
    start = extractor._start_runner

    async def start_and_kill(*, environment):
        runner = await start(environment=environment)
        os.kill(runner.pid, signal.SIGKILL)
        return runner

    monkeypatch.setattr(extractor.node, "_start_runner", start_and_kill)
    job = await extractor.extract()

    with pytest.raises(errors.RunnerLost):
        await extractor.read(job)

    assert job.value.state == ExtractionState.FAILED
    assert job.value.failure.reason == "RUNNER_LOST"


async def test_a_pause_the_registry_asks_for_is_no_try(start_extractor):
    extractor = await start_extractor()
    extractor.add_corpus(documents(50, seed=5))
    extractor.registry.pauses = [0.01] * (MAX_FRUITLESS_TRIES + 1)
    job = await extractor.extract()
    await extractor.read(job)

    assert job.value.state == ExtractionState.DONE
    assert not extractor.registry.pauses


async def test_a_pause_beyond_the_deadline_ends_in_runner_lost_at_once(start_extractor):
    extractor = await start_extractor()
    extractor.add_corpus(documents(50, seed=5))
    extractor.registry.pauses = [RECOVERY_DEADLINE_S + 1]
    job = await extractor.extract()

    with pytest.raises(errors.RunnerLost, match="tried again later"):
        await extractor.read(job)


async def test_restarted_node_goes_on_where_it_was(extractor):
    extractor.add_corpus(documents(400, seed=6))
    job = await extractor.extract(hookpoints=("blocks.0.hook_resid_pre",))
    await extractor.until(lambda: job.value.n_rows > 1000)
    stream = RowStream(job, StreamRequest(end_row=800))
    head = {column.name: b"" for column in stream.set_reader.columns}
    async for event in stream.events():
        if hasattr(event, "columns"):
            for column, view in zip(stream.set_reader.columns, event.columns, strict=True):
                head[column.name] += bytes(view)
    stream.close()
    await extractor.stop()

    await extractor.start()
    again = extractor.extractions.get(job.value.id)
    tail, firsts, end = await extractor.read(again, start_row=800)

    assert firsts[0] == 800
    assert end.n_rows == n_rows_of(6)
    whole, _, _ = await extractor.read(again)
    assert {name: head[name] + tail[name] for name in head} == whole


async def test_a_set_gets_no_rows_of_documents_that_came_under_the_same_name(start_extractor):
    extractor = await start_extractor()
    extractor.corpora.ingest_tokens("mine", documents(400, seed=31))
    short = await extractor.extract(corpus_id="mine", max_rows=777)
    head, _, _ = await extractor.read(short)
    await asyncio.wait([short.task])
    extractor.corpora.delete("mine")
    extractor.corpora.ingest_tokens("mine", documents(400, seed=32))
    extractor.corpora.ingest_tokens("mine-before", documents(400, seed=31))

    job = await extractor.extract(corpus_id="mine-before")
    content, _, _ = await extractor.read(job)

    assert job.folder == short.folder
    assert content["token_id"][: 777 * 4] == head["token_id"]
    assert rows_of(content) == n_rows_of(31)


async def test_a_node_starts_although_a_corpus_of_an_ended_extraction_is_gone(start_extractor):
    extractor = await start_extractor()
    extractor.add_corpus(documents(20, seed=33))
    job = await extractor.extract()
    content, _, _ = await extractor.read(job)
    await asyncio.wait([job.task])
    extractor.corpora.delete(job.value.spec.corpus_id)
    await extractor.stop()

    await extractor.start()

    again, _, _ = await extractor.read(extractor.extractions.get(job.value.id))
    assert again == content


async def test_rows_of_another_model_than_the_one_begun_with_are_refused(start_extractor):
    extractor = await start_extractor()
    extractor.add_corpus(documents(4000, seed=34))
    job = await extractor.extract()
    await extractor.until(lambda: job.value.n_rows > 0)
    await extractor.stop()
    model = extractor.registry.models["tiny"]
    extractor.registry.models["tiny"] = replace(model, load_options={"dtype": "bfloat16"})

    await extractor.start()
    again = extractor.extractions.get(job.value.id)
    await asyncio.wait([again.task], timeout=30)

    assert (again.value.state, again.value.failure.reason) == (ExtractionState.FAILED, "STATE_CONFLICT")
    assert "load_options" in again.value.failure.message


async def test_a_model_computes_what_it_was_loaded_with_whatever_the_registry_says_later(start_extractor):
    extractor = await start_extractor()
    extractor.add_corpus(documents(20, seed=35))
    await extractor.read(await extractor.extract())
    ((residency_id, held),) = extractor.registry.assigned.items()
    changed = replace(held.model, load_options={"dtype": "bfloat16"})
    extractor.registry.models["tiny"] = changed
    extractor.registry.assigned[residency_id] = replace(held, model=changed)
    extractor.registry._notify()
    await asyncio.sleep(0.2)

    job = await extractor.extract()
    await asyncio.wait([job.task], timeout=30)

    assert job.value.failure.reason == "STATE_CONFLICT"


@pytest.fixture
def broken_model(tiny_llama, tmp_path):
    """A model that gives NaN for one token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN_TOKEN] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    return model_info(tmp_path / "broken", "broken")


async def test_nobody_gets_values_that_only_others_allow(start_extractor, broken_model):
    extractor = await start_extractor()
    extractor.registry.models["broken"] = broken_model
    extractor.add_corpus([*documents(200, seed=37), [5, BROKEN_TOKEN, 6]])
    recipe = Recipe(context_size=64, batch_size=2, packing="one_document")
    request = {"model_id": "broken", "recipe": recipe}
    lenient = await extractor.extract(**request, allow_non_finite=True)
    content, _, _ = await extractor.read(lenient)
    await asyncio.wait([lenient.task])
    strict = await extractor.extract(**request)
    await asyncio.wait([strict.task], timeout=30)
    is_broken = np.isnan(np.frombuffer(content[lenient.columns[-1]], np.float32)).reshape(lenient.value.n_rows, -1)
    n_broken, first_broken = is_broken.sum(), int(is_broken.any(1).argmax())
    early = await extractor.extract(**request, max_rows=first_broken)
    await asyncio.wait([early.task], timeout=30)
    late = await extractor.extract(**request, max_rows=first_broken + 1, allow_non_finite=True)
    await asyncio.wait([late.task], timeout=30)

    assert lenient.value.n_non_finite == n_broken > 0
    assert strict.value.failure.reason == "NON_FINITE"
    assert lenient.columns[-1] in strict.value.failure.message
    # One segment holds them all; of that, what is not asked for does not count.
    assert early.value.state == ExtractionState.DONE
    assert (early.value.n_rows, early.value.n_rows_computed, early.value.n_non_finite) == (first_broken, 0, 0)
    assert late.value.n_non_finite == is_broken[first_broken].sum()

    await extractor.stop()
    await extractor.start()
    assert extractor.extractions.get(lenient.value.id).value.n_non_finite == n_broken


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


async def test_model_that_does_not_load_fails_the_extraction_with_the_reason(extractor, tmp_path):
    extractor.add_corpus(documents(400, seed=11))
    (tmp_path / "empty").mkdir()
    model = extractor.registry.models["tiny"]
    extractor.registry.models["broken"] = type(model)(
        **{f: getattr(model, f) for f in model.__slots__} | {"id": "broken", "files_path": str(tmp_path / "empty")}
    )

    job = await extractor.extract(model_id="broken")
    await extractor.until(lambda: job.value.state.ended)

    assert job.value.failure.reason in ("LOAD_FAILED", "MODEL_UNSUPPORTED")


async def test_the_next_extraction_hears_nothing_of_a_cancelled_one(extractor):
    extractor.add_corpus(documents(3000, seed=21))
    first = await extractor.extract()
    await extractor.until(lambda: first.value.n_rows > 0)
    extractor.add_corpus(documents(400, seed=22))
    second = await extractor.extract()

    first.task.cancel()
    first.stop = errors.ExtractionCancelled("test")
    content, firsts, end = await extractor.read(second)

    assert end.n_rows == rows_of(content) == n_rows_of(22)
    assert firsts == sorted(set(firsts))
    assert first.value.state == ExtractionState.CANCELLED


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


async def test_a_new_hookpoint_is_a_new_column_of_the_same_set(extractor, start_extractor):
    extractor.add_corpus(documents(400, seed=31))
    first = await extractor.extract(hookpoints=("blocks.1.hook_resid_post",))
    one, _, _ = await extractor.read(first)
    both = await extractor.extract(hookpoints=("blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"))
    content, firsts, end = await extractor.read(both)
    other = await start_extractor()
    other.add_corpus(documents(400, seed=31))
    at_once, _, _ = await other.read(
        await other.extract(hookpoints=("blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"))
    )

    assert both.folder == first.folder
    assert firsts == sorted(set(firsts))
    assert end.n_rows == n_rows_of(31)
    assert content == at_once
    assert {name: content[name] for name in one} == one
    again = await extractor.extract(hookpoints=("blocks.0.hook_mlp_out",))
    assert (await extractor.read(again))[2].n_rows == n_rows_of(31)
    assert again.value.cached


async def test_columns_of_different_length_are_brought_level(extractor):
    extractor.add_corpus(documents(400, seed=32))
    await extractor.read(await extractor.extract(hookpoints=("blocks.1.hook_resid_post",), max_rows=5000))
    await extractor.read(await extractor.extract(hookpoints=("blocks.2.hook_resid_pre",), max_rows=700))

    job = await extractor.extract(hookpoints=("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"))
    content, firsts, end = await extractor.read(job)

    assert end.n_rows == n_rows_of(32)
    assert firsts == sorted(set(firsts))
    # What enters block 2 is what left block 1.
    assert content["blocks.1.hook_resid_post"] == content["blocks.2.hook_resid_pre"]


async def test_cancelling_while_a_column_is_added_leaves_a_set_that_goes_on(extractor):
    extractor.add_corpus(documents(3000, seed=33))
    await extractor.read(await extractor.extract(hookpoints=("blocks.1.hook_resid_post",)))
    job = await extractor.extract(hookpoints=("blocks.2.hook_resid_pre",))
    await extractor.until(lambda: job.value.n_rows > 0)
    await job.cancel()
    await extractor.until(lambda: job.value.state.ended)

    again = await extractor.extract(hookpoints=("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"))
    content, _, _ = await extractor.read(again)

    assert content["blocks.1.hook_resid_post"] == content["blocks.2.hook_resid_pre"]


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


async def test_whoever_lets_go_of_a_set_is_reported_at_once(extractor):
    """Not at the next interval: somebody may wait to delete it."""
    extractor.add_corpus(documents(50, seed=81))
    job = await extractor.extract()
    await asyncio.wait([job.task], timeout=30)
    reported = asyncio.Queue()

    async def report(job):
        await reported.put((job.value.id, len(extractor.extractions.holders(job.folder))))

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
