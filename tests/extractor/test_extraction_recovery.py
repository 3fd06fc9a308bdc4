"""What becomes of an extraction when runners die, nodes restart, and corpora and models change under it."""

import asyncio
import os
import signal
from dataclasses import replace

import pytest

from fix_runner import documents
from headrace_extractor import errors
from headrace_extractor.corpora.packing import SpecialTokens, count_rows
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.extractions.drive import MAX_FRUITLESS_TRIES, RECOVERY_DEADLINE_S
from headrace_extractor.extractions.values import ExtractionState
from headrace_extractor.reading.row_stream import RowStream, StreamRequest
from headrace_extractor.sets.spec import Retention

pytestmark = pytest.mark.asyncio(loop_scope="module")

RECIPE = Recipe(context_size=64, batch_size=2, bos="document")
SPECIAL = SpecialTokens(bos_id=1, eos_id=2)
WINDOW = Retention(kind="window", window_bytes=2 * 1024 * 1024, reader_grace_s=30.0)


def a_window(**changes):
    return Retention(**(WINDOW.to_json() | changes))


def n_rows_of(seed):
    n_rows, _ = count_rows(documents(400, seed=seed), RECIPE, SPECIAL)
    return n_rows


def rows_of(content):
    return len(content["document"]) // 4


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
