"""Quantized models and validations, as the registry sees them: nodes get builds and attempts, and report on them."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import grpc
import pytest

from fix_postgres import refused, running_registry
from fix_registry import GIB, cpu, ready_model, register_folder, residency_of, until, until_state, write_model
from headrace.registry.v1 import model_pb2, node_service_pb2, residency_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace.registry.v1 import residency_service_pb2 as residency_service

READY, FAILED = model_pb2.MODEL_STATE_READY, model_pb2.MODEL_STATE_FAILED
QUANTIZING = model_pb2.MODEL_STATE_QUANTIZING
INT8 = model_pb2.QUANTIZATION_INT8
CONVERT_GGUF, QUANTIZE = node_service_pb2.BUILD_KIND_CONVERT_GGUF, node_service_pb2.BUILD_KIND_QUANTIZE
PASSED = model_pb2.VALIDATION_STEP_STATE_PASSED
RUNNING = model_pb2.VALIDATION_STEP_STATE_RUNNING
BROKEN = model_pb2.VALIDATION_STEP_STATE_FAILED
STEPS = ["dry_load", "load", "forward", "finite", "parity", "unload", "memory_back"]
FIDELITY = model_pb2.Fidelity(
    reference_dtype="float32",
    n_tokens=384,
    layers=[model_pb2.LayerFidelity(layer=n, cosine=0.99 - n / 100, relative_error=0.01 * (n + 1)) for n in range(2)],
)
SMALL = {"model.embed_tokens.weight": ("F32", (32, 8)), "layers.0.mlp.up_proj.weight": ("U8", (60,))}


# -- quantizing --------------------------------------------------------------------------------------------------------


def quantized(folder, model_id="m-int8", quantization=INT8):
    source = model_pb2.ModelSource(folder=model_pb2.FolderSource(path=str(folder)))
    return model_pb2.Model(id=model_id, source=source, quantization=quantization)


async def prepare(stubs, model):
    await stubs.models.RegisterModel(pb.RegisterModelRequest(model=model), timeout=20)
    await stubs.models.PrepareModel(pb.PrepareModelRequest(model_id=model.id), timeout=20)


def follow_builds(node, builds, *, failure=None):
    """Has a node carry out its builds, with few tensors, and report a fidelity."""

    async def build(message):
        builds.append(message)
        if failure is None:
            await asyncio.to_thread(write_model, Path(message.target_path), tensors=SMALL)
            await tell(node, message, done=True, fidelity=FIDELITY)
        else:
            await tell(node, message, failure=failure)

    node._build = build


async def tell(node, build, **fields):
    request = node_service_pb2.ReportBuildRequest(
        node_id=node.id, epoch=node.epoch, model_id=build.model.id, target_path=build.target_path, **fields
    )
    await node.stubs.nodes.ReportBuild(request, timeout=20)


async def test_a_quantized_model_is_made_once_and_keeps_its_fidelity(registry, start_node, tmp_path):
    folder = await asyncio.to_thread(write_model, tmp_path / "source")
    node, builds, states = await start_node(), [], []
    follow_builds(node, builds)
    await prepare(registry.stubs, quantized(folder))
    async for event in registry.stubs.models.WatchModel(pb.WatchModelRequest(model_id="m-int8", after_seq=1)):
        states.append(event.model.state)
        if event.model.state == READY:
            break
        assert event.model.state != FAILED, event.model.failure
    model = event.model
    [build] = builds

    assert QUANTIZING in states
    assert build.kind == QUANTIZE
    assert build.source_path == str(folder)
    assert build.model.quantization == INT8
    assert model.files_path == build.target_path
    assert model.files_path == str(registry.data_dir / "models" / f"m-int8-{model.commit_sha[7:19]}-int8")
    assert model.fidelity == FIDELITY
    assert model.n_parameters == 336  # Those of the source.
    assert model.weight_bytes == 32 * 8 * 4 + 60  # Those of the quantized files.
    assert model.store_bytes > model.weight_bytes
    assert (await registry.stubs.models.GetModel(pb.GetModelRequest(model_id="m-int8"))).model.fidelity == FIDELITY


async def test_failed_quantizing_fails_the_model_with_the_node_s_reason(registry, start_node, tmp_path):
    folder = await asyncio.to_thread(write_model, tmp_path / "source")
    failure = model_pb2.Failure(reason="EXTRA_MISSING", message="install a quantizer")
    follow_builds(await start_node(), [], failure=failure)
    await prepare(registry.stubs, quantized(folder, quantization=model_pb2.QUANTIZATION_INT2))
    await until(lambda: is_in(registry.stubs, "m-int8", FAILED))
    model = (await registry.stubs.models.GetModel(pb.GetModelRequest(model_id="m-int8"))).model

    assert model.failure == failure


async def is_in(stubs, model_id, state):
    return (await stubs.models.GetModel(pb.GetModelRequest(model_id=model_id))).model.state == state


async def test_quantizing_waits_for_a_node(registry, start_node, tmp_path):
    folder = await asyncio.to_thread(write_model, tmp_path / "source")
    await prepare(registry.stubs, quantized(folder))
    await until(lambda: is_in(registry.stubs, "m-int8", QUANTIZING))
    builds = []
    node = await start_node()
    follow_builds(node, builds)

    assert (await until_state(registry.stubs, "m-int8", READY)).fidelity.layers


async def test_models_of_one_gguf_file_share_the_unquantized_files(registry, start_node, tmp_path):
    file = tmp_path / "m.gguf"
    await asyncio.to_thread(file.write_bytes, b"GGUF" + bytes(100))
    node, builds = await start_node(), []
    follow_builds(node, builds)
    source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(file)))
    for model_id, quantization in (("m", 0), ("m-int8", INT8), ("m-int4", model_pb2.QUANTIZATION_INT4)):
        await prepare(registry.stubs, model_pb2.Model(id=model_id, source=source, quantization=quantization))
        await until_state(registry.stubs, model_id, READY)
    base = (await registry.stubs.models.GetModel(pb.GetModelRequest(model_id="m"))).model.files_path

    assert [(b.model.id, b.kind, b.source_path) for b in builds] == [
        ("m", CONVERT_GGUF, ""),
        ("m-int8", QUANTIZE, base),
        ("m-int4", QUANTIZE, base),
    ]


async def test_a_late_word_on_one_build_says_nothing_of_the_next(registry, start_node, tmp_path):
    file = tmp_path / "m.gguf"
    await asyncio.to_thread(file.write_bytes, b"GGUF" + bytes(100))
    node, builds = await start_node(), []

    async def convert_only(message):
        await asyncio.to_thread(write_model, Path(message.target_path), tensors=SMALL)
        if message.kind == CONVERT_GGUF:
            await tell(node, message, done=True)
        builds.append(message)

    node._build = convert_only
    source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(file)))
    await prepare(registry.stubs, model_pb2.Model(id="m-int8", source=source, quantization=INT8))
    await until(lambda: len(builds) == 2)
    await tell(node, builds[0], done=True, fidelity=FIDELITY)
    await tell(node, builds[1], done=True)
    model = await until_state(registry.stubs, "m-int8", READY)

    assert builds[0].target_path != builds[1].target_path
    assert not model.HasField("fidelity")


async def test_an_unquantized_model_takes_the_files_a_quantized_one_was_made_from(registry, start_node, tmp_path):
    file = tmp_path / "m.gguf"
    await asyncio.to_thread(file.write_bytes, b"GGUF" + bytes(100))
    node, builds = await start_node(), []
    follow_builds(node, builds)
    source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(file)))
    await prepare(registry.stubs, model_pb2.Model(id="m-int8", source=source, quantization=INT8))
    await until_state(registry.stubs, "m-int8", READY)
    await prepare(registry.stubs, model_pb2.Model(id="m", source=source))
    plain = await until_state(registry.stubs, "m", READY)

    assert [(b.kind, b.source_path) for b in builds] == [(CONVERT_GGUF, ""), (QUANTIZE, plain.files_path)]
    assert [b.model.quantization for b in builds] == [INT8, INT8]
    await registry.stubs.models.DeleteModel(pb.DeleteModelRequest(model_id="m-int8"), timeout=20)
    quantized_path = Path(builds[1].target_path)
    await until(lambda: not quantized_path.exists())
    assert await asyncio.to_thread(Path(plain.files_path, "config.json").exists)


async def test_a_model_deleted_and_prepared_again_at_once_is_quantized_from_files_that_stay(
    registry, start_node, tmp_path
):
    file = tmp_path / "m.gguf"
    await asyncio.to_thread(file.write_bytes, b"GGUF" + bytes(100))
    node, builds = await start_node(), []
    follow_builds(node, builds)
    source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(file)))
    model = model_pb2.Model(id="m-int8", source=source, quantization=INT8)
    await prepare(registry.stubs, model)
    await until_state(registry.stubs, "m-int8", READY)
    node._tasks.clear()  # So that the node carries out the same builds again.
    await registry.stubs.models.DeleteModel(pb.DeleteModelRequest(model_id="m-int8"), timeout=20)
    await prepare(registry.stubs, model)
    await until_state(registry.stubs, "m-int8", READY)

    assert [build.source_path for build in builds] == ["", builds[0].target_path] * 2
    assert await asyncio.to_thread(Path(builds[-1].source_path, "config.json").exists)


# -- validations -------------------------------------------------------------------------------------------------------


class Trial:
    """A call of ValidateModel, and the node's side of it."""

    def __init__(self, registry, node, **request):
        self.registry, self.node = registry, node
        self.messages = []
        self.call = registry.stubs.models.ValidateModel(pb.ValidateModelRequest(**{"model_id": "m"} | request))
        self.task = asyncio.create_task(self._read())

    async def _read(self):
        async for message in self.call:
            self.messages.append(message)

    async def told(self):
        """Waits until the node gets a validation; returns it."""
        await until(lambda: self.node.messages and self.node.messages[-1].validations)
        return self.node.messages[-1].validations[0]

    async def report(self, attempt_id, steps, **fields):
        request = node_service_pb2.ReportValidationRequest(
            node_id=self.node.id, epoch=self.node.epoch, attempt_id=attempt_id, steps=steps, **fields
        )
        await self.registry.stubs.nodes.ReportValidation(request, timeout=20)

    @property
    def attempt(self):
        assert self.messages[-1].HasField("attempt")
        return self.messages[-1].attempt


