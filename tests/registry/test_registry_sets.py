"""Pins, deletion and eviction of activation sets over gRPC."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from fix_postgres import refused
from fix_registry import FakeNode, cpu
from headrace.registry.v1 import activation_set_service_pb2 as pb


def at(seconds_from_now):
    stamp = Timestamp()
    stamp.FromDatetime(datetime.now(UTC) + timedelta(seconds=seconds_from_now))
    return stamp


class Sets:
    """The calls of people and of the node."""

    def __init__(self, registry):
        self.stubs = registry.stubs.sets

    async def report(self, set_id="a", *, node_id="node-a", retention="RETAIN", deleted=False, evict=False, **fields):
        held = pb.ActivationSet(id=set_id, retention=retention, path="/a", **fields)
        request = pb.ReportActivationSetRequest(node_id=node_id, epoch=1, set=held, deleted=deleted, evict=evict)
        return await self.stubs.ReportActivationSet(request)

    async def pin(self, owner="ann", *, set_id="a", request_id="", **fields):
        request = pb.PinActivationSetRequest(request_id=request_id, set_id=set_id, owner=owner, **fields)
        return await self.stubs.PinActivationSet(request)

    async def delete(self, set_id="a", request_id=""):
        return await self.stubs.DeleteActivationSet(pb.DeleteActivationSetRequest(request_id=request_id, set_id=set_id))

    async def get(self, set_id="a"):
        return (await self.stubs.GetActivationSet(pb.GetActivationSetRequest(set_id=set_id))).sets


@pytest.fixture
async def sets(registry):
    for name in ("node-a", "node-b"):
        await FakeNode(registry.stubs, name, [cpu()]).register()
    return Sets(registry)


async def test_a_pinned_set_says_so_to_people_and_to_its_node(sets):
    await sets.report()
    before = await sets.report()
    end = at(3600)
    await sets.pin("ann", reason="for the paper")
    for_ever = await sets.report()
    await sets.pin("ann", reason="for the talk", expire_time=end)

    answer = await sets.report()
    held = (await sets.get())[0]

    assert not before.pinned
    assert for_ever.pinned
    assert not for_ever.HasField("pinned_until")
    assert (answer.pinned, answer.pinned_until.seconds) == (True, end.seconds)
    assert [(pin.owner, pin.reason, pin.expire_time.seconds) for pin in held.pins] == [
        ("ann", "for the talk", end.seconds)
    ]


async def test_the_latest_end_of_several_pins_counts(sets):
    await sets.report()
    ends = [at(60), at(7200), at(600)]
    for owner, end in zip(("ann", "bob", "eve"), ends, strict=True):
        await sets.pin(owner, expire_time=end)

    assert (await sets.report()).pinned_until.seconds == ends[1].seconds


async def test_an_end_that_is_past_ends_the_pin(sets):
    await sets.report()
    await sets.pin("ann")
    await sets.pin("bob")

    await sets.pin("ann", expire_time=at(-1))
    await sets.pin("nobody", expire_time=at(-1))

    assert [pin.owner for pin in (await sets.get())[0].pins] == ["bob"]


async def test_a_repeated_request_is_no_second_pin(sets):
    await sets.report()
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    await sets.pin("ann", request_id=first)
    await sets.pin("ann", request_id=second, expire_time=at(-1))

    await sets.pin("ann", request_id=first)

    assert not (await sets.get())[0].pins
    assert (await refused(sets.pin("bob", request_id=first))).reason == "FIELD_INVALID"


async def test_a_pin_keeps_a_set_from_eviction_and_an_eviction_takes_it_off_the_list(sets):
    await sets.report()
    await sets.report(node_id="node-b")
    await sets.pin("ann")
    kept = await sets.report(evict=True)
    listed = [held.node_id for held in await sets.get()]
    await sets.pin("ann", expire_time=at(-1))

    gone = await sets.report(evict=True)

    assert (kept.pinned, listed) == (True, ["node-a", "node-b"])
    assert not gone.pinned
    assert [held.node_id for held in await sets.get()] == ["node-b"]


async def test_of_a_pin_and_an_eviction_at_once_one_sees_the_other(sets):
    for number in range(20):
        set_id = f"set-{number}"
        await sets.report(set_id)

        evicted, pinned = await asyncio.gather(
            sets.report(set_id, evict=True), sets.pin(set_id=set_id), return_exceptions=True
        )

        if isinstance(pinned, Exception):
            assert not evicted.pinned
        else:
            assert evicted.pinned
            assert len((await sets.get(set_id))[0].pins) == 1


async def test_deletion_is_told_to_every_node_until_it_has_removed_the_set(sets):
    await sets.report()
    await sets.report(node_id="node-b")
    request_id = str(uuid.uuid4())

    await sets.delete(request_id=request_id)
    await sets.delete(request_id=request_id)

    assert [held.deleting for held in await sets.get()] == [True, True]
    assert (await sets.report()).delete
    await sets.report(deleted=True)
    assert [held.node_id for held in await sets.get()] == ["node-b"]
    assert (await refused(sets.pin("ann"))).reason == "STATE_CONFLICT"


async def test_what_is_pinned_or_used_is_not_deleted(sets):
    await sets.report(holders=["trainer-1", "x123"])
    used = await refused(sets.delete())
    await sets.report()
    await sets.pin("ann")
    pinned = await refused(sets.delete())
    await sets.pin("ann", expire_time=at(-1))
    await sets.delete()

    assert (used.reason, pinned.reason) == ("STATE_CONFLICT", "STATE_CONFLICT")
    assert used.metadata["holders"] == "trainer-1 on node-a, x123 on node-a"
    assert pinned.metadata["pin_owners"] == "ann"


async def test_a_window_is_neither_pinned_nor_deleted(sets):
    await sets.report(retention="WINDOW")

    assert (await refused(sets.pin("ann"))).reason == "STATE_CONFLICT"
    assert (await refused(sets.delete())).reason == "STATE_CONFLICT"


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"owner": ""}, "owner"), ({"set_id": ""}, "set_id"), ({"request_id": "x"}, "request_id")],
)
async def test_bad_pins_are_refused_by_field(sets, fields, field):
    await sets.report()

    refusal = await refused(sets.pin(**fields))

    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))


async def test_unknown_sets_are_not_found(sets):
    assert (await refused(sets.pin(set_id="none"))).reason == "SET_NOT_FOUND"
    assert (await refused(sets.delete("none"))).reason == "SET_NOT_FOUND"


async def test_last_use_and_holders_are_what_the_node_said_and_no_time_to_come(sets):
    used = at(-100)
    await sets.report(last_used_time=used, holders=["x1"])
    told = (await sets.get())[0]
    await sets.report(last_used_time=at(9999))
    later = (await sets.get())[0]

    assert (told.last_used_time.seconds, list(told.holders)) == (used.seconds, ["x1"])
    assert later.last_used_time.seconds <= at(1).seconds


async def test_sets_of_one_node_are_listed_alone(sets):
    for set_id, node_id in (("a", "node-a"), ("a", "node-b"), ("b", "node-b")):
        await sets.report(set_id, node_id=node_id)
    await sets.pin("ann", set_id="b")

    listed = (await sets.stubs.ListActivationSets(pb.ListActivationSetsRequest(node_id="node-b"))).sets

    assert [(held.id, len(held.pins)) for held in listed] == [("b", 1), ("a", 0)]


async def test_a_set_is_read_with_what_its_rows_depend_on_and_listed_without(sets):
    identity = '{"recipe":{"context_size":256},"compute_dtype":"float32"}'
    await sets.report(identity_json=identity)
    listed = (await sets.stubs.ListActivationSets(pb.ListActivationSetsRequest())).sets

    assert [held.identity_json for held in await sets.get()] == [identity]
    assert [held.identity_json for held in listed] == [""]
    assert (await refused(sets.report(identity_json="x" * 70_000))).reason == "FIELD_INVALID"


async def test_a_page_of_sets_tells_how_many_there_are_on_all(sets):
    for name in ("a", "b", "c"):
        await sets.report(name, model_id="m" if name == "c" else "other")
    page = await sets.stubs.ListActivationSets(pb.ListActivationSetsRequest(page_size=2))
    of_model = await sets.stubs.ListActivationSets(pb.ListActivationSetsRequest(model_id="m"))

    assert (len(page.sets), page.total_size) == (2, 3)
    assert of_model.total_size == 1


async def test_pages_of_sets_with_many_columns_end_before_a_message_is_too_large(sets, database_url):
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(
            "INSERT INTO activation_sets (id, node_id, model_id, corpus_id, columns, n_rows, size_bytes, complete, "
            "retention, path) SELECT 's' || n, 'node-a', 'm', 'c', array_fill(repeat('x', 60), ARRAY[1000]), 1, 1, "
            "true, 'RETAIN', '/' FROM generate_series(1, 400) n"
        )
    listed, token = [], ""
    while True:
        request = pb.ListActivationSetsRequest(page_size=1000, page_token=token)
        page = await sets.stubs.ListActivationSets(request, timeout=30)
        assert page.ByteSize() < 3 * 1024 * 1024
        listed += [each.id for each in page.sets]
        token = page.next_page_token
        if not token:
            break

    assert sorted(listed) == sorted(f"s{n}" for n in range(1, 401))
