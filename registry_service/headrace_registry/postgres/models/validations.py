"""Validation attempts in Postgres.

An attempt holds bytes of its device, reserved in the transaction that found them free, until its node has freed them:
an attempt that was cancelled is over for its caller, while its node still ends the process.
Attempts begin and end under the locks of their node's devices.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from psycopg.types.json import Jsonb

from headrace_registry.errors import AttemptNotFound, CapacityBusy, NodeNotFound, StateConflict
from headrace_registry.models.models import Failure, Model, Quantization
from headrace_registry.models.validations import Attempt, AttemptKind, Step, StepState, ValidationReport, closed, passed
from headrace_registry.paging import Page
from headrace_registry.postgres.models.models import read_model
from headrace_registry.postgres.residency.node_views import lock_nodes
from headrace_registry.postgres.residency.nodes import hear
from headrace_registry.postgres.residency.placing import lock_living_nodes, read_spaces, ready_model
from headrace_registry.postgres.rows import Row, failure_of, json_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.residency.placement import Action, Space, decide_placement
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.refusals import refusal
from headrace_registry.residency.residency import ResidencyReport, ResidencyState
from headrace_registry.residency.wishes import Wish
from headrace_registry.wakeups import Wakeups

ATTEMPT_INSERT = """
INSERT INTO validation_attempts (id, model_id, node_id, device_id, node_epoch, load_options, quantization,
                                 reserved_bytes, expire_time)
VALUES (%(id)s, %(model_id)s, %(node_id)s, %(device_id)s, %(node_epoch)s, %(load_options)s, %(quantization)s,
        %(reserved_bytes)s, registry_now() + make_interval(secs => %(ttl_s)s))
"""
ATTEMPT_READ = "SELECT * FROM validation_attempts WHERE id = %(id)s"
ATTEMPT_LOCK = "SELECT * FROM validation_attempts WHERE id = %(id)s FOR UPDATE"
ATTEMPT_RENEW = """
UPDATE validation_attempts SET expire_time = registry_now() + make_interval(secs => %(ttl_s)s)
WHERE id = %(id)s AND NOT done
"""
ATTEMPT_REPORT = """
UPDATE validation_attempts
SET steps = %(steps)s, done = %(done)s, passed = %(passed)s, failure = %(failure)s, versions = %(versions)s,
    held = held AND NOT %(freed)s, update_time = registry_now()
WHERE id = %(id)s
"""
ATTEMPT_FREED = "UPDATE validation_attempts SET held = false, update_time = registry_now() WHERE id = %(id)s"
# Bytes of attempts that are over: gone with the epoch of their node, or never reported as freed, as by older versions.
ATTEMPTS_FREED = """
UPDATE validation_attempts a SET held = false FROM validation_attempts o LEFT JOIN nodes n ON n.id = o.node_id
WHERE a.id = o.id AND o.done AND o.held
  AND (n.id IS NULL OR n.epoch <> o.node_epoch
       OR (n.state = 'ALIVE' AND o.update_time <= registry_now() - make_interval(secs => %(silence_s)s)))
"""
# Attempts that no call waits for any more, or that are of an older epoch of their node, or on a silent node.
ATTEMPTS_OVER = """
SELECT a.id, a.node_id, a.device_id,
       a.expire_time <= registry_now() AS unwatched,
       n.id IS NULL OR n.epoch <> a.node_epoch AS restarted
FROM validation_attempts a LEFT JOIN nodes n ON n.id = a.node_id
WHERE NOT a.done
  AND (a.expire_time <= registry_now() OR n.id IS NULL OR n.epoch <> a.node_epoch OR n.state = 'LOST')
ORDER BY a.node_id, a.id
"""
ATTEMPTS_LIST = """
SELECT * FROM validation_attempts
WHERE model_id = %(model_id)s AND (NOT %(passed_only)s OR passed) AND (%(kind)s = '' OR kind = %(kind)s)
  AND (%(after_time)s::timestamptz IS NULL OR (create_time, id) < (%(after_time)s::timestamptz, %(after_id)s))