def steps(n, state=PASSED):
    done = [model_pb2.ValidationStep(name=name, state=PASSED, seconds=0.5) for name in STEPS[:n]]
    if done:
        done[-1].state = state
        done[-1].figures["measured_bytes"] = 12.5
    return done


async def attempts(stubs, **fields):
    request = pb.ListAttemptsRequest(**{"model_id": "m"} | fields)
    return await stubs.models.ListAttempts(request, timeout=20)


async def test_every_step_is_streamed_and_the_attempt_is_kept(registry, start_node, tmp_path):
    await ready_model(registry.stubs, tmp_path, "m")
    node = await start_node()
    options = {"attn_implementation": "eager"}
    request = pb.ValidateModelRequest(model_id="m")
    request.load_options.update(options)
    trial = Trial(registry, node, load_options=request.load_options)
    told = await trial.told()
    assert dict(told.load_options) == options
    assert dict(told.model.load_options) == {}
    assert (told.device_id, told.model.files_path) == ("cpu", str(tmp_path / "m"))
    for n in range(1, 8):
        await trial.report(told.attempt_id, steps(n, RUNNING))
        await trial.report(told.attempt_id, steps(n), versions={"torch": "2.13"} if n == 5 else {})
    await trial.report(told.attempt_id, steps(7), done=True, versions={"torch": "2.13"})
    await asyncio.wait_for(trial.task, 20)

    passed = [message.step for message in trial.messages if message.passed and message.step]
    assert sorted(set(passed), key=STEPS.index) == STEPS
    assert trial.attempt.passed
    assert trial.attempt.done
    assert trial.attempt.versions == {"torch": "2.13"}
    assert trial.attempt.steps[-1].figures["measured_bytes"] == 12.5
    assert dict(trial.attempt.load_options) == options
    assert (await attempts(registry.stubs, passed_only=True)).attempts == [trial.attempt]
    await until(lambda: not node.messages[-1].validations)


