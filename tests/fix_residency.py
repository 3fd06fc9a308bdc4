"""A registry's stores on a real Postgres with a clock moved by hand, nodes that misbehave, and the invariants."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psycopg
from psycopg.rows import dict_row

from headrace_chassis.errors import ServiceError
from headrace_registry.models.models import Failure, Transfer
from headrace_registry.postgres.requests import Request
from headrace_registry.postgres.residency.leases import LeaseStore
from headrace_registry.postgres.residency.nodes import NodeStore
from headrace_registry.postgres.residency.residencies import ResidencyStore
from headrace_registry.postgres.residency.upkeep import ResidencyUpkeep
from headrace_registry.postgres.server.pool import Connection
from headrace_registry.residency.leases import Lease, LeaseTerms
from headrace_registry.residency.nodes import Announcement, Device, DeviceKind
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.residency import Residency, ResidencyReport, ResidencyState
from headrace_registry.residency.wishes import Wish
from headrace_registry.wakeups import Wakeups
from headrace_registry.workers.lease_wait import LeaseWait

T = TypeVar("T")
S = ResidencyState
SILENT_S = 15.0
EVERYTHING = (
    "residency_events, models, nodes, devices, residencies, waiters, leases, pins, requests, "
    "load_failures, learned_sizes"
)

# Statements that find nothing at any commit: each row found breaks an invariant.
INVARIANTS = {
    "1 over-committed": """
        SELECT d.node_id, d.id, sum(LEAST(r.reserved_bytes, r.admitted_bytes)) AS held, d.lost_bytes, d.capacity_bytes
        FROM devices d JOIN residencies r ON r.node_id = d.node_id AND r.device_id = d.id
        WHERE r.state IN ('LOADING', 'RESIDENT', 'DRAINING', 'UNLOADING')
        GROUP BY d.node_id, d.id
        HAVING sum(LEAST(r.reserved_bytes, r.admitted_bytes)) + d.lost_bytes > d.capacity_bytes""",
    "2, 3 leased but not resident": """
        SELECT l.id, r.id, r.state, r.reason FROM leases l JOIN residencies r ON r.id = l.residency_id
        WHERE l.state = 'HELD' AND l.expire_time > registry_now()
          AND r.state NOT IN ('RESIDENT', 'DRAINING') AND r.state_when_lost IS NULL""",
    "2 evicted too soon": """
        SELECT e.residency_id, e.reason FROM residency_events e
        WHERE e.id > %(seen)s AND e.state IN ('UNLOADING', 'DRAINING')
          AND (e.reason LIKE 'evicted%%' OR e.reason LIKE 'drained for%%')
          AND e.time < (SELECT max(b.time) FROM residency_events b WHERE b.residency_id = e.residency_id
                        AND b.state = 'RESIDENT' AND b.id < e.id
                        AND b.reason <> 'the node is back') + make_interval(secs => %(min_residency_s)s)""",
    "2 a pinned or loading victim": """
        SELECT e.residency_id, e.reason FROM residency_events e
        WHERE e.id > %(seen)s AND e.state IN ('UNLOADING', 'DRAINING')
          AND (e.reason LIKE 'evicted%%' OR e.reason LIKE 'drained for%%' OR e.reason LIKE 'idle%%')
          AND ((SELECT b.state FROM residency_events b WHERE b.residency_id = e.residency_id AND b.id < e.id
                ORDER BY b.id DESC LIMIT 1) <> 'RESIDENT'
               OR EXISTS (SELECT 1 FROM pins p WHERE p.model_id = e.model_id
                          AND p.node_id IN ('', e.residency->>'node_id')
                          AND p.create_time < e.time AND (p.expire_time IS NULL OR p.expire_time > e.time)))""",
    "5 two loads of one model on one device": """
        SELECT model_id, node_id, device_id FROM residencies
        WHERE state IN ('QUEUED', 'LOADING', 'RESIDENT') GROUP BY 1, 2, 3 HAVING count(*) > 1""",
    "6 active under a stale epoch": """
        SELECT r.id FROM residencies r JOIN nodes n ON n.id = r.node_id
        WHERE r.state NOT IN ('UNLOADED', 'FAILED', 'LOST') AND (r.node_epoch <> n.epoch OR n.state <> 'ALIVE')""",
    "overtaken in the queue": """
        SELECT o.id, r.id FROM residencies o JOIN residencies r
            ON r.node_id = o.node_id AND r.device_id = o.device_id AND r.queue_seq > o.queue_seq
        JOIN residency_events e ON e.residency_id = r.id AND e.id > %(seen)s AND e.state = 'LOADING'
             AND e.reason IN ('memory is there', 'asked for')
        JOIN devices d ON d.node_id = o.node_id AND d.id = o.device_id
        WHERE o.state = 'QUEUED' AND o.reserved_bytes <= d.capacity_bytes - COALESCE((
            SELECT sum(i.reserved_bytes) FROM residencies i
            WHERE i.node_id = d.node_id AND i.device_id = d.id AND i.state IN ('LOADING', 'RESIDENT')
              AND EXISTS (SELECT 1 FROM pins p WHERE p.model_id = i.model_id AND p.node_id IN ('', i.node_id)
                          AND (p.expire_time IS NULL OR p.expire_time > registry_now() + interval '1 hour'))), 0)""",
    "more loads or models than a node allows": """
        SELECT n.id FROM nodes n JOIN residencies r ON r.node_id = n.id
        WHERE r.state IN ('LOADING', 'RESIDENT', 'DRAINING', 'UNLOADING')
        GROUP BY n.id
        HAVING (n.max_loads > 0 AND count(*) FILTER (WHERE r.state = 'LOADING') > n.max_loads)
            OR (n.max_residents > 0 AND count(*) > n.max_residents)""",
    "a transition without reason or actor": """
        SELECT id FROM residency_events WHERE id > %(seen)s AND (reason = '' OR actor = '')""",
}


# One statement for all of them: a check follows every step.
_BROKEN = " UNION ALL ".join(
    f"SELECT '{name}' AS name, to_jsonb(found) AS row FROM ({statement}) AS found"
    for name, statement in INVARIANTS.items()
)


def broken_invariants(conn: psycopg.Connection[Any], policy: Policy, *, seen: int = 0) -> list[str]:
    """Names the broken invariants; events up to `seen` were looked at before."""
    parameters = {"seen": seen, "min_residency_s": policy.min_residency_s}
    return [f"{row['name']}: {row['row']}" for row in conn.execute(_BROKEN, parameters).fetchall()]


class DirectDatabase:
    """One connection, each piece of work one transaction."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn

    async def run(self, work: Callable[[Connection], Awaitable[T]], *, deadline_s: float | None = None) -> T:
        async with self._conn.transaction():
            return await work(self._conn)

    async def single(self, work: Callable[[Connection], Awaitable[T]], *, deadline_s: float | None = None) -> T:
        return await work(self._conn)