ORDER BY create_time DESC, id DESC LIMIT %(limit)s
"""
ATTEMPTS_COUNT = """
SELECT count(*) AS n FROM validation_attempts
WHERE model_id = %(model_id)s AND (NOT %(passed_only)s OR passed) AND (%(kind)s = '' OR kind = %(kind)s)
"""
ATTEMPT_NOTE = "UPDATE validation_attempts SET notes = %(notes)s WHERE id = %(id)s RETURNING *"
# It is done when it is written: it holds no memory and waits for nobody.
LOAD_ATTEMPT_INSERT = """
INSERT INTO validation_attempts
    (id, model_id, node_id, node_epoch, device_id, load_options, quantization, reserved_bytes, kind, residency_id,
     steps, done, held, passed, failure, versions, log_tail, expire_time, create_time)
SELECT %(id)s, m.id, r.node_id, r.node_epoch, r.device_id, m.load_options, m.quantization, 0, 'LOAD', r.id, %(steps)s,
       true, false, %(passed)s, %(failure)s, %(versions)s, %(log_tail)s, registry_now(),
       COALESCE(r.load_begin_time, registry_now())
FROM residencies r JOIN models m ON m.id = r.model_id WHERE r.id = %(residency_id)s
"""
LOAD_SECONDS = """
SELECT extract(epoch FROM registry_now() - COALESCE(load_begin_time, registry_now()))::float8 AS seconds
FROM residencies WHERE id = %(residency_id)s
"""
ATTEMPTS_PRUNE = """
DELETE FROM validation_attempts WHERE done AND id IN (
    SELECT id FROM validation_attempts WHERE model_id = %(model_id)s ORDER BY create_time DESC, id DESC OFFSET %(kept)s)
