"""Nodes in Postgres: epochs, heartbeats, and the desired state of each node.

An epoch is one run of an extractor, told apart by its boot nonce. A new epoch ends all residencies of the one before:
their memory is gone. Silence is weaker: the node and its residencies are LOST, but their memory may still be held. So
no model is placed on a silent node, and its first call with the epoch unchanged brings node and residencies back as
they were; its reports then correct them. Leases on a silent node run out by their own time.

Locks are taken in the order node, device, residency.
"""

from __future__ import annotations

from headrace_registry.errors import AlreadyExists, EpochStale
from headrace_registry.models.builds import build_kind
from headrace_registry.paging import Page
from headrace_registry.postgres import statements
from headrace_registry.postgres.residency.failure_memory import forgive
from headrace_registry.postgres.rows import Row, device_of, model_of, node_of, residency_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.residency.desired import Build, DesiredState, Validation
from headrace_registry.residency.nodes import Announcement, Device, Node, NodeState, Pulse, is_other_node
from headrace_registry.wakeups import Wakeups

# A node that was killed is called LOST, and frees its id, after a few times this long.
_TAKEN_RETRY_S = 5.0

# Keeps the node as it is while its residencies are read: a node LOST in between would be told to drop its models.
NODE_KEEP = "SELECT * FROM nodes WHERE id = %(id)s FOR SHARE"
NODE_LOCK = "SELECT * FROM nodes WHERE id = %(id)s FOR UPDATE"
NODE_INSERT = """
INSERT INTO nodes (id, address, epoch, boot_nonce, state, version)
VALUES (%(id)s, %(address)s, 0, '', 'ALIVE', %(version)s)
ON CONFLICT (id) DO NOTHING
"""
NODE_ANNOUNCE = """
UPDATE nodes
SET address = %(address)s, epoch = %(epoch)s, boot_nonce = %(boot_nonce)s, version = %(version)s,
    memory_bytes = %(memory_bytes)s, runtime_bytes = %(runtime_bytes)s, max_loads = %(max_loads)s,
    max_residents = %(max_residents)s
WHERE id = %(id)s
"""
NODE_MEMORY = """
UPDATE nodes SET memory_free_bytes = %(memory_free_bytes)s,
    runtime_bytes = CASE WHEN %(runtime_bytes)s > 0 THEN %(runtime_bytes)s ELSE runtime_bytes END
WHERE id = %(id)s
"""
NODE_HEARD = "UPDATE nodes SET state = 'ALIVE', heartbeat_time = registry_now() WHERE id = %(id)s"
_SILENT = """
SELECT id FROM nodes WHERE state = 'ALIVE' AND heartbeat_time < registry_now() - make_interval(secs => %(silent_s)s)
"""
NODES_SILENT = _SILENT + "ORDER BY id"
# SKIP LOCKED: a node in a call at this moment is not silent, and another replica may be at the same work.
NODE_LOCK_SILENT = _SILENT + "AND id = %(id)s FOR UPDATE SKIP LOCKED"
NODE_LOST = "UPDATE nodes SET state = 'LOST' WHERE id = %(id)s"
NODES_LIST = """
SELECT * FROM nodes WHERE %(after)s::text IS NULL OR id > %(after)s ORDER BY id LIMIT %(limit)s
"""
DEVICES_ABSENT = "UPDATE devices SET present = false WHERE node_id = %(node_id)s"
DEVICE_UPSERT = """
INSERT INTO devices (node_id, id, kind, name, capacity_bytes, free_bytes, total_bytes, lost_bytes, capability,
                     flash_attention, ordinal)
VALUES (%(node_id)s, %(id)s, %(kind)s, %(name)s, %(capacity_bytes)s, %(free_bytes)s, %(total_bytes)s, %(lost_bytes)s,
        %(capability)s, %(flash_attention)s, %(ordinal)s)
ON CONFLICT (node_id, id) DO UPDATE
SET kind = excluded.kind, name = excluded.name, capacity_bytes = excluded.capacity_bytes,
    free_bytes = excluded.free_bytes, total_bytes = excluded.total_bytes, lost_bytes = excluded.lost_bytes,
    capability = excluded.capability, flash_attention = excluded.flash_attention, ordinal = excluded.ordinal,
    present = true
"""
# `was` is the row before the update.
DEVICE_PULSE = """
UPDATE devices d SET free_bytes = %(free_bytes)s, lost_bytes = %(lost_bytes)s
FROM devices was
WHERE d.node_id = %(node_id)s AND d.id = %(id)s AND was.node_id = d.node_id AND was.id = d.id
RETURNING d.lost_bytes <> was.lost_bytes AS lost_changed
"""
DEVICES_OF_NODES = """
SELECT d.*, COALESCE((
    SELECT sum(r.reserved_bytes) FROM residencies r
    WHERE r.node_id = d.node_id AND r.device_id = d.id
      AND r.state IN ('LOADING', 'RESIDENT', 'DRAINING', 'UNLOADING')), 0)::bigint AS reserved_bytes
FROM devices d WHERE d.node_id = ANY(%(node_ids)s) AND d.present ORDER BY d.node_id, d.ordinal, d.id
"""
DEVICES_OF_NODE_LOCK = "SELECT id FROM devices WHERE node_id = %(node_id)s ORDER BY id FOR UPDATE"
RESIDENCIES_ASSIGNED = (
    statements.RESIDENCY_BRIEF
    + """
WHERE r.node_id = %(node_id)s AND r.node_epoch = %(epoch)s
  AND r.state IN ('LOADING', 'RESIDENT', 'DRAINING', 'UNLOADING')
ORDER BY r.create_time, r.id
"""
)
MODELS_OF_IDS = """
SELECT m.*, f.files FROM models m LEFT JOIN model_files f ON f.model_id = m.id AND f.path = m.files_path
WHERE m.id = ANY(%(ids)s)
"""
BUILDS_OF_NODE = """
SELECT m.*, p.target_path, p.source_path FROM preparations p JOIN models m ON m.id = p.model_id
WHERE p.node_id = %(node_id)s AND p.target_path <> '' AND NOT p.done AND p.failure IS NULL
ORDER BY p.create_time, m.id
"""
ATTEMPTS_OF_NODE = """
SELECT a.id AS attempt_id, a.device_id AS attempt_device_id, a.load_options AS attempt_options, m.*, f.files
FROM validation_attempts a JOIN models m ON m.id = a.model_id
LEFT JOIN model_files f ON f.model_id = m.id AND f.path = m.files_path
WHERE a.node_id = %(node_id)s AND a.node_epoch = %(epoch)s AND NOT a.done AND a.expire_time > registry_now()
ORDER BY a.create_time, a.id
"""
# Residencies of a silent node remember their state, so that RESIDENCIES_REVIVE can bring them back. QUEUED ones hold no
# memory there: they end, and their waiters are placed elsewhere.
RESIDENCIES_LOSE = """
UPDATE residencies
SET state = CASE WHEN %(silent)s AND state = 'QUEUED' THEN 'UNLOADED' ELSE 'LOST' END,
    state_when_lost = CASE WHEN %(silent)s AND state <> 'QUEUED' THEN state END,
    reason = %(reason)s, actor = 'registry', update_time = registry_now()
WHERE node_id = %(node_id)s
  AND (state NOT IN ('UNLOADED', 'FAILED', 'LOST') OR (NOT %(silent)s AND state_when_lost IS NOT NULL))
RETURNING id
"""
RESIDENCIES_REVIVE = """
UPDATE residencies
SET state = state_when_lost, state_when_lost = NULL, reason = %(reason)s, actor = 'registry',
    update_time = registry_now()
WHERE node_id = %(node_id)s AND node_epoch = %(epoch)s AND state = 'LOST' AND state_when_lost IS NOT NULL
RETURNING id
"""

