"""Every load leaves an attempt, which can be noted and whose options can be made the model's."""

from __future__ import annotations

import psycopg
import pytest

from fix_postgres import refused
from fix_registry import STATES, acquire, ready_model, until, until_residency
from headrace.registry.v1 import model_pb2 as m
from headrace.registry.v1 import model_service_pb2 as pb
from headrace.registry.v1 import residency_service_pb2 as residencies_pb

OLD_ATTEMPTS = """
INSERT INTO validation_attempts (id, model_id, node_id, device_id, node_epoch, load_options, quantization,
                                 reserved_bytes, done, held, expire_time, create_time)
SELECT 'old-' || n, 'tiny', 'node-a', 'cpu', 1, '{}', 'NONE', 0, true, false, registry_now(),
       registry_now() - make_interval(days => n)
FROM generate_series(1, 150) n
"""
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}


@pytest.fixture
async def slow(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    return await start_node(slow_load=True)


async def attempts(stubs, **fields):
    return await stubs.models.ListAttempts(pb.ListAttemptsRequest(model_id="tiny", **fields), timeout=20)


async def load(stubs):
    answer = await stubs.residencies.LoadModel(residencies_pb.LoadModelRequest(model_id="tiny"), timeout=20)
    return await until_residency(stubs, answer.residency.id, STATES.RESIDENCY_STATE_LOADING)


async def test_a_load_leaves_an_attempt_with_options_versions_time_and_log(registry, slow):
    residency = await load(registry.stubs)
    await slow.report(
        residency,
        STATES.RESIDENCY_STATE_RESIDENT,
        measured_bytes=4096,
        versions=VERSIONS,
        log_tail="x" * 9000 + "\nlast line\n",
    )
    [attempt] = (await attempts(registry.stubs)).attempts

    assert (attempt.kind, attempt.residency_id) == (m.ATTEMPT_KIND_LOAD, residency.id)
    assert (attempt.done, attempt.passed, attempt.node_id, attempt.device_id) == (True, True, "node-a", "cpu")
    assert dict(attempt.versions) == VERSIONS
    assert attempt.log_tail.rstrip().endswith("last line")
    assert len(attempt.log_tail) <= 8192
    [step] = attempt.steps
    assert (step.name, step.state, step.figures["measured_bytes"]) == ("load", m.VALIDATION_STEP_STATE_PASSED, 4096)
    assert 0 < step.seconds < 20


async def test_a_failed_load_leaves_one_too_and_it_can_not_be_adopted(registry, slow):
    residency = await load(registry.stubs)
    failure = m.Failure(reason="DEVICE_OOM", message="out of memory; take a smaller dtype")
    await slow.report(residency, STATES.RESIDENCY_STATE_FAILED, failure=failure, log_tail="CUDA error\n")
    [attempt] = (await attempts(registry.stubs)).attempts
    adopted = await refused(registry.stubs.models.AdoptAttempt(pb.AdoptAttemptRequest(attempt_id=attempt.id)))

    assert (attempt.passed, attempt.failure.reason) == (False, "DEVICE_OOM")
    assert attempt.steps[0].state == m.VALIDATION_STEP_STATE_FAILED
    assert (await attempts(registry.stubs, passed_only=True)).total_size == 0
    assert adopted.reason == "STATE_CONFLICT"


async def test_notes_are_kept_and_an_unknown_attempt_is_not_found(registry, slow):
    await slow.report(await load(registry.stubs), STATES.RESIDENCY_STATE_RESIDENT)
    [attempt] = (await attempts(registry.stubs)).attempts

    async def note(attempt_id, notes):
        return await registry.stubs.models.NoteAttempt(pb.NoteAttemptRequest(attempt_id=attempt_id, notes=notes))

    noted = await note(attempt.id, "fast on this card")

    assert noted.attempt.notes == "fast on this card"
    assert [one.notes for one in (await attempts(registry.stubs)).attempts] == ["fast on this card"]
    assert (await refused(note("nobody", "x"))).reason == "ATTEMPT_NOT_FOUND"
    assert (await refused(note(attempt.id, "x" * 3000))).fields == ("notes",)


async def test_a_good_attempt_s_options_become_the_model_s(registry, slow):
    await slow.report(await load(registry.stubs), STATES.RESIDENCY_STATE_RESIDENT)
    await registry.stubs.residencies.UnloadModel(residencies_pb.UnloadModelRequest(model_id="tiny"), timeout=20)
    changed = m.Model(id="tiny")
    changed.load_options.update({"attn_implementation": "eager"})
    update = pb.UpdateModelRequest(model=changed)
    update.update_mask.paths.append("load_options")
    slow.load_gate.set()
    await until(lambda: not slow.held)
    await until(lambda: unloaded(registry.stubs))
    await registry.stubs.models.UpdateModel(update, timeout=20)
    [attempt] = (await attempts(registry.stubs, kind=m.ATTEMPT_KIND_LOAD)).attempts

    adopted = await registry.stubs.models.AdoptAttempt(pb.AdoptAttemptRequest(attempt_id=attempt.id), timeout=20)

    assert dict(attempt.load_options) == {}
    assert dict(adopted.model.load_options) == {}
    assert not (await attempts(registry.stubs, kind=m.ATTEMPT_KIND_VALIDATION)).attempts


async def unloaded(stubs):
    return not (await stubs.residencies.ListResidencies(residencies_pb.ListResidenciesRequest())).residencies


async def test_the_latest_hundred_attempts_of_a_model_are_kept(registry, database_url, tmp_path, start_node):
    node = await start_node()
    await ready_model(registry.stubs, tmp_path, "tiny")
    await acquire(registry.stubs, "tiny")
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn:
        await conn.execute(OLD_ATTEMPTS)
    await registry.stubs.residencies.UnloadModel(
        residencies_pb.UnloadModelRequest(model_id="tiny", force=True), timeout=20
    )
    await until(lambda: unloaded(registry.stubs))
    await acquire(registry.stubs, "tiny")

    kept = await attempts(registry.stubs, page_size=1000)

    assert node.loads == ["tiny", "tiny"]
    assert kept.total_size == len(kept.attempts) == 100
    assert [one.kind for one in kept.attempts[:2]] == [m.ATTEMPT_KIND_LOAD] * 2
