"""Eviction on an operator's order: which idle models leave which device, and what a list tells of their loads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fix_postgres import refused
from fix_registry import GIB, TINY_BYTES, acquire, cpu, ready_model, until_residency
from fix_scheduling import S, node, occupant
from headrace.registry.v1 import model_service_pb2 as models_pb
from headrace.registry.v1 import residency_pb2 as r
from headrace.registry.v1 import residency_service_pb2 as pb
from headrace_registry.residency.evictions import decide_eviction
from headrace_registry.residency.nodes import DeviceKind


def decided(*occupants, wanted, **fields):
    found = decide_eviction([node(*occupants, **fields)], wanted)
    return [o.residency_id for o in found.victims], found.free_bytes


def test_nothing_leaves_where_the_bytes_are_free():
    assert decided(occupant("a", 60), wanted=40) == ([], 40)


def test_the_least_recently_used_idle_models_leave_and_no_more_than_needed():
    held = [occupant("old", 20, idle_s=300), occupant("older", 20, idle_s=900), occupant("new", 20, idle_s=5)]

    assert decided(*held, wanted=50) == (["older"], 60)
    assert decided(*held, wanted=70) == (["older", "old"], 80)


@pytest.mark.parametrize(
    "fields", [{"n_leases": 1}, {"n_waiters": 1}, {"pinned": True}, {"state": S.LOADING}, {"state": S.DRAINING}]
)
def test_models_in_use_stay_and_are_named(fields):
    found = decide_eviction([node(occupant("busy", 80, **fields), occupant("idle", 10))], 50)

    assert found.victims == ()
    assert [o.residency_id for o in found.in_the_way] == ["busy"]
    assert found.free_bytes == 10


def test_bytes_on_their_way_back_count_as_free_and_lost_bytes_do_not():
    assert decided(occupant("going", 60, S.UNLOADING), occupant("idle", 20), wanted=70, lost=5) == ([], 75)


def test_the_device_is_taken_where_the_fewest_bytes_leave_and_gpus_come_first():
    small, large = (replace(node(occupant(name, size)), id=name) for name, size in (("small", 60), ("large", 90)))
    gpu = node(occupant("on-gpu", 95, device_id="cuda:0"))
    gpu = replace(gpu, id="gpu", devices=(replace(gpu.devices[0], id="cuda:0", kind=DeviceKind.CUDA),))

    assert decide_eviction([large, small], 50).node_id == "small"
    assert decide_eviction([large, small, gpu], 50).node_id == "gpu"
    assert decide_eviction([large, small, gpu], 50, device_id="cpu").node_id == "small"
    assert decide_eviction([large, small, gpu], 101) is None


def test_a_device_that_lacks_lost_bytes_comes_behind_one_that_can_be_freed():
    lost, idle = (
        replace(each, id=name)
        for name, each in (("a-lost", node(lost=80)), ("b-idle", node(occupant("idle", 80, idle_s=900))))
    )
    found = decide_eviction([lost, idle], 50)

    assert (found.node_id, [o.residency_id for o in found.victims], found.is_enough) == ("b-idle", ["idle"], True)
    assert not decide_eviction([lost], 50).is_enough


async def evict(stubs, free_bytes, **fields):
    request = pb.EvictModelsRequest(free_bytes=free_bytes, **fields)
    return await stubs.residencies.EvictModels(request, timeout=20)


async def resident(stubs, model_id):
    answer = await stubs.residencies.LoadModel(pb.LoadModelRequest(model_id=model_id), timeout=20)
    return await until_residency(stubs, answer.residency.id, r.RESIDENCY_STATE_RESIDENT)


async def test_idle_models_are_evicted_on_order_and_named(registry, tmp_path, start_node):
    await start_node(devices=[cpu(2 * TINY_BYTES + 1000)])
    for name in ("first", "second"):
        await ready_model(registry.stubs, tmp_path, name)
    first, second = await resident(registry.stubs, "first"), await resident(registry.stubs, "second")

    done = await evict(registry.stubs, TINY_BYTES)
    again = await evict(registry.stubs, TINY_BYTES)

    assert [(each.model_id, each.reason) for each in done.residencies] == [("first", "evicted to free memory")]
    assert (done.node_id, done.device_id, done.free_bytes) == ("node-a", "cpu", TINY_BYTES + 1000)
    assert list(again.residencies) == []
    await until_residency(registry.stubs, first.id, r.RESIDENCY_STATE_UNLOADED)
    assert (await until_residency(registry.stubs, second.id, r.RESIDENCY_STATE_RESIDENT)).id == second.id


async def test_what_can_not_be_freed_is_refused_by_name_and_nothing_leaves(registry, tmp_path, start_node):
    await start_node(devices=[cpu(TINY_BYTES + 1000)])
    await ready_model(registry.stubs, tmp_path, "tiny")
    held = await resident(registry.stubs, "tiny")
    await acquire(registry.stubs, "tiny")

    busy = await refused(evict(registry.stubs, TINY_BYTES))
    large = await refused(evict(registry.stubs, GIB))
    wrong = await refused(evict(registry.stubs, 0))
    nowhere = await refused(evict(registry.stubs, 1, node_id="nowhere"))

    assert (busy.reason, "a test (tiny)" in busy.message) == ("CAPACITY_BUSY", True)
    assert (large.reason, large.fields) == ("FIELD_INVALID", ("free_bytes",))
    assert (wrong.reason, nowhere.reason) == ("FIELD_INVALID", "NODE_NOT_FOUND")
    assert (await until_residency(registry.stubs, held.id, r.RESIDENCY_STATE_RESIDENT)).n_leases == 1


async def test_a_residency_tells_how_long_its_load_took_and_when_it_was_over(registry, tmp_path, start_node):
    node_ = await start_node(slow_load=True)
    await ready_model(registry.stubs, tmp_path, "tiny")
    answer = await registry.stubs.residencies.LoadModel(pb.LoadModelRequest(model_id="tiny"), timeout=20)
    loading = await until_residency(registry.stubs, answer.residency.id, r.RESIDENCY_STATE_LOADING)
    node_.load_gate.set()
    loaded = await until_residency(registry.stubs, answer.residency.id, r.RESIDENCY_STATE_RESIDENT)

    assert (loading.load_s, loading.HasField("resident_time")) == (0.0, False)
    assert 0.0 < loaded.load_s < 20.0
    began_s = loaded.resident_time.ToNanoseconds() / 1e9 - loaded.load_s
    assert loaded.create_time.ToNanoseconds() / 1e9 - 0.01 <= began_s


async def test_pages_tell_how_many_entries_there_are_on_all(registry, tmp_path, start_node):
    await start_node()
    for name in ("a", "b", "c"):
        await ready_model(registry.stubs, tmp_path, name)
    await resident(registry.stubs, "a")
    await resident(registry.stubs, "b")
    models = await registry.stubs.models.ListModels(models_pb.ListModelsRequest(page_size=2), timeout=20)
    filtered = await registry.stubs.models.ListModels(models_pb.ListModelsRequest(filter="id = a"), timeout=20)
    catalog = await registry.stubs.models.ListCatalog(models_pb.ListCatalogRequest(page_size=1), timeout=20)
    residencies = await registry.stubs.residencies.ListResidencies(pb.ListResidenciesRequest(page_size=1), timeout=20)

    assert (len(models.models), models.total_size, filtered.total_size) == (2, 3, 1)
    assert (len(residencies.residencies), residencies.total_size) == (1, 2)
    assert len(catalog.entries) == 1
    assert catalog.total_size > 50