# Columns of `devices` that a node announces.
_ANNOUNCED = (
    "id",
    "kind",
    "name",
    "capacity_bytes",
    "free_bytes",
    "total_bytes",
    "lost_bytes",
    "capability",
    "flash_attention",
)


class NodeStore:
    """Reads and writes for NodeService and ListNodes."""

    def __init__(self, database: Database, wakeups: Wakeups) -> None:
        self._database = database
        self._wakeups = wakeups

    async def register(self, announcement: Announcement) -> int:
        """Stores an announcement. Returns the epoch: the current one for a known boot nonce, else a new one.

        Raises AlreadyExists if a living node with another data folder has this id.
        """

        async def work(conn: Connection) -> int:
            node_id = announcement.node_id
            parameters = {"id": node_id, "address": announcement.address, "version": announcement.version}
            await conn.execute(NODE_INSERT, parameters)
            row = await (await conn.execute(NODE_LOCK, {"id": node_id})).fetchone()
            assert row is not None
            epoch: int = row["epoch"]
            if row["state"] == NodeState.ALIVE and is_other_node(row["boot_nonce"], announcement.boot_nonce):
                raise AlreadyExists(
                    f"Another extractor, at {row['address']}, is registered as node {node_id} and lives; start one of "
                    "the two with another --node-id.",
                    metadata={"node_id": node_id, "address": row["address"]},
                    retry_after_s=_TAKEN_RETRY_S,
                    resource=("Node", node_id),
                )
            if row["boot_nonce"] != announcement.boot_nonce:
                await lose_residencies(conn, node_id, silent=False, reason="the node started anew")
                await forgive(conn, node_id)
                epoch += 1
            elif row["state"] == NodeState.LOST:
                await _revive(conn, node_id, epoch)
            announced = {
                **parameters,
                "epoch": epoch,
                "boot_nonce": announcement.boot_nonce,
                "memory_bytes": announcement.memory_bytes,
                "runtime_bytes": announcement.runtime_bytes,
                "max_loads": announcement.max_loads,
                "max_residents": announcement.max_residents,
            }
            await conn.execute(NODE_ANNOUNCE, announced)
            await conn.execute(NODE_HEARD, {"id": node_id})
            await conn.execute(DEVICES_OF_NODE_LOCK, {"node_id": node_id})
            await conn.execute(DEVICES_ABSENT, {"node_id": node_id})
            for ordinal, device in enumerate(announcement.devices):
                values = {name: getattr(device, name) for name in _ANNOUNCED}
                await conn.execute(DEVICE_UPSERT, {**values, "node_id": node_id, "ordinal": ordinal})
            return epoch

        epoch = await self._database.run(work)
        self._wakeups.wake()
        return epoch

    async def heartbeat(self, node_id: str, epoch: int, pulse: Pulse) -> None:
        """Notes that the node lives, and its free and lost bytes. Raises EpochStale."""

        async def work(conn: Connection) -> bool:
            changed = await hear(conn, node_id, epoch)
            memory = {"memory_free_bytes": pulse.memory_free_bytes, "runtime_bytes": pulse.runtime_bytes}
            await conn.execute(NODE_MEMORY, {"id": node_id, **memory})
            for device_id, free_bytes, lost_bytes in sorted(pulse.devices):
                values = {"node_id": node_id, "id": device_id, "free_bytes": max(0, free_bytes)}
                cursor = await conn.execute(DEVICE_PULSE, {**values, "lost_bytes": lost_bytes})
                row = await cursor.fetchone()
                changed |= row is not None and row["lost_changed"]
            return changed

        if await self._database.run(work):
            self._wakeups.wake()

    async def hear(self, node_id: str, epoch: int) -> None:
        """Notes that the node lives, as any call from it shows. Raises EpochStale."""
        if await self._database.run(lambda conn: hear(conn, node_id, epoch)):
            self._wakeups.wake()

    async def desired(self, node_id: str, epoch: int) -> DesiredState | None:
        """Reads the node's desired state; None while it is LOST: it keeps its models. Raises EpochStale."""

        async def work(conn: Connection) -> DesiredState | None:
            row = await (await conn.execute(NODE_KEEP, {"id": node_id})).fetchone()
            _check_epoch(node_id, epoch, row["epoch"] if row is not None else None)
            if row is None or NodeState(row["state"]) is NodeState.LOST:
                return None
            rows = await (await conn.execute(RESIDENCIES_ASSIGNED, {"node_id": node_id, "epoch": epoch})).fetchall()
            residencies = [residency_of(row) for row in rows]
            ids = sorted({residency.model_id for residency in residencies})
            found = await (await conn.execute(MODELS_OF_IDS, {"ids": ids})).fetchall()
            models = {row["id"]: model_of(row) for row in found}
            builds = await (await conn.execute(BUILDS_OF_NODE, {"node_id": node_id})).fetchall()
            parameters = {"node_id": node_id, "epoch": epoch}
            attempts = await (await conn.execute(ATTEMPTS_OF_NODE, parameters)).fetchall()
            return DesiredState(
                assignments=tuple((r, models[r.model_id]) for r in residencies if r.model_id in models),
                builds=tuple(_build_of(row) for row in builds),
                validations=tuple(
                    Validation(
                        attempt_id=row["attempt_id"],
                        model=model_of(row),
                        device_id=row["attempt_device_id"],
                        load_options=row["attempt_options"],
                    )
                    for row in attempts
                ),
            )

        return await self._database.run(work)

    async def page(self, page: Page) -> tuple[list[Node], str]:
        """Returns one page of nodes ordered by id, and the token of the next."""

        async def work(conn: Connection) -> list[Node]:
            after = page.after[0] if page.after is not None else None
            rows = await (await conn.execute(NODES_LIST, {"after": after, "limit": page.size + 1})).fetchall()
            ids = [row["id"] for row in rows]
            found = await (await conn.execute(DEVICES_OF_NODES, {"node_ids": ids})).fetchall()
            devices: dict[str, list[Device]] = {node_id: [] for node_id in ids}
            for row in found:
                devices[row["node_id"]].append(device_of(row))
            return [node_of(row, tuple(devices[row["id"]])) for row in rows]

        return page.cut(await self._database.run(work), lambda node: (node.id,))

    async def silent(self, silent_s: float) -> list[str]:
        """Returns the ids of living nodes that were not heard for `silent_s` seconds."""

        async def work(conn: Connection) -> list[str]:
            rows = await (await conn.execute(NODES_SILENT, {"silent_s": silent_s})).fetchall()
            return [row["id"] for row in rows]

        return await self._database.single(work)

    async def lose(self, node_id: str, silent_s: float) -> bool:
        """Marks a node LOST if it is still silent. Returns False if it was heard, or another replica was faster."""

        async def work(conn: Connection) -> bool:
            cursor = await conn.execute(NODE_LOCK_SILENT, {"id": node_id, "silent_s": silent_s})
            if await cursor.fetchone() is None:
                return False
            await conn.execute(NODE_LOST, {"id": node_id})
            await lose_residencies(conn, node_id, silent=True, reason="the node is silent")
            return True

        lost = await self._database.run(work)
        if lost:
            self._wakeups.wake()
        return lost