@dataclass
class FakeRunners:
    """The true use of a device's memory, by residency id: bytes, and which loads are done."""

    used: dict[str, int] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)
    lost_bytes: int = 0

    def in_use(self) -> int:
        return sum(self.used.values()) + self.lost_bytes


class World:
    """Stores, a clock and nodes. Its methods are not async: each runs to its end."""

    def __init__(self, url: str, policy: Policy) -> None:
        self.policy = policy
        self._runner = asyncio.Runner()
        self.sync = psycopg.connect(url, autocommit=True, row_factory=dict_row)
        self._conn: Connection = self.run(
            psycopg.AsyncConnection.connect(url, autocommit=True, row_factory=dict_row)  # type: ignore[arg-type]
        )
        database: Any = DirectDatabase(self._conn)
        wakeups = Wakeups()
        self.residencies = ResidencyStore(database, wakeups, policy)
        self.upkeep = ResidencyUpkeep(database, wakeups, policy)
        self.leases = LeaseStore(database, wakeups, policy)
        self.nodes = NodeStore(database, wakeups)
        self.now = 0.0
        self.runners: dict[tuple[str, str], FakeRunners] = {}
        self.epochs: dict[str, int] = {}
        self._seen = 0
        self._ids = itertools.count(1)
        self.sync.execute("CREATE TABLE IF NOT EXISTS test_clock (now timestamptz NOT NULL)")
        self.sync.execute(
            "CREATE OR REPLACE FUNCTION registry_now() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE "
            "AS 'SELECT now FROM test_clock'"
        )
        self.empty()

    def close(self) -> None:
        self.run(self._conn.close())
        self.sync.close()
        self._runner.close()

    def run(self, work: Awaitable[T]) -> T:
        return self._runner.run(work)  # type: ignore[arg-type]

    def empty(self) -> None:
        self.sync.execute(f"TRUNCATE {EVERYTHING} CASCADE")
        self.sync.execute("TRUNCATE test_clock")
        self.sync.execute("ALTER SEQUENCE residency_queue RESTART")
        self._ids = itertools.count(1)
        self.now = 0.0
        self.runners.clear()
        self.epochs.clear()
        self.sync.execute("INSERT INTO test_clock VALUES ('2030-01-01 00:00:00+00')")

    # Models, nodes, pins ----------------------------------------------------------------------------------------------

    def add_model(self, name: str, n_parameters: int) -> None:
        self.sync.execute(
            "INSERT INTO models (id, identity, source_kind, location, state, parameters_by_dtype, files_path) "
            "VALUES (%s, %s, 'folder', '/m', 'READY', jsonb_build_object('F32', %s::bigint), '/m')",
            (name, name, n_parameters),
        )

    def start_node(self, name: str, devices: dict[str, int], *, max_loads: int = 0, max_residents: int = 0) -> None:
        """Begins a new epoch: all memory of the node is free."""
        kinds = {"cpu": DeviceKind.CPU, "cuda": DeviceKind.CUDA}
        announcement = Announcement(
            node_id=name,
            address="127.0.0.1:1",
            version="test",
            boot_nonce=uuid.uuid4().hex,
            devices=tuple(
                Device(id=device, kind=kinds[device.split(":")[0]], name="", capacity_bytes=capacity)
                for device, capacity in devices.items()
            ),
        )
        self.epochs[name] = self.run(self.nodes.register(announcement))
        self.sync.execute(
            "UPDATE nodes SET max_loads = %s, max_residents = %s WHERE id = %s", (max_loads, max_residents, name)
        )
        self.sync.execute("UPDATE devices SET lost_bytes = 0 WHERE node_id = %s", (name,))
        for device in devices:
            self.runners[name, device] = FakeRunners()

    def pin(self, model: str, *, for_s: float | None = None, owner: str = "ops") -> None:
        self.sync.execute(
            "INSERT INTO pins (model_id, owner, reason, expire_time, create_time) VALUES (%s, %s, 'test', "
            "registry_now() + make_interval(secs => %s), registry_now()) ON CONFLICT DO NOTHING",
            (model, owner, for_s),
        )

    def unpin(self, model: str) -> None:
        self.sync.execute("DELETE FROM pins WHERE model_id = %s", (model,))

    def pinned(self, model: str) -> bool:
        statement = "SELECT 1 FROM pins WHERE model_id = %s AND (expire_time IS NULL OR expire_time > registry_now())"
        return self.sync.execute(statement, (model,)).fetchone() is not None

    def leased(self, model: str) -> bool:
        """True if a lease on the model is held, on silent nodes too."""
        statement = "SELECT 1 FROM leases WHERE model_id = %s AND state = 'HELD' AND expire_time > registry_now()"
        return self.sync.execute(statement, (model,)).fetchone() is not None

    # Time ------------------------------------------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        """Moves the clock and does nothing else."""
        self.now += seconds
        self.sync.execute("UPDATE test_clock SET now = now + make_interval(secs => %s)", (seconds,))

    def go_on(self, seconds: float, *waiting: LeaseWait) -> None:
        """Lets time pass with nodes heard and callers polling."""
        while seconds > 0:
            self.advance(min(5.0, seconds))
            seconds -= 5.0
            for node in self.epochs:
                self.heartbeat(node)
            for call in waiting:
                self.poll(call)

    def tick(self) -> None:
        """Does a round of upkeep."""
        self.run(self.leases.expire())
        for node in self.run(self.nodes.silent(SILENT_S)):
            self.run(self.nodes.lose(node, SILENT_S))
        self.run(self.upkeep.tidy())

    # Callers ---------------------------------------------------------------------------------------------------------

    def ask(
        self, model: str, *, node: str = "", device: str = "", wait_s: float = 600.0, ttl_s: float = 60.0
    ) -> LeaseWait:
        """Returns an AcquireLease that has not taken its first step."""
        number = next(self._ids)
        wish = Wish(model_id=model, node_id=node, device_id=device, actor=f"caller-{number}")
        terms = LeaseTerms(holder=f"caller-{number}", ttl_s=ttl_s)
        waiter_id = f"waiter-{number:06d}"
        return LeaseWait(self.residencies, wish, terms, waiter_id=waiter_id, deadline=self.now + wait_s)

    def poll(self, call: LeaseWait) -> Lease | None:
        """Takes one step; returns the lease once it is granted. Raises the error that the caller would get."""
        try:
            progress = self.run(call.advance(self.now))
        except ServiceError:
            self.run(call.give_up())
            raise
        return progress.lease if progress is not None else None

    def acquire(self, model: str, **fields: Any) -> Lease:
        """Acquires a lease on a model that is resident, or that loads at once on a node that obeys."""
        call = self.ask(model, **fields)
        lease = self.poll(call)
        for _ in range(20):
            if lease is not None:
                return lease
            self.obey()
            self.tick()
            lease = self.poll(call)
        raise AssertionError(f"no lease of {model}: {self.states()}")

    def load(self, model: str, *, node: str = "") -> Residency:
        wish = Wish(model_id=model, node_id=node, actor="LoadModel")
        return self.run(self.residencies.load(wish, Request(request_id="", method="LoadModel", arguments=())))

    def unload(self, model: str, *, force: bool = False) -> list[Residency]:
        request = Request(request_id="", method="UnloadModel", arguments=())
        return self.run(self.residencies.unload(model, node_id="", force=force, actor="operator", request=request))

    def release(self, lease: Lease) -> None:
        self.run(self.leases.release(lease.id, lease.fence))

    # Nodes -----------------------------------------------------------------------------------------------------------

    def heartbeat(self, node: str) -> None:
        self.run(self.nodes.hear(node, self.epochs[node]))

    def assignments(self, node: str) -> list[Residency]:
        """Returns the node's assignments; the node drops runners whose residency is not among them any more."""
        desired = self.run(self.nodes.desired(node, self.epochs[node]))
        if desired is None:
            return []
        told = sorted(
            (residency for residency, _ in desired.assignments),
            key=lambda each: (each.model_id, each.device_id, each.fence),
        )
        wanted = {each.id for each in told}
        for (name, _), runners in self.runners.items():
            if name == node:
                for gone in set(runners.used) - wanted:
                    del runners.used[gone]
                    runners.loaded.discard(gone)
        return told

    def report(self, residency: Residency, state: ResidencyState, **fields: Any) -> None:
        given = {"node_id": residency.node_id, "epoch": self.epochs[residency.node_id], "fence": residency.fence}
        self.run(
            self.residencies.report(ResidencyReport(residency_id=residency.id, state=state, **{**given, **fields}))
        )

    def starts_loading(self, residency: Residency) -> None:
        """Begins a load: the runner takes all its memory at once."""
        self._runners(residency).used[residency.id] = residency.reserved_bytes
        self.report(residency, S.LOADING, transfer=Transfer(done_bytes=1, total_bytes=2))

    def loads(self, residency: Residency, *, measured_bytes: int | None = None) -> None:
        runners = self._runners(residency)
        size = measured_bytes if measured_bytes is not None else residency.reserved_bytes
        runners.used[residency.id] = size
        runners.loaded.add(residency.id)
        self.report(residency, S.RESIDENT, measured_bytes=size)

    def fails(
        self, residency: Residency, reason: str = "DEVICE_OOM", *, lost_bytes: int = 0, interrupted: bool = False
    ) -> None:
        self._forget(residency, lost_bytes)
        failure = Failure(reason=reason, message="no luck", interrupted=interrupted)
        self.report(residency, S.FAILED, failure=failure, lost_bytes=lost_bytes)

    def unloads(self, residency: Residency, *, lost_bytes: int = 0) -> None:
        self._forget(residency, lost_bytes)
        self.report(residency, S.UNLOADED, lost_bytes=lost_bytes)

    def obey(self, node: str = "") -> None:
        """Lets nodes follow their assignments at once."""
        for name in [node] if node else list(self.epochs):
            self.heartbeat(name)
            for told in self.assignments(name):
                if told.state is S.UNLOADING:
                    self.unloads(told)
                elif told.id not in self._runners(told).loaded or told.state is S.LOADING:
                    self.loads(told)

    def returns_lost(self, node: str) -> None:
        """Lets the node find its lost memory free after all."""
        for (name, device), runners in self.runners.items():
            if name == node:
                runners.lost_bytes = 0
                self.sync.execute("UPDATE devices SET lost_bytes = 0 WHERE node_id = %s AND id = %s", (name, device))

    def _forget(self, residency: Residency, lost_bytes: int) -> None:
        runners = self._runners(residency)
        runners.used.pop(residency.id, None)
        runners.loaded.discard(residency.id)
        runners.lost_bytes += lost_bytes

    def _runners(self, residency: Residency) -> FakeRunners:
        return self.runners[residency.node_id, residency.device_id]

    # The tables -------------------------------------------------------------------------------------------------------

    def states(self) -> dict[str, str]:
        """Returns the state of each model's latest residency."""
        rows = self.sync.execute("SELECT model_id, state FROM residencies ORDER BY queue_seq").fetchall()
        return {row["model_id"]: row["state"] for row in rows}

    def residency(self, residency_id: str) -> dict[str, Any]:
        row = self.sync.execute("SELECT * FROM residencies WHERE id = %s", (residency_id,)).fetchone()
        assert row is not None
        return row

    def latest(self, model: str) -> dict[str, Any]:
        row = self.sync.execute(
            "SELECT * FROM residencies WHERE model_id = %s ORDER BY queue_seq DESC LIMIT 1", (model,)
        ).fetchone()
        assert row is not None
        return row

    def check(self) -> None:
        """Raises AssertionError that names the broken invariants."""
        broken = broken_invariants(self.sync, self.policy, seen=self._seen)
        devices = self.sync.execute("SELECT node_id, id, capacity_bytes, lost_bytes FROM devices").fetchall()
        for row in devices:
            place = (row["node_id"], row["id"])
            runners = self.runners[place]
            if runners.in_use() > row["capacity_bytes"]:
                broken.append(f"1 the memory of {place} is over-committed in truth: {runners}")
            if runners.lost_bytes > row["lost_bytes"]:
                broken.append(f"7 {place} lost {runners.lost_bytes} bytes, the registry knows of {row['lost_bytes']}")
        assert not broken, "\n".join(broken)
        last = self.sync.execute("SELECT COALESCE(max(id), 0) AS id FROM residency_events").fetchone()
        assert last is not None
        self._seen = last["id"]


@contextlib.contextmanager
def told(kind: type[ServiceError]) -> Iterator[list[ServiceError]]:
    """Collects the error of this kind that the block must end with."""
    found: list[ServiceError] = []
    try:
        yield found
    except kind as exc:
        found.append(exc)
    assert found, f"{kind.__name__} was not raised"