async def test_failed_steps_make_a_failed_attempt(registry, start_node, tmp_path):
    await ready_model(registry.stubs, tmp_path, "m")
    trial = Trial(registry, await start_node())
    told = await trial.told()
    failure = model_pb2.Failure(reason="NON_FINITE", message="finite: 3 values")
    await trial.report(told.attempt_id, steps(4, BROKEN), done=True, failure=failure)
    await asyncio.wait_for(trial.task, 20)

    assert not trial.attempt.passed
    assert trial.attempt.failure == failure
    assert not (await attempts(registry.stubs, passed_only=True)).attempts
    refusal = await refused(trial.report(told.attempt_id, steps(5)))
    assert refusal.reason == "STATE_CONFLICT"


async def test_an_attempt_without_all_steps_has_not_passed(registry, start_node, tmp_path):
    await ready_model(registry.stubs, tmp_path, "m")
    trial = Trial(registry, await start_node())
    told = await trial.told()
    await trial.report(told.attempt_id, steps(6), done=True)
    await asyncio.wait_for(trial.task, 20)

    assert trial.attempt.done
    assert not trial.attempt.passed


async def test_leaving_stops_the_validation_on_the_node(registry, start_node, tmp_path):
    await ready_model(registry.stubs, tmp_path, "m")
    node = await start_node()
    trial = Trial(registry, node)
    told = await trial.told()
    await trial.report(told.attempt_id, steps(2, RUNNING))
    trial.call.cancel()
    await until(lambda: not node.messages[-1].validations)
    [attempt] = (await attempts(registry.stubs)).attempts

    assert (attempt.done, attempt.passed, attempt.failure.reason) == (True, False, "STATE_CONFLICT")
    assert [step.state for step in attempt.steps] == [PASSED, BROKEN]


