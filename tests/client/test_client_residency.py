"""Pins, watches of residencies and facts about nodes, through the Python client."""

import datetime as dt

import pytest

from headrace.registry.v1 import residency_pb2 as residency_pb
from headrace_client import errors
from headrace_client.rpc.watch import watch

END = dt.datetime(2030, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


def residency(state="RESIDENT", **fields):
    facts = {"id": "r", "model_id": "tiny", "node_id": "n1", "device_id": "cpu", "reason": "asked for"}
    return residency_pb.Residency(
        state=residency_pb.ResidencyState.Value(f"RESIDENCY_STATE_{state}"), **{**facts, **fields}
    )


@pytest.fixture
def tiny(client):
    return client.models.register(hub="a/b", id="tiny")


def test_pins_are_set_listed_over_pages_and_removed(client, tiny, scripted_registry):
    pin = client.pins.pin("tiny", "anna", reason="demo", expire_time=END)
    client.pins.pin("tiny", "bert", node="n1")
    listed = list(client.pins.list())
    client.pins.unpin("tiny", "anna")

    assert (pin.owner, pin.reason, pin.expire_time, pin.node_id) == ("anna", "demo", END, "")
    assert pin.create_time is not None
    assert [(one.owner, one.node_id, one.expire_time) for one in listed] == [("anna", "", END), ("bert", "n1", None)]
    assert [one.owner for one in client.pins.list()] == ["bert"]
    first, second = (request.request_id for request in scripted_registry.calls["PinModel"])
    assert first != second


def test_a_time_without_a_zone_is_local(client, tiny):
    naive = END.astimezone().replace(tzinfo=None)

    assert client.pins.pin("tiny", "anna", expire_time=naive).expire_time == END


def test_pinning_an_unknown_model_is_not_found(client):
    with pytest.raises(errors.ModelNotFound):
        client.pins.pin("tiny", "anna")


def test_a_watch_yields_events_without_heartbeats(client, scripted_registry):
    scripted_registry.residency_events = [residency("LOADING"), residency("RESIDENT", pinned=True)]
    events = list(client.residencies.watch(model="tiny"))

    assert [(one.seq, one.residency.state, one.snapshot) for one in events] == [
        (1, "LOADING", True),
        (2, "RESIDENT", False),
    ]
    assert events[1].residency.pinned
    assert scripted_registry.calls["WatchResidencies"][0].model_id == "tiny"


def test_a_cut_watch_goes_on_behind_the_last_event(client, scripted_registry):
    scripted_registry.residency_events = [residency(state) for state in ("LOADING", "RESIDENT", "UNLOADING")]
    scripted_registry.cut_watch_at = {3}
    events = list(client.residencies.watch())

    assert [one.seq for one in events] == [1, 2, 3]
    assert [request.after_seq for request in scripted_registry.calls["WatchResidencies"]] == [0, 2]


def test_residencies_and_nodes_tell_all_of_themselves(client, scripted_registry):
    scripted_registry.residencies = [residency("QUEUED", queue_position=2, holders=["anna"], n_leases=1)]
    node = scripted_registry.nodes[0]
    node.memory_bytes, node.memory_free_bytes, node.runtime_bytes, node.max_loads = 100, 50, 7, 2
    node.devices[0].total_bytes, node.devices[0].lost_bytes = 90, 5
    node.devices[0].capability, node.devices[0].flash_attention = "9.0", True
    (one,) = client.residencies.list()
    (known,) = client.nodes()
    (device,) = known.devices

    assert (one.queue_position, one.holders, one.pinned, one.ended) == (2, ("anna",), False, False)
    assert (known.memory_bytes, known.memory_free_bytes, known.runtime_bytes, known.max_loads) == (100, 50, 7, 2)
    assert (device.total_bytes, device.lost_bytes, device.capability, device.flash_attention) == (90, 5, "9.0", True)


def test_what_is_pinned_is_unloaded_with_force_only(client, tiny, scripted_registry):
    scripted_registry.residencies = [residency("UNLOADING")]
    client.pins.pin("tiny", "anna")
    with pytest.raises(errors.ModelInUse) as refusal:
        client.residencies.unload("tiny")

    assert refusal.value.metadata["pin_owners"] == "anna"
    assert client.residencies.unload("tiny", force=True)[0].state == "UNLOADING"


def test_force_is_passed_on_when_deleting(client, tiny, scripted_registry):
    client.models.delete("tiny", force=True)

    assert scripted_registry.calls["DeleteModel"][0].force


def test_a_wait_that_ran_out_is_raised_by_a_watch_at_once():
    """Only the end of the call's own long life is waited out."""
    attempts = []

    def connect(seq, timeout_s):
        attempts.append(seq)
        raise errors.AdmissionTimeout("waited too long")

    with pytest.raises(errors.AdmissionTimeout):
        list(watch(connect, lambda message: message))
    assert attempts == [0]
