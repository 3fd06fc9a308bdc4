"""Corpora of all nodes: one id names the same documents everywhere."""

from __future__ import annotations

import psycopg

from fix_postgres import refused
from headrace.registry.v1 import node_service_pb2

ONE, TWO = "1" * 64, "2" * 64


async def report(node, digests, *, everything=False):
    request = node_service_pb2.ReportCorporaRequest(
        node_id=node.id,
        epoch=node.epoch,
        corpora=[node_service_pb2.HeldCorpus(id=name, digest=digest) for name, digest in digests.items()],
        all=everything,
    )
    await node.stubs.nodes.ReportCorpora(request, timeout=20)


async def test_a_second_content_under_one_id_is_refused_with_node_and_digest(start_node):
    a, b = await start_node("node-a"), await start_node("node-b")
    await report(a, {"docs": ONE})
    await report(b, {"docs": ONE})
    found = await refused(report(b, {"more": ONE, "docs": TWO}))

    assert found.reason == "ALREADY_EXISTS"
    assert found.metadata == {"node_id": "node-a", "digest": ONE}
    assert "headrace corpora rm docs" in found.message
    await report(a, {"more": TWO})  # Nothing of the refused report was kept.


async def test_an_id_is_free_again_once_every_node_has_removed_it(start_node):
    a, b, c = [await start_node(f"node-{name}") for name in "abc"]
    await report(a, {"docs": ONE})
    await report(b, {"docs": ONE})
    await report(a, {"other": ONE}, everything=True)
    still = await refused(report(c, {"docs": TWO}))
    await report(b, {}, everything=True)
    await report(c, {"docs": TWO})

    assert still.metadata["node_id"] == "node-b"


async def test_a_node_that_was_not_heard_for_a_day_keeps_no_id(start_node, database_url):
    a, b = await start_node("node-a"), await start_node("node-b")
    await report(a, {"docs": ONE})
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("UPDATE nodes SET heartbeat_time = heartbeat_time - interval '25 hours' WHERE id = 'node-a'")
    await report(b, {"docs": TWO})


async def test_reports_of_an_earlier_epoch_and_too_many_corpora_are_refused(start_node):
    a = await start_node("node-a")
    many = await refused(report(a, {f"c{n}": ONE for n in range(10_001)}))
    a.epoch += 1
    stale = await refused(report(a, {"docs": ONE}))

    assert (many.reason, many.fields) == ("FIELD_INVALID", ("corpora",))
    assert stale.reason == "EPOCH_STALE"