async def test_a_node_that_starts_anew_fails_the_attempt(registry, start_node, tmp_path):
    await ready_model(registry.stubs, tmp_path, "m")
    node = await start_node()
    trial = Trial(registry, node)
    await trial.told()
    await node.stop()
    node.boot_nonce = "another"
    await node.register()
    await asyncio.wait_for(trial.task, 20)

    assert trial.attempt.failure.reason == "NODE_LOST"


async def test_a_registry_that_dies_leaves_no_attempt_running(database_url, tmp_path, start_node, registry):
    """The attempt of a caller that vanished ends by itself, here once the node is lost or the time runs out."""
    await ready_model(registry.stubs, tmp_path, "m")
    trial = Trial(registry, await start_node())
    await trial.told()
    await registry.stop()
    with pytest.raises(grpc.aio.AioRpcError):
        await trial.task
    async with running_registry(database_url, tmp_path / "second", roots=(tmp_path,)) as second:
        await until(lambda: ended(second.stubs))
        [attempt] = (await attempts(second.stubs)).attempts

    assert not attempt.passed
    assert attempt.failure.reason in ("STATE_CONFLICT", "WAIT_TIMEOUT", "NODE_LOST")


async def ended(stubs):
    found = (await attempts(stubs)).attempts
    return bool(found) and all(attempt.done for attempt in found)