async def hear(conn: Connection, node_id: str, epoch: int) -> bool:
    """Checks the epoch and notes that the node lives. Returns True if the node was LOST and is back."""
    row = await (await conn.execute(NODE_LOCK, {"id": node_id})).fetchone()
    _check_epoch(node_id, epoch, row["epoch"] if row is not None else None)
    assert row is not None
    lost = NodeState(row["state"]) is NodeState.LOST
    if lost:
        await _revive(conn, node_id, epoch)
    await conn.execute(NODE_HEARD, {"id": node_id})
    return lost


async def lose_residencies(conn: Connection, node_id: str, *, silent: bool, reason: str) -> None:
    """Makes the node's residencies LOST, and ends their leases unless the node is only silent."""
    await conn.execute(DEVICES_OF_NODE_LOCK, {"node_id": node_id})
    parameters = {"node_id": node_id, "silent": silent, "reason": reason}
    rows = await (await conn.execute(RESIDENCIES_LOSE, parameters)).fetchall()
    ids = [row["id"] for row in rows]
    if not silent:
        await conn.execute(statements.LEASES_END, {"residency_ids": ids})
    await conn.execute(statements.RESIDENCY_EVENTS, {"ids": ids})


async def _revive(conn: Connection, node_id: str, epoch: int) -> None:
    await conn.execute(DEVICES_OF_NODE_LOCK, {"node_id": node_id})
    parameters = {"node_id": node_id, "epoch": epoch, "reason": "the node is back"}
    rows = await (await conn.execute(RESIDENCIES_REVIVE, parameters)).fetchall()
    await conn.execute(statements.RESIDENCY_EVENTS, {"ids": [row["id"] for row in rows]})


def _build_of(row: Row) -> Build:
    model = model_of(row)
    target_path, source_path = row["target_path"], row["source_path"]
    kind = build_kind(model, target_path)
    return Build(kind=kind, model=model, target_path=target_path, source_path=source_path)


def _check_epoch(node_id: str, epoch: int, current: int | None) -> None:
    if current is None:
        raise EpochStale(f"node {node_id!r} is not registered; call RegisterNode", resource=("node", node_id))
    if current != epoch:
        raise EpochStale(
            f"epoch {epoch} of node {node_id!r} is over, {current} is the current one; call RegisterNode",
            metadata={"epoch": str(epoch), "current_epoch": str(current)},
            resource=("node", node_id),
        )
