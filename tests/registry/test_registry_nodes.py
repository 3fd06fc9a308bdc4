"""NodeService and ActivationSetService over gRPC: epochs, silence, fences, desired state, sets."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from fix_postgres import refused, running_registry
from fix_registry import FakeNode, acquire, cpu, lease_request, ready_model, residency_of, until, until_residency
from headrace.registry.v1 import activation_set_service_pb2 as sets_pb
from headrace.registry.v1 import node_service_pb2 as pb
from headrace.registry.v1 import residency_pb2 as r
from headrace.registry.v1 import residency_service_pb2
from headrace_registry.residency.nodes import is_other_node


async def node_of(stubs, node_id: str = "node-a") -> r.Node:
    answer = await stubs.residencies.ListNodes(residency_service_pb2.ListNodesRequest(), timeout=20)
    return next(node for node in answer.nodes if node.id == node_id)


async def until_node(stubs, state: r.NodeState.ValueType) -> None:
    async def arrived() -> bool:
        return (await node_of(stubs)).state == state

    await until(arrived)


async def test_a_new_boot_is_a_new_epoch_and_the_same_boot_keeps_it(registry):
    node = FakeNode(registry.stubs, "node-a", [cpu()])
    epochs = []
    for nonce in ("x", "x", "y", "y", "x"):
        node.boot_nonce = nonce
        await node.register()
        epochs.append(node.epoch)

    assert epochs == [1, 1, 2, 2, 3]


async def test_registration_tells_devices_and_heartbeat_interval(registry):
    request = pb.RegisterNodeRequest(
        node_id="node-a", address="10.0.0.1:7471", devices=[cpu(5)], version="1", boot_nonce="x"
    )
    answer = await registry.stubs.nodes.RegisterNode(request)
    node = await node_of(registry.stubs)

    assert answer.heartbeat_interval_s == 5.0
    assert (node.address, node.version, node.state) == ("10.0.0.1:7471", "1", r.NODE_STATE_ALIVE)
    assert [(d.id, d.kind, d.capacity_bytes) for d in node.devices] == [("cpu", r.DEVICE_KIND_CPU, 5)]


async def test_a_node_on_this_machine_may_be_reached_over_a_unix_socket(registry):
    request = pb.RegisterNodeRequest(node_id="node-a", address="unix:/run/x", devices=[cpu()], boot_nonce="x")
    await registry.stubs.nodes.RegisterNode(request)

    assert (await node_of(registry.stubs)).address == "unix:/run/x"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"node_id": "Bad"}, "node_id"),
        ({"address": "nowhere"}, "address"),
        ({"address": "0.0.0.0:7471"}, "address"),
        ({"address": "[::]:7471"}, "address"),
        ({"address": "unix:"}, "address"),
        ({"boot_nonce": ""}, "boot_nonce"),
        ({"devices": []}, "devices"),
        ({"devices": [cpu(0)]}, "devices.capacity_bytes"),
        ({"devices": [cpu(), cpu()]}, "devices"),
        ({"devices": [r.Device(id="cpu", capacity_bytes=1)]}, "devices.kind"),
    ],
)
async def test_a_bad_announcement_names_its_field(registry, fields, field):
    good = {"node_id": "node-a", "address": "h:1", "devices": [cpu()], "boot_nonce": "x"}
    refusal = await refused(registry.stubs.nodes.RegisterNode(pb.RegisterNodeRequest(**{**good, **fields})))

    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))


async def test_every_call_with_a_stale_epoch_is_refused(registry):
    node = FakeNode(registry.stubs, "node-a", [cpu()])
    await node.register()
    stubs, old = registry.stubs.nodes, {"node_id": "node-a", "epoch": 7}
    state = r.RESIDENCY_STATE_RESIDENT
    calls = [
        stubs.Heartbeat(pb.HeartbeatRequest(**old)),
        stubs.WatchAssignments(pb.WatchAssignmentsRequest(**old)),
        stubs.ReportResidency(pb.ReportResidencyRequest(**old, residency_id="x", state=state)),
        stubs.ReportBuild(pb.ReportBuildRequest(**old, model_id="x")),
        stubs.Heartbeat(pb.HeartbeatRequest(node_id="unknown", epoch=1)),
        registry.stubs.sets.ReportActivationSet(
            sets_pb.ReportActivationSetRequest(**old, set=sets_pb.ActivationSet(id="s", retention="RETAIN"))
        ),
    ]
    refusals = [await refused(call) for call in calls]

    assert {(each.code, each.reason) for each in refusals} == {(grpc.StatusCode.FAILED_PRECONDITION, "EPOCH_STALE")}


async def test_a_new_epoch_loses_residencies_and_leases_of_the_old_one(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node()
    lease = await acquire(registry.stubs, "tiny")
    await node.stop()
    restarted = FakeNode(registry.stubs, "node-a", [cpu()])
    await restarted.register()
    residency = await residency_of(registry.stubs, lease.residency_id)
    refusal = await refused(
        registry.stubs.residencies.RenewLease(
            residency_service_pb2.RenewLeaseRequest(lease_id=lease.id, fence=lease.fence)
        )
    )

    assert restarted.epoch == 2
    assert (residency.state, residency.n_leases) == (r.RESIDENCY_STATE_LOST, 0)
    assert refusal.reason == "LEASE_LOST"
    assert (await node_of(registry.stubs)).devices[0].reserved_bytes == 0


async def test_a_waiter_is_served_after_its_node_restarted(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node(slow_load=True)
    waiting = asyncio.create_task(acquire(registry.stubs, "tiny"))
    await until(lambda: node.loads)
    await node.stop()
    again = await start_node()

    assert (await waiting).node_id == "node-a"
    assert again.epoch == 2


async def test_the_watch_of_an_ended_epoch_ends(registry):
    node = FakeNode(registry.stubs, "node-a", [cpu()])
    await node.register()
    call = registry.stubs.nodes.WatchAssignments(pb.WatchAssignmentsRequest(node_id="node-a", epoch=1), timeout=20)
    await call.read()
    node.boot_nonce = "another"
    await node.register()

    assert (await refused(call.read())).reason == "EPOCH_STALE"


async def test_the_desired_state_is_sent_at_once_and_after_each_change(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node()
    await until(lambda: node.messages)
    lease = await acquire(registry.stubs, "tiny")
    await registry.stubs.residencies.UnloadModel(residency_service_pb2.UnloadModelRequest(model_id="tiny", force=True))
    await until_residency(registry.stubs, lease.residency_id, r.RESIDENCY_STATE_UNLOADED)
    await until(lambda: not node.messages[-1].assignments)
    states = [[a.residency.state for a in message.assignments] for message in node.messages]
    fences = [a.residency.fence for message in node.messages for a in message.assignments]

    assert states[0] == []
    assert states[-1] == []
    assert [r.RESIDENCY_STATE_LOADING] in states
    assert [r.RESIDENCY_STATE_UNLOADING] in states
    assert fences == sorted(fences)
    assert fences[-1] > fences[0]
    loading = next(message for message in node.messages if message.assignments)
    assert loading.assignments[0].model.files_path == str(tmp_path / "tiny")


async def test_a_stale_fence_is_refused_but_memory_that_is_back_is_believed(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node(slow_unload=True)
    lease = await acquire(registry.stubs, "tiny")
    before = await residency_of(registry.stubs, lease.residency_id)
    await registry.stubs.residencies.UnloadModel(residency_service_pb2.UnloadModelRequest(model_id="tiny", force=True))
    stale = pb.ReportResidencyRequest(
        node_id="node-a",
        epoch=node.epoch,
        residency_id=before.id,
        fence=before.fence,
        state=r.RESIDENCY_STATE_RESIDENT,
    )
    refusal = await refused(registry.stubs.nodes.ReportResidency(stale))
    stale.state = r.RESIDENCY_STATE_UNLOADED
    await registry.stubs.nodes.ReportResidency(stale)

    assert refusal.reason == "LEASE_LOST"
    assert (await residency_of(registry.stubs, before.id)).state == r.RESIDENCY_STATE_UNLOADED


async def test_a_runner_that_dies_ends_the_residency_and_its_leases(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node()
    lease = await acquire(registry.stubs, "tiny")
    residency = await residency_of(registry.stubs, lease.residency_id)
    failure = {"failure": {"reason": "RUNNER_LOST", "message": "killed by signal 9"}}
    await node.report(residency, r.RESIDENCY_STATE_FAILED, **failure)
    after = await residency_of(registry.stubs, lease.residency_id)

    assert (after.state, after.failure.reason, after.n_leases) == (r.RESIDENCY_STATE_FAILED, "RUNNER_LOST", 0)
    assert (await acquire(registry.stubs, "tiny")).residency_id != lease.residency_id


async def test_a_silent_node_is_lost_and_comes_back_with_its_residencies(database_url, tmp_path):
    async with running_registry(database_url, tmp_path / "d", roots=(tmp_path,), heartbeat_interval_s=0.3) as registry:
        stubs = registry.stubs
        await ready_model(stubs, tmp_path, "tiny")
        node = FakeNode(stubs, "node-a", [cpu()])
        node.load_gate.set()
        await node.start()
        lease = await acquire(stubs, "tiny", ttl_s=60)
        await until_node(stubs, r.NODE_STATE_LOST)
        lost = await residency_of(stubs, lease.residency_id)
        renewal = residency_service_pb2.RenewLeaseRequest(lease_id=lease.id, fence=lease.fence)
        while_lost = await refused(stubs.residencies.RenewLease(renewal))
        nowhere = await refused(stubs.residencies.AcquireLease(lease_request("tiny")))
        await node.heartbeat()
        back = await residency_of(stubs, lease.residency_id)
        await stubs.residencies.RenewLease(renewal)

        assert lost.state == r.RESIDENCY_STATE_LOST
        assert (while_lost.reason, nowhere.reason) == ("LEASE_LOST", "NODE_LOST")
        assert (back.state, back.fence, back.n_leases) == (r.RESIDENCY_STATE_RESIDENT, lost.fence, 1)
        assert (await node_of(stubs)).state == r.NODE_STATE_ALIVE
        # Its stream was open all the time, and never told it to drop its models.
        assert all(message.assignments for message in node.messages[1:])
        await node.stop()


@pytest.mark.parametrize("force", [False, True])
async def test_what_a_silent_node_held_can_be_unloaded_and_does_not_come_back(database_url, tmp_path, force):
    async with running_registry(database_url, tmp_path / "d", roots=(tmp_path,), heartbeat_interval_s=0.3) as registry:
        stubs = registry.stubs
        await ready_model(stubs, tmp_path, "tiny")
        node = FakeNode(stubs, "node-a", [cpu()])
        node.load_gate.set()
        await node.start()
        lease = await acquire(stubs, "tiny", ttl_s=60)
        await until_node(stubs, r.NODE_STATE_LOST)
        unload = residency_service_pb2.UnloadModelRequest(model_id="tiny", force=force)
        if not force:
            in_use = await refused(stubs.residencies.UnloadModel(unload))
            release = residency_service_pb2.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence)
            await stubs.residencies.ReleaseLease(release)
            assert in_use.reason == "MODEL_IN_USE"
        unloaded = (await stubs.residencies.UnloadModel(unload)).residencies

        async def dropped():
            await node.heartbeat()
            return not node.messages[-1].assignments

        await until(dropped)

        assert [(each.id, each.state) for each in unloaded] == [(lease.residency_id, r.RESIDENCY_STATE_LOST)]
        assert unloaded[0].reason == "unload asked for"
        assert (await residency_of(stubs, lease.residency_id)).state == r.RESIDENCY_STATE_LOST
        await node.stop()


async def test_the_same_boot_registering_again_after_silence_keeps_what_it_holds(database_url, tmp_path):
    async with running_registry(database_url, tmp_path / "d", roots=(tmp_path,), heartbeat_interval_s=0.3) as registry:
        stubs = registry.stubs
        await ready_model(stubs, tmp_path, "tiny")
        node = FakeNode(stubs, "node-a", [cpu()])
        node.load_gate.set()
        await node.start()
        lease = await acquire(stubs, "tiny")
        await until_node(stubs, r.NODE_STATE_LOST)
        await node.register()

        assert node.epoch == 1
        assert (await residency_of(stubs, lease.residency_id)).state == r.RESIDENCY_STATE_RESIDENT
        await node.stop()


async def test_a_restarted_registry_finds_nodes_residencies_and_leases(database_url, tmp_path):
    async with running_registry(database_url, tmp_path / "d", roots=(tmp_path,)) as registry:
        await ready_model(registry.stubs, tmp_path, "tiny")
        node = FakeNode(registry.stubs, "node-a", [cpu()])
        node.load_gate.set()
        await node.start()
        lease = await acquire(registry.stubs, "tiny")
        await node.stop()
    async with running_registry(database_url, tmp_path / "d", roots=(tmp_path,)) as registry:
        node.stubs = registry.stubs
        await node.heartbeat()
        renewal = residency_service_pb2.RenewLeaseRequest(lease_id=lease.id, fence=lease.fence)
        renewed = await registry.stubs.residencies.RenewLease(renewal)

        assert renewed.lease.id == lease.id
        assert (await residency_of(registry.stubs, lease.residency_id)).state == r.RESIDENCY_STATE_RESIDENT


async def test_sets_are_reported_listed_read_and_forgotten(registry):
    node = FakeNode(registry.stubs, "node-a", [cpu()])
    await node.register()
    stubs = registry.stubs.sets

    def report(set_id: str, n_rows: int, **fields: object) -> sets_pb.ReportActivationSetRequest:
        held = sets_pb.ActivationSet(
            id=set_id, model_id="m", corpus_id="c", columns=["x"], n_rows=n_rows, retention="RETAIN", path="/a"
        )
        return sets_pb.ReportActivationSetRequest(node_id="node-a", epoch=1, set=held, **fields)

    for set_id, n_rows in (("a", 1), ("b", 2), ("c", 3), ("a", 9)):
        await stubs.ReportActivationSet(report(set_id, n_rows))
    first = await stubs.ListActivationSets(sets_pb.ListActivationSetsRequest(page_size=2))
    rest = await stubs.ListActivationSets(
        sets_pb.ListActivationSetsRequest(page_size=2, page_token=first.next_page_token)
    )
    found = (await stubs.GetActivationSet(sets_pb.GetActivationSetRequest(set_id="a"))).sets
    await stubs.ReportActivationSet(report("a", 9, deleted=True))
    gone = await refused(stubs.GetActivationSet(sets_pb.GetActivationSetRequest(set_id="a")))
    bad = await refused(stubs.ReportActivationSet(report("a", -1)))

    assert [each.id for each in [*first.sets, *rest.sets]] == ["c", "b", "a"]
    assert rest.next_page_token == ""
    assert [(each.node_id, each.n_rows, list(each.columns)) for each in found] == [("node-a", 9, ["x"])]
    assert (gone.reason, bad.fields) == ("SET_NOT_FOUND", ("set.n_rows",))


async def test_a_second_node_of_one_id_is_refused_while_the_first_lives(registry):
    first = FakeNode(registry.stubs, "node-a", [cpu()])
    first.boot_nonce = "folder-1.start-1"
    await first.register()
    second = FakeNode(registry.stubs, "node-a", [cpu()])
    second.boot_nonce = "folder-2.start-1"

    refusal = await refused(second.register())

    assert refusal.reason == "ALREADY_EXISTS"
    assert "--node-id" in refusal.message
    first.boot_nonce = "folder-1.start-2"
    await first.register()
    assert first.epoch == 2


async def test_a_node_of_one_id_takes_the_place_of_one_that_is_lost(database_url, tmp_path):
    async with running_registry(database_url, tmp_path / "d", roots=(tmp_path,), heartbeat_interval_s=0.3) as registry:
        first = FakeNode(registry.stubs, "node-a", [cpu()])
        first.boot_nonce = "folder-1.start-1"
        await first.register()
        await until_node(registry.stubs, r.NODE_STATE_LOST)
        second = FakeNode(registry.stubs, "node-a", [cpu()])
        second.boot_nonce = "folder-2.start-1"

        await second.register()

        assert second.epoch == 2


@pytest.mark.parametrize(
    ("nonce", "other", "is_other"),
    [("a.1", "b.1", True), ("a.1", "a.2", False), ("a", "b.1", False), ("a", "b", False), ("", "b.1", False)],
)
def test_starts_of_one_folder_are_one_node(nonce, other, is_other):
    assert is_other_node(nonce, other) is is_other