"""

# A waiting call renews its attempt at each poll; the attempt of a call that died ends after this.
_TTL_S = 15.0
_RETRY_AFTER_S = 5.0
_KEPT_ATTEMPTS = 100  # Of a model; a load that fails again and again leaves one each time.
# As long as an unload may be silent.
_FREE_SILENCE_S = 60.0
# No model has this id: an attempt is a load of its own, even where the model is resident.
_TRIAL = "(validation)"


class ValidationStore:
    """Reads and writes for ValidateModel, ListAttempts and ReportValidation."""

    def __init__(self, database: Database, wakeups: Wakeups, policy: Policy) -> None:
        self._database = database
        self._wakeups = wakeups
        self._policy = policy

    async def start(
        self, model_id: str, *, node_id: str, device_id: str, load_options: Mapping[str, Any] | None
    ) -> Attempt:
        """Chooses a device with enough free bytes, reserves them and has its node begin.

        Raises ModelNotReady, NodeNotFound, NodeLost, ModelTooLarge, and CapacityBusy where other models would have to
        leave: an attempt evicts none.
        """

        async def work(conn: Connection) -> Attempt:
            model = await ready_model(conn, model_id)
            if load_options is not None:
                model = replace(model, load_options=load_options)
            wish = Wish(model_id=model_id, node_id=node_id, device_id=device_id, actor="validation")
            nodes = await lock_living_nodes(conn, wish)
            spaces = await read_spaces(conn, model, wish, nodes, {})
            if not spaces:
                raise NodeNotFound("/".join(part for part in (node_id, device_id) if part))
            space = _choose(model, spaces, self._policy)
            return await _begin(conn, model, space, nodes[space.node.id].epoch)

        attempt = await self._database.run(work)
        self._wakeups.wake()
        return attempt

    async def follow(self, attempt_id: str) -> Attempt:
        """Reads the attempt and renews its life. Raises StateConflict if it was deleted with its model."""

        async def work(conn: Connection) -> Attempt:
            await conn.execute(ATTEMPT_RENEW, {"id": attempt_id, "ttl_s": _TTL_S})
            row = await (await conn.execute(ATTEMPT_READ, {"id": attempt_id})).fetchone()
            if row is None:
                raise StateConflict("the model was deleted while it was validated", resource=("attempt", attempt_id))
            return attempt_of(row)

        return await self._database.run(work)

    async def stop(self, attempt_id: str, failure: Failure) -> None:
        """Ends an attempt with a failure, unless it has ended."""
        if await self._database.run(lambda conn: _end(conn, attempt_id, failure)):
            self._wakeups.wake()

    async def report(self, report: ValidationReport) -> None:
        """Stores a node's report. Raises EpochStale, and StateConflict once the attempt is over.

        The last report also tells that the node has freed the memory, and is taken for an attempt that was cancelled.
        """

        async def work(conn: Connection) -> None:
            await hear(conn, report.node_id, report.epoch)
            row = await (await conn.execute(ATTEMPT_READ, {"id": report.attempt_id})).fetchone()
            if row is not None:
                await lock_nodes(conn, [row["node_id"]])
                row = await (await conn.execute(ATTEMPT_LOCK, {"id": report.attempt_id})).fetchone()
            of_node = row is not None and (row["node_id"], row["node_epoch"]) == (report.node_id, report.epoch)
            if row is not None and of_node and row["done"] and row["held"] and report.done:
                await conn.execute(ATTEMPT_FREED, {"id": row["id"]})
                return
            if row is None or row["done"] or not of_node:
                raise StateConflict(
                    f"attempt {report.attempt_id!r} is over, or not of this node and epoch; stop it",
                    resource=("attempt", report.attempt_id),
                )
            steps = closed(report.steps) if report.done else report.steps
            await _write(
                conn,
                row,
                steps,
                done=report.done,
                failure=report.failure,
                versions=report.versions,
                freed=report.done,
            )

        await self._database.run(work)
        self._wakeups.wake()

    async def tidy(self) -> None:
        """Ends attempts that no call waits for or that lost their node. Any replica may, at any time."""

        async def work(conn: Connection) -> bool:
            rows = await (await conn.execute(ATTEMPTS_OVER)).fetchall()
            for row in rows:
                if row["unwatched"]:
                    failure = Failure(reason="WAIT_TIMEOUT", message="nobody waited for it any more; validate again")
                else:
                    why = "started anew" if row["restarted"] else "fell silent"
                    message = f"node {row['node_id']} {why} while it was at work; validate again"
                    failure = Failure(reason="NODE_LOST", message=message)
                await _end(conn, row["id"], failure)
            freed = await conn.execute(ATTEMPTS_FREED, {"silence_s": _FREE_SILENCE_S})
            return bool(rows) or freed.rowcount > 0

        if await self._database.run(work):
            self._wakeups.wake()

    async def get(self, attempt_id: str) -> Attempt:
        """Raises AttemptNotFound."""

        async def work(conn: Connection) -> Attempt:
            row = await (await conn.execute(ATTEMPT_READ, {"id": attempt_id})).fetchone()
            if row is None:
                raise AttemptNotFound(attempt_id)
            return attempt_of(row)

        return await self._database.single(work)

    async def note(self, attempt_id: str, notes: str) -> Attempt:
        """Replaces the notes of an attempt. Raises AttemptNotFound."""

        async def work(conn: Connection) -> Attempt:
            row = await (await conn.execute(ATTEMPT_NOTE, {"id": attempt_id, "notes": notes})).fetchone()
            if row is None:
                raise AttemptNotFound(attempt_id)
            return attempt_of(row)

        return await self._database.run(work)

    async def page(
        self, model_id: str, *, passed_only: bool, kind: AttemptKind | None, page: Page
    ) -> tuple[list[Attempt], str]:
        """Returns one page, the newest first, and the token of the next. Raises ModelNotFound."""

        async def work(conn: Connection) -> list[Attempt]:
            await read_model(conn, model_id)
            parameters = {
                "model_id": model_id,
                "passed_only": passed_only,
                "kind": kind or "",
                "after_time": page.time_after(),
                "after_id": (page.after or ("", ""))[1],
                "limit": page.size + 1,
            }
            return [attempt_of(row) for row in await (await conn.execute(ATTEMPTS_LIST, parameters)).fetchall()]

        return page.cut(
            await self._database.run(work),
            lambda each: (each.create_time.isoformat(), each.id),
            lambda each: len(str(each.steps)) + len(str(each.load_options)) + len(str(each.failure)),
        )

    async def count(self, model_id: str, *, passed_only: bool, kind: AttemptKind | None) -> int:
        """Counts the attempts on all pages."""
        parameters = {"model_id": model_id, "passed_only": passed_only, "kind": kind or ""}
        return await self._database.count(ATTEMPTS_COUNT, parameters)


def attempt_of(row: Row) -> Attempt:
    """Reads a row of `validation_attempts`."""
    return Attempt(
        id=row["id"],
        model_id=row["model_id"],
        node_id=row["node_id"],
        device_id=row["device_id"],
        load_options=row["load_options"],
        quantization=Quantization(row["quantization"]),
        steps=tuple(Step(**{**step, "state": StepState(step["state"])}) for step in row["steps"]),
        done=row["done"],
        passed=row["passed"],
        failure=failure_of(row["failure"]),
        versions=row["versions"],
        create_time=row["create_time"],
        update_time=row["update_time"],
        kind=AttemptKind(row["kind"]),
        log_tail=row["log_tail"],
        notes=row["notes"],
        residency_id=row["residency_id"],
    )


async def note_load(conn: Connection, report: ResidencyReport, model_id: str) -> None:
    """Stores the attempt that a load was, which has just ended as reported."""
    row = await (await conn.execute(LOAD_SECONDS, {"residency_id": report.residency_id})).fetchone()
    loaded = report.state is ResidencyState.RESIDENT
    step = Step(
        name="load",
        state=StepState.PASSED if loaded else StepState.FAILED,
        message=report.failure.message if report.failure else "",
        seconds=row["seconds"] if row is not None else 0.0,
        figures={"measured_bytes": float(report.measured_bytes)} if loaded else {},
    )
    values = {
        "id": uuid.uuid4().hex,
        "residency_id": report.residency_id,
        "steps": Jsonb([asdict(step)]),
        "passed": loaded,
        "failure": json_of(report.failure),
        "versions": json_of(report.versions),
        "log_tail": report.log_tail,
    }
    await conn.execute(LOAD_ATTEMPT_INSERT, values)
    await conn.execute(ATTEMPTS_PRUNE, {"model_id": model_id, "kept": _KEPT_ATTEMPTS})


def _choose(model: Model, spaces: Sequence[Space], policy: Policy) -> Space:
    """Returns the best device with enough free bytes now; raises the refusal of the best one otherwise.

    Backoffs are ignored, since a failed load is a reason to validate there; so are the node's limits of models.
    """
    trials = [replace(s, backoff=None, node=replace(s.node, max_loads=0, max_residents=0)) for s in spaces]
    best = decide_placement(_TRIAL, trials, policy)
    if best.action is Action.LOAD:
        return best.space
    if best.action.refuses:
        raise refusal(model.id, best, spaces)
    required = best.space.required_bytes
    place = f"{best.space.node.id}/{best.space.device.id}"
    raise CapacityBusy(
        f"validating {model.id!r} needs {required} bytes free, which {place} has only once others leave, and a trial "
        "evicts nobody; unload something there, or name another device",
        metadata={"required_bytes": str(required), "place": place},
        retry_after_s=_RETRY_AFTER_S,
    )


async def _begin(conn: Connection, model: Model, space: Space, epoch: int) -> Attempt:
    values = {
        "id": uuid.uuid4().hex,
        "model_id": model.id,
        "node_epoch": epoch,
        "load_options": json_of(model.load_options),
        "quantization": model.quantization,
        "reserved_bytes": space.required_bytes,
        "ttl_s": _TTL_S,
        "node_id": space.node.id,
        "device_id": space.device.id,
    }
    await conn.execute(ATTEMPT_INSERT, values)
    row = await (await conn.execute(ATTEMPT_READ, {"id": values["id"]})).fetchone()
    assert row is not None
    return attempt_of(row)


async def _end(conn: Connection, attempt_id: str, failure: Failure) -> bool:
    """Ends an attempt with a failure. Returns False if it had ended before."""
    row = await (await conn.execute(ATTEMPT_READ, {"id": attempt_id})).fetchone()
    if row is None or row["done"]:
        return False
    await lock_nodes(conn, [row["node_id"]])
    row = await (await conn.execute(ATTEMPT_LOCK, {"id": attempt_id})).fetchone()
    if row is None or row["done"]:
        return False
    steps = closed(attempt_of(row).steps)
    await _write(conn, row, steps, done=True, failure=failure, versions=row["versions"], freed=False)
    return True


async def _write(
    conn: Connection,
    row: Row,
    steps: tuple[Step, ...],
    *,
    done: bool,
    failure: Failure | None,
    versions: Mapping[str, str],
    freed: bool,
) -> None:
    """Stores the steps and the result. The caller has locked the node and the attempt, which has not ended."""
    values = {
        "id": row["id"],
        "steps": Jsonb([asdict(step) for step in steps]),
        "done": done,
        "passed": done and passed(steps, failure),
        "failure": json_of(failure),
        "versions": json_of(versions),
        "freed": freed,
    }
    await conn.execute(ATTEMPT_REPORT, values)