async def test_a_trial_holds_its_bytes_until_it_is_over(registry, start_node, tmp_path):
    tensors = {"w": ("U8", (500_000_000,))}
    for model_id in ("m", "other"):
        await ready_model(registry.stubs, tmp_path, model_id, tensors=tensors, config={"model_type": "abacus"})
    await start_node(devices=[cpu(2 * GIB)])
    node = await start_node("node-b", devices=[cpu(GIB)])
    trial = Trial(registry, node, node_id="node-b")
    told = await trial.told()
    request = residency_service.LoadModelRequest(model_id="other", node_id="node-b", device_id="cpu")
    waiting = (await registry.stubs.residencies.LoadModel(request, timeout=20)).residency
    assert waiting.state == residency_pb2.RESIDENCY_STATE_QUEUED
    assert (await residency_of(registry.stubs, waiting.id)).state == residency_pb2.RESIDENCY_STATE_QUEUED
    await trial.report(told.attempt_id, steps(7), done=True)
    await asyncio.wait_for(trial.task, 20)

    await until(lambda: is_resident(registry.stubs, waiting.id))
    shutil.rmtree(tmp_path / "m")
    shutil.rmtree(tmp_path / "other")


async def is_resident(stubs, residency_id):
    return (await residency_of(stubs, residency_id)).state == residency_pb2.RESIDENCY_STATE_RESIDENT


async def test_a_trial_evicts_nobody_and_does_not_wait(registry, start_node, tmp_path):
    tensors = {"w": ("U8", (500_000_000,))}
    for model_id in ("m", "other"):
        await ready_model(registry.stubs, tmp_path, model_id, tensors=tensors, config={"model_type": "abacus"})
    await start_node(devices=[cpu(GIB)])
    request = residency_service.LoadModelRequest(model_id="other")
    loaded = await registry.stubs.residencies.LoadModel(request, timeout=20)
    await until(lambda: is_resident(registry.stubs, loaded.residency.id))
    refusal = await refused(registry.stubs.models.ValidateModel(pb.ValidateModelRequest(model_id="m")))

    assert refusal.reason == "CAPACITY_BUSY"
    assert "evicts nobody" in refusal.message
    shutil.rmtree(tmp_path / "m")
    shutil.rmtree(tmp_path / "other")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_id": "nobody"}, "MODEL_NOT_FOUND"),
        ({"node_id": "nowhere"}, "NODE_NOT_FOUND"),
        ({"device_id": "cuda:9"}, "NODE_NOT_FOUND"),
        ({"load_options": {"abacus": 1}}, "FIELD_INVALID"),
        ({"load_options": {"trust_remote_code": True}}, "NOT_ALLOWED"),
        ({"model_id": "raw"}, "MODEL_NOT_READY"),
    ],
)
async def test_what_can_not_be_tried_is_refused_at_once(registry, start_node, tmp_path, fields, reason):
    await ready_model(registry.stubs, tmp_path, "m")
    await asyncio.to_thread(write_model, tmp_path / "raw")
    await register_folder(registry.stubs, tmp_path / "raw", "raw")
    await start_node()
    request = pb.ValidateModelRequest(model_id=fields.get("model_id", "m"))
    request.node_id, request.device_id = fields.get("node_id", ""), fields.get("device_id", "")
    if "load_options" in fields:
        request.load_options.update(fields["load_options"])

    assert (await refused(registry.stubs.models.ValidateModel(request))).reason == reason


async def test_without_a_node_there_is_nothing_to_try_on(registry, tmp_path):
    await ready_model(registry.stubs, tmp_path, "m")

    refusal = await refused(registry.stubs.models.ValidateModel(pb.ValidateModelRequest(model_id="m")))
    assert refusal.reason == "NODE_LOST"


async def test_attempts_are_paged_the_newest_first(registry, start_node, tmp_path):
    await ready_model(registry.stubs, tmp_path, "m")
    node, made = await start_node(), []
    for _ in range(3):
        trial = Trial(registry, node)
        told = await trial.told()
        await trial.report(told.attempt_id, steps(7), done=True)
        await asyncio.wait_for(trial.task, 20)
        made.append(told.attempt_id)
        await until(lambda: not node.messages[-1].validations)
    first = await attempts(registry.stubs, page_size=2)
    rest = await attempts(registry.stubs, page_size=2, page_token=first.next_page_token)

    assert [attempt.id for attempt in [*first.attempts, *rest.attempts]] == made[::-1]
    assert rest.next_page_token == ""
    assert (await refused(attempts(registry.stubs, model_id="nobody"))).reason == "MODEL_NOT_FOUND"
