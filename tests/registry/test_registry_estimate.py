"""EstimateMemory over gRPC: before download, from files, after a load; devices that fit, models to evict."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest

from fix_hub import Fault
from fix_postgres import refused, running_registry
from fix_registry import GIB, acquire, cpu, ready_model, register_folder, write_model
from headrace.registry.v1 import model_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace.registry.v1 import residency_service_pb2 as residency_service
from headrace_registry.errors import HubUnavailable
from headrace_registry.hub.headers import HubHeaders
from headrace_registry.sizing.catalog import CATALOG

MB = 1_000_000
NONE, INT8, INT4 = model_pb2.QUANTIZATION_NONE, model_pb2.QUANTIZATION_INT8, model_pb2.QUANTIZATION_INT4
# A linear layer, an embedding, a norm and a head; a mask and frequencies that are computed anew.
TENSORS = {
    "model.embed_tokens.weight": ("F32", (32, 8)),
    "model.layers.0.mlp.up_proj.weight": ("F32", (1600, 1000)),
    "model.layers.0.mlp.up_proj.bias": ("F32", (1600,)),
    "model.layers.0.attn.bias": ("U8", (1, 1, 64, 64)),
    "model.layers.0.rotary_emb.inv_freq": ("F32", (4,)),
    "model.norm.weight": ("BF16", (8,)),
    "lm_head.weight": ("F32", (32, 8)),
}
N_LINEAR, N_KEPT = 1_600_000, 32 * 8 + 1600 + 8
RUNTIME = 400 * MB


async def estimates(stubs, model_id, **workload):
    return await stubs.models.EstimateMemory(pb.EstimateMemoryRequest(model_id=model_id, **workload), timeout=40)


def line(answer, quantization, dtype):
    return next(each for each in answer.estimates if (each.quantization, each.dtype) == (quantization, dtype))


def fits(answer, quantization, dtype):
    return [(each.device_id, pb.Fit.Name(each.fit)) for each in line(answer, quantization, dtype).placements]


async def test_weights_are_counted_tensor_by_tensor_in_every_form(registry, tmp_path):
    await ready_model(registry.stubs, tmp_path, "m", tensors=TENSORS)
    answer = await estimates(registry.stubs, "m")

    weights = {(each.quantization, each.dtype): each.weight_bytes for each in answer.estimates}
    assert weights == {
        (NONE, "float32"): 4 * (N_LINEAR + N_KEPT),
        (NONE, "bfloat16"): 2 * (N_LINEAR + N_KEPT),
        (NONE, "float16"): 2 * (N_LINEAR + N_KEPT),
        (INT8, "bfloat16"): N_LINEAR + 4 * 1600 + 2 * N_KEPT,
        (INT4, "bfloat16"): N_LINEAR // 2 + 25_000 + 4 * 98 + 1092 + 2 * N_KEPT,
    }
    assert answer.recommended == -1  # No node is alive.


async def test_the_parts_add_up(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "m", tensors=TENSORS)
    await start_node()

    for each in (await estimates(registry.stubs, "m")).estimates:
        assert each.total_bytes == each.weight_bytes + each.overhead_bytes
        assert each.overhead_bytes >= each.runtime_bytes + each.workload_bytes
        assert each.runtime_bytes == RUNTIME


async def test_a_larger_workload_takes_more(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "m", tensors=TENSORS)
    await start_node()
    small = line(await estimates(registry.stubs, "m"), NONE, "float32").workload_bytes
    for larger in ({"batch_size": 4}, {"context_size": 8192}, {"n_hookpoints": 9}):
        assert line(await estimates(registry.stubs, "m", **larger), NONE, "float32").workload_bytes > small


@pytest.mark.parametrize("workload", [{"batch_size": -1}, {"context_size": 10**6}, {"n_hookpoints": 10**5}])
async def test_workloads_out_of_range_are_refused(registry, tmp_path, workload):
    await ready_model(registry.stubs, tmp_path, "m")
    request = pb.EstimateMemoryRequest(model_id="m", **workload)
    refusal = await refused(registry.stubs.models.EstimateMemory(request, timeout=20))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert refusal.metadata["field"] == next(iter(workload))


async def test_an_unknown_model_is_not_found(registry):
    assert (await refused(registry.stubs.models.EstimateMemory(pb.EstimateMemoryRequest(model_id="x")))).reason == (
        "MODEL_NOT_FOUND"
    )


async def test_placements_say_where_it_fits_and_the_most_exact_form_with_room_is_recommended(
    registry, tmp_path, start_node
):
    tensors = {**TENSORS, "model.layers.0.mlp.up_proj.weight": ("F32", (16_000, 1000))}  # 64 MB in float32.
    await ready_model(registry.stubs, tmp_path, "m", tensors=tensors)
    tight = cpu(RUNTIME + 45 * MB + 32 * MB // 2, "cpu")
    await start_node(devices=[tight, cpu(RUNTIME, "cpu1")])
    answer = await estimates(registry.stubs, "m", context_size=64)

    assert fits(answer, NONE, "float32") == [("cpu", "FIT_NEVER"), ("cpu1", "FIT_NEVER")]
    assert fits(answer, NONE, "bfloat16") == [("cpu", "FIT_FREE"), ("cpu1", "FIT_NEVER")]
    assert fits(answer, NONE, "float16") == []  # Runners refuse it on a CPU.
    best = answer.estimates[answer.recommended]
    assert (best.quantization, best.dtype, list(best.fits_on)) == (NONE, "bfloat16", ["node-a/cpu"])
    assert [each.max_batch_size > 0 for each in best.placements] == [True, False]


async def test_the_batch_that_fits_is_the_largest_that_fits(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "m", tensors=TENSORS)
    await start_node(devices=[cpu(RUNTIME + 60 * MB)])
    largest = line(await estimates(registry.stubs, "m"), NONE, "float32").placements[0].max_batch_size
    assert 1 < largest < 1024

    at_most = await estimates(registry.stubs, "m", batch_size=largest)
    one_more = await estimates(registry.stubs, "m", batch_size=largest + 1)

    assert fits(at_most, NONE, "float32") == [("cpu", "FIT_FREE")]
    assert fits(one_more, NONE, "float32") == [("cpu", "FIT_NEVER")]


async def test_what_would_be_evicted_is_named_and_what_is_leased_keeps_it_waiting(registry, tmp_path, start_node):
    for name in ("idle", "m"):
        await ready_model(registry.stubs, tmp_path, name, tensors=TENSORS)
    await start_node(devices=[cpu(RUNTIME + 100 * MB)])
    lease = await acquire(registry.stubs, "idle")
    leased = await estimates(registry.stubs, "m")
    release = residency_service.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence)
    await registry.stubs.residencies.ReleaseLease(release, timeout=20)
    after = await estimates(registry.stubs, "m")

    assert fits(leased, NONE, "float32") == [("cpu", "FIT_BUSY")]
    assert leased.recommended == -1
    placement = line(after, NONE, "float32").placements[0]
    assert (placement.fit, list(placement.evicted_model_ids)) == (pb.FIT_AFTER_EVICTION, ["idle"])
    assert after.recommended == 0
    assert not after.estimates[0].fits_on


async def test_after_a_load_the_measured_size_replaces_the_estimate(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "m", tensors=TENSORS)
    await start_node(measured_bytes=123 * MB, devices=[cpu(4 * GIB)])
    before = line(await estimates(registry.stubs, "m"), NONE, "float32")
    await acquire(registry.stubs, "m")
    answer = await estimates(registry.stubs, "m")
    after = line(answer, NONE, "float32")

    assert (before.measured, after.measured) == (False, True)
    assert after.total_bytes - after.workload_bytes == 123 * MB
    assert fits(answer, NONE, "float32") == [("cpu", "FIT_RESIDENT")]
    assert not line(answer, INT8, "bfloat16").measured
    assert fits(answer, INT8, "bfloat16") == [("cpu", "FIT_FREE")]


async def test_a_folder_is_estimated_before_it_is_prepared(registry, tmp_path):
    await asyncio.to_thread(write_model, tmp_path / "m", tensors=TENSORS)
    await register_folder(registry.stubs, tmp_path / "m", "m")

    assert (await estimates(registry.stubs, "m")).estimates[0].weight_bytes == 4 * (N_LINEAR + N_KEPT)


async def test_a_gguf_file_has_to_be_converted_first(registry, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(tmp_path / "m.gguf")))
    await registry.stubs.models.RegisterModel(pb.RegisterModelRequest(model=model_pb2.Model(id="m", source=source)))
    refusal = await refused(registry.stubs.models.EstimateMemory(pb.EstimateMemoryRequest(model_id="m"), timeout=20))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_READY")


async def register_hub(stubs, repo_id="owner/tiny"):
    source = model_pb2.ModelSource(hub=model_pb2.HubSource(repo_id=repo_id))
    model = model_pb2.Model(id="m", source=source)
    await stubs.models.RegisterModel(pb.RegisterModelRequest(model=model), timeout=20)


@contextlib.asynccontextmanager
async def registry_at(hub, database_url, tmp_path):
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as started:
        yield started.stubs


async def test_a_hub_model_is_estimated_before_download_from_headers_alone(hub, database_url, tmp_path):
    async with registry_at(hub, database_url, tmp_path) as stubs:
        await register_hub(stubs)
        first = await estimates(stubs, "m")
        n_requests = len(hub.seen)
        again = await estimates(stubs, "m", batch_size=2)

    assert first.estimates[0].weight_bytes == 4 * (512 * 96 + 80)
    assert again.estimates[0].weight_bytes == first.estimates[0].weight_bytes
    assert len(hub.seen) == n_requests  # The profile is kept in memory.
    assert [each.range for each in hub.requests("model.safetensors")] == ["bytes=0-100000"]


@pytest.mark.parametrize(
    ("fault", "code", "reason"),
    [
        (Fault(on="config.json", status=503, times=9), grpc.StatusCode.UNAVAILABLE, "HUB_UNAVAILABLE"),
        (Fault(on="config.json", status=404, times=9), grpc.StatusCode.NOT_FOUND, "HUB_NOT_FOUND"),
        (
            Fault(on="model.safetensors", corrupt=True, times=9),
            grpc.StatusCode.FAILED_PRECONDITION,
            "MODEL_UNSUPPORTED",
        ),
    ],
    ids=["down", "missing", "corrupt"],
)
async def test_what_the_hub_does_wrong_has_its_reason(hub, database_url, tmp_path, fault, code, reason):
    async with registry_at(hub, database_url, tmp_path) as stubs:
        await register_hub(stubs)
        hub.faults.append(fault)
        refusal = await refused(stubs.models.EstimateMemory(pb.EstimateMemoryRequest(model_id="m"), timeout=40))

    assert (refusal.code, refusal.reason) == (code, reason)


async def test_a_hub_that_hangs_is_left_at_the_deadline(hub):
    hub.faults.append(Fault(on="config.json", stall_after=0, stall_s=20.0))
    started = asyncio.get_running_loop().time()
    with pytest.raises(HubUnavailable, match="within 2 s"):
        await HubHeaders(hub.environment, deadline_s=2.0).profile("owner/tiny", "main")

    assert asyncio.get_running_loop().time() - started < 10


async def test_a_model_of_the_catalog_is_estimated_without_the_hub(registry):
    """The registry of this test is offline."""
    await register_hub(registry.stubs, "google/gemma-2-2b")
    entry = CATALOG.of_repo("google/gemma-2-2b")
    assert entry is not None

    found = line(await estimates(registry.stubs, "m"), NONE, "bfloat16").weight_bytes

    assert found == 2 * entry.n_parameters


async def test_what_neither_hub_nor_catalog_knows_is_unavailable(registry):
    await register_hub(registry.stubs, "owner/unheard-of")
    refusal = await refused(registry.stubs.models.EstimateMemory(pb.EstimateMemoryRequest(model_id="m"), timeout=40))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "HUB_UNAVAILABLE")
