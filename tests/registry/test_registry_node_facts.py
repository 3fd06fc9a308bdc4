"""Facts that nodes announce about their machine, as ListNodes returns them."""

from __future__ import annotations

import pytest

from fix_postgres import refused
from fix_registry import GIB
from headrace.registry.v1 import node_service_pb2 as nodes
from headrace.registry.v1 import residency_pb2 as r
from headrace.registry.v1 import residency_service_pb2 as pb


def gpu(**fields: object) -> r.Device:
    facts = {
        "id": "cuda:0",
        "kind": r.DEVICE_KIND_CUDA,
        "name": "a GPU",
        "capacity_bytes": 70 * GIB,
        "free_bytes": 60 * GIB,
        "total_bytes": 80 * GIB,
        "capability": "9.0",
        "flash_attention": True,
    }
    return r.Device(**{**facts, **fields})


def announcement(**fields: object) -> nodes.RegisterNodeRequest:
    facts = {"node_id": "node-a", "address": "127.0.0.1:7471", "boot_nonce": "n", "devices": [gpu()]}
    return nodes.RegisterNodeRequest(**{**facts, **fields})


async def listed(stubs) -> r.Node:
    (node,) = (await stubs.residencies.ListNodes(pb.ListNodesRequest(), timeout=20)).nodes
    return node


async def test_a_node_is_listed_with_what_it_announced(registry):
    request = announcement(memory_bytes=256 * GIB, runtime_bytes=500, max_loads=4, max_residents=3)
    await registry.stubs.nodes.RegisterNode(request, timeout=20)
    node = await listed(registry.stubs)
    (device,) = node.devices

    assert (node.memory_bytes, node.runtime_bytes, node.max_loads, node.max_residents) == (256 * GIB, 500, 4, 3)
    assert (device.total_bytes, device.capability, device.flash_attention) == (80 * GIB, "9.0", True)
    assert device.lost_bytes == 0


async def test_a_heartbeat_changes_what_changes(registry):
    epoch = (await registry.stubs.nodes.RegisterNode(announcement(runtime_bytes=500), timeout=20)).epoch
    beat = {"node_id": "node-a", "epoch": epoch, "memory_free_bytes": 7 * GIB}
    lost = r.Device(id="cuda:0", free_bytes=50 * GIB, lost_bytes=10 * GIB)
    await registry.stubs.nodes.Heartbeat(nodes.HeartbeatRequest(**beat, devices=[lost], runtime_bytes=900), timeout=20)
    during = await listed(registry.stubs)
    back = r.Device(id="cuda:0", free_bytes=60 * GIB)
    await registry.stubs.nodes.Heartbeat(nodes.HeartbeatRequest(**beat, devices=[back]), timeout=20)
    after = await listed(registry.stubs)

    assert (during.memory_free_bytes, during.runtime_bytes) == (7 * GIB, 900)
    assert (during.devices[0].free_bytes, during.devices[0].lost_bytes) == (50 * GIB, 10 * GIB)
    assert (after.devices[0].free_bytes, after.devices[0].lost_bytes) == (60 * GIB, 0)
    assert after.runtime_bytes == 900
    assert after.devices[0].capability == "9.0"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"memory_bytes": -1}, "memory_bytes"),
        ({"runtime_bytes": -1}, "runtime_bytes"),
        ({"max_loads": -1}, "max_loads"),
        ({"max_residents": 10_001}, "max_residents"),
        ({"devices": [gpu(total_bytes=-1)]}, "devices.total_bytes"),
        ({"devices": [gpu(lost_bytes=-1)]}, "devices.lost_bytes"),
        ({"devices": [gpu(capability="9" * 64)]}, "devices.capability"),
    ],
)
async def test_a_bad_figure_is_refused_by_name(registry, fields, field):
    refusal = await refused(registry.stubs.nodes.RegisterNode(announcement(**fields), timeout=20))

    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))


async def test_a_heartbeat_with_a_bad_figure_is_refused(registry):
    epoch = (await registry.stubs.nodes.RegisterNode(announcement(), timeout=20)).epoch
    bad = nodes.HeartbeatRequest(node_id="node-a", epoch=epoch, devices=[r.Device(id="cuda:0", lost_bytes=-1)])

    assert (await refused(registry.stubs.nodes.Heartbeat(bad, timeout=20))).fields == ("devices.lost_bytes",)
