"""Preparations in Postgres: which worker prepares which model's files, and the reports of nodes on builds.

Every write of a worker is guarded by its claim: once the claim ran out, the worker changes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, TypeVar

from headrace_models.folder import FileStamp
from headrace_registry.errors import StateConflict
from headrace_registry.models.builds import BuildKind, BuildState, ClaimLost, FilesDoomed
from headrace_registry.models.files import Inspection
from headrace_registry.models.models import Failure, Fidelity, Model, ModelState, SourceKind, Transfer
from headrace_registry.postgres import statements
from headrace_registry.postgres.models.models import change_model, lock_model, read_model
from headrace_registry.postgres.models.records import write_record
from headrace_registry.postgres.requests import Request, recall, remember
from headrace_registry.postgres.residency.nodes import hear
from headrace_registry.postgres.rows import failure_of, fidelity_of, json_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.wakeups import Wakeups

PREPARATION_INSERT = """
INSERT INTO preparations (model_id, claimed_by, claim_expire_time, token_offered)
VALUES (%(model_id)s, %(worker)s, registry_now() + make_interval(secs => %(claim_s)s), %(token_offered)s)
ON CONFLICT (model_id) DO NOTHING
"""
PREPARATION_DELETE = "DELETE FROM preparations WHERE model_id = %(model_id)s RETURNING model_id"
PREPARATION_HOLD = """
SELECT * FROM preparations WHERE model_id = %(model_id)s AND claimed_by = %(worker)s FOR UPDATE
"""
# SKIP LOCKED: workers that claim at the same time get different preparations.
PREPARATIONS_CLAIM = """
UPDATE preparations p
SET claimed_by = %(worker)s, claim_expire_time = registry_now() + make_interval(secs => %(claim_s)s)
FROM (
    SELECT model_id FROM preparations
    WHERE (claimed_by IS NULL OR claimed_by = %(worker)s OR claim_expire_time < registry_now())
      AND NOT model_id = ANY(%(running)s)
    ORDER BY create_time LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
) free
WHERE p.model_id = free.model_id
RETURNING p.model_id
"""
PREPARATIONS_RENEW = """
UPDATE preparations
SET claim_expire_time = registry_now() + make_interval(secs => %(claim_s)s)
WHERE claimed_by = %(worker)s AND model_id = ANY(%(running)s)
RETURNING model_id
"""
PREPARATIONS_RELEASE = """
UPDATE preparations SET claimed_by = NULL, claim_expire_time = NULL
WHERE %(worker)s::text IS NULL OR claimed_by = %(worker)s
"""
BUILD_ASSIGN = """
UPDATE preparations
SET node_id = %(node_id)s, target_path = %(target_path)s, source_path = %(source_path)s, done = false, failure = NULL,
    fidelity = NULL, report_time = registry_now()
WHERE model_id = %(model_id)s
"""
# For files that are about to be removed: the next worker on this preparation has them made anew.
BUILD_UNDO = "UPDATE preparations SET node_id = NULL, target_path = '', done = false WHERE model_id = %(model_id)s"
BUILD_CHOOSE_NODE = """
SELECT n.id FROM nodes n
LEFT JOIN preparations p ON p.node_id = n.id AND NOT p.done
WHERE n.state = 'ALIVE'
GROUP BY n.id ORDER BY count(p.model_id), n.id LIMIT 1
"""
BUILD_READ = """
SELECT p.*, n.state AS node_state, extract(epoch FROM registry_now() - p.report_time)::float8 AS silent_s
FROM preparations p LEFT JOIN nodes n ON n.id = p.node_id
WHERE p.model_id = %(model_id)s AND p.claimed_by = %(worker)s
"""
# A done build stays done: a report of progress may arrive after the last one.
BUILD_REPORT = """
UPDATE preparations
SET done = done OR %(done)s, failure = COALESCE(%(failure)s, failure), fidelity = COALESCE(%(fidelity)s, fidelity),
    report_time = registry_now()
WHERE model_id = %(model_id)s AND node_id = %(node_id)s AND %(target_path)s IN ('', target_path)
RETURNING model_id
"""
BUILD_TAKE = """
UPDATE preparations SET node_id = NULL
WHERE model_id = %(model_id)s AND node_id = %(node_id)s AND %(target_path)s IN ('', target_path) AND NOT done
"""
# Keeps the folder from being doomed until the transaction ends.
FOLDER_KEEP = "SELECT doom_time IS NOT NULL AS doomed FROM store_folders WHERE path = %(path)s FOR SHARE"
MODEL_PREPARED = "UPDATE models SET last_used_time = registry_now() WHERE id = %(id)s"
# Unquantized files of the same commit, from which a model of another quantization is loaded or was made.
BASE_FIND = """
SELECT f.path FROM models m
JOIN store_folders f ON f.path = CASE WHEN m.quantization = 'NONE' THEN m.files_path ELSE m.base_path END
WHERE m.id <> %(model_id)s AND m.state = 'READY' AND f.doom_time IS NULL
  AND m.source_kind = %(source_kind)s AND m.commit_sha = %(commit_sha)s
  AND (m.source_kind = 'gguf' OR m.location = %(location)s)
  AND (m.quantization <> 'NONE' OR %(quantization)s <> 'NONE')
ORDER BY m.create_time, m.id LIMIT 1 FOR SHARE OF f
"""
# The failures were those of other files.
FAILURES_FORGET = "DELETE FROM load_failures WHERE model_id = %(model_id)s"
OFFER_READ = "SELECT token_offered FROM preparations WHERE model_id = %(model_id)s"
BASE_TAKE = "UPDATE preparations SET source_path = %(path)s WHERE model_id = %(model_id)s"

T = TypeVar("T")

# A dead worker is replaced after this. A worker renews its claims at a third of it.
CLAIM_S = 6.0


class PreparationStore:
    """Reads and writes for PrepareModel, its workers and ReportBuild."""

    def __init__(self, database: Database, wakeups: Wakeups) -> None:
        self._database = database
        self._wakeups = wakeups

    async def start(self, model_id: str, *, worker: str, request: Request, token_offered: bool = False) -> Model:
        """Starts a preparation, claimed for `worker`. A model that is READY or in preparation is returned as it is."""

        async def work(conn: Connection) -> Model:
            model = await lock_model(conn, model_id)
            if await recall(conn, request) is not None:
                return model
            if model.state is not ModelState.READY and not model.state.preparing:
                values = {"model_id": model_id, "worker": worker, "claim_s": CLAIM_S, "token_offered": token_offered}
                await conn.execute(PREPARATION_INSERT, values)
                converting = model.source.kind is SourceKind.GGUF
                state = ModelState.CONVERTING if converting else ModelState.DOWNLOADING
                columns = {"state": state, "failure": None, "transfer": json_of(Transfer())}
                model = await change_model(conn, model_id, "preparation started", columns)
            await remember(conn, request, model_id)
            return model

        return await self._change(work)

    async def cancel(self, model_id: str, *, request: Request) -> Model:
        """Ends a preparation; its worker loses its claim. Raises StateConflict if the model is not in preparation."""

        async def work(conn: Connection) -> Model:
            model = await lock_model(conn, model_id)
            if await recall(conn, request) is not None:
                return model
            if not model.state.preparing:
                raise StateConflict(
                    f"model {model_id!r} is {model.state}, not in preparation; there is nothing to cancel",
                    metadata={"state": model.state},
                    resource=("model", model_id),
                )
            await conn.execute(PREPARATION_DELETE, {"model_id": model_id})
            columns = {"state": ModelState.REGISTERED, "transfer": None}
            model = await change_model(conn, model_id, "preparation cancelled", columns)
            await remember(conn, request, model_id)
            return model

        return await self._change(work)

    async def token_was_offered(self, model_id: str) -> bool:
        """True if the call that started the preparation brought a hub token, to whichever registry it was."""

        async def work(conn: Connection) -> bool:
            row = await (await conn.execute(OFFER_READ, {"model_id": model_id})).fetchone()
            return row is not None and bool(row["token_offered"])

        return await self._database.single(work)

    async def claim(self, worker: str, *, running: Collection[str], limit: int) -> list[Model]:
        """Claims up to `limit` preparations that no living worker has claimed; returns their models."""

        async def work(conn: Connection) -> list[Model]:
            parameters = {"worker": worker, "claim_s": CLAIM_S, "running": list(running), "limit": limit}
            rows = await (await conn.execute(PREPARATIONS_CLAIM, parameters)).fetchall()
            return [await read_model(conn, row["model_id"]) for row in rows]

        return await self._database.run(work)

    async def renew(self, worker: str, *, running: Collection[str]) -> set[str]:
        """Renews the worker's claims; returns the ids of the models that it still has."""

        async def work(conn: Connection) -> set[str]:
            parameters = {"worker": worker, "claim_s": CLAIM_S, "running": list(running)}
            rows = await (await conn.execute(PREPARATIONS_RENEW, parameters)).fetchall()
            return {row["model_id"] for row in rows}

        return await self._database.run(work)

    async def release(self, worker: str | None) -> None:
        """Gives up a worker's claims, so that other workers take over at once.

        None gives up every worker's, which is right only while no other replica can run.
        """

        async def work(conn: Connection) -> None:
            await conn.execute(PREPARATIONS_RELEASE, {"worker": worker})

        await self._database.run(work, deadline_s=3.0)

    async def progress(
        self, model_id: str, worker: str, *, message: str, transfer: Transfer, commit_sha: str = ""
    ) -> None:
        """Stores the progress of a preparation, and the commit once it is known. Raises ClaimLost."""
        columns: dict[str, Any] = {"transfer": json_of(transfer)}
        if commit_sha:
            columns["commit_sha"] = commit_sha

        async def work(conn: Connection) -> None:
            await hold_claim(conn, model_id, worker)
            await change_model(conn, model_id, message, columns)

        await self._change(work)

    async def finish(
        self,
        model_id: str,
        worker: str,
        *,
        commit_sha: str,
        files_path: str,
        inspection: Inspection,
        store_bytes: int = 0,
        base_path: str = "",
        source_files: Iterable[FileStamp] = (),
        fidelity: Fidelity | None = None,
        note: str = "",
    ) -> None:
        """Makes the model READY, and records its files. Raises ClaimLost and FilesDoomed."""
        weights = inspection.weights
        columns = {
            "state": ModelState.READY,
            "commit_sha": commit_sha,
            "files_path": files_path,
            "failure": None,
            "transfer": None,
            "architecture": json_of(inspection.architecture),
            "n_parameters": weights.n_parameters,
            "weight_bytes": weights.weight_bytes,
            "parameters_by_dtype": json_of(weights.parameters_by_dtype),
            "tokenizer_digest": inspection.tokenizer_digest,
            "store_bytes": store_bytes,
            "base_path": base_path,
            "fidelity": json_of(fidelity),
            "card": json_of(inspection.card),
        }

        async def record(conn: Connection) -> None:
            await write_record(conn, model_id, path=files_path, files=inspection.files, source_files=source_files)
            await conn.execute(FAILURES_FORGET, {"model_id": model_id})

        await self._end(model_id, worker, f"ready; {note}" if note else "ready", columns, record)

    async def fail(self, model_id: str, worker: str, failure: Failure) -> None:
        """Makes the model FAILED. Raises ClaimLost."""
        columns = {"state": ModelState.FAILED, "failure": json_of(failure), "transfer": None}
        await self._end(model_id, worker, f"failed: {failure.message}", columns)

    async def build_state(self, model_id: str, worker: str) -> BuildState:
        """Reads how the preparation's build stands. Raises ClaimLost."""

        async def work(conn: Connection) -> BuildState:
            parameters = {"model_id": model_id, "worker": worker}
            row = await (await conn.execute(BUILD_READ, parameters)).fetchone()
            if row is None:
                raise ClaimLost
            return BuildState(
                node_id=row["node_id"] or "",
                target_path=row["target_path"],
                done=row["done"],
                failure=failure_of(row["failure"]),
                node_alive=row["node_state"] == "ALIVE",
                silent_s=row["silent_s"] or 0.0,
                fidelity=fidelity_of(row["fidelity"]),
            )

        return await self._database.run(work)

    async def take_base(self, model: Model, worker: str, *, commit_sha: str) -> str:
        """Returns a folder where another model has the same unquantized files, or an empty string.

        The folder is kept until this preparation ends. Raises ClaimLost.
        """

        async def work(conn: Connection) -> str:
            await conn.execute(statements.STORE_LOCK)
            await hold_claim(conn, model.id, worker)
            parameters = {
                "model_id": model.id,
                "quantization": model.quantization,
                "source_kind": model.source.kind,
                "location": model.source.location,
                "commit_sha": commit_sha,
            }
            row = await (await conn.execute(BASE_FIND, parameters)).fetchone()
            if row is None:
                return ""
            await conn.execute(BASE_TAKE, {"model_id": model.id, "path": row["path"]})
            path: str = row["path"]
            return path

        return await self._database.run(work)

    async def assign_build(
        self, model_id: str, worker: str, *, kind: BuildKind, target_path: str, source_path: str = ""
    ) -> str:
        """Gives the build to the living node with the fewest builds; returns its id, empty if no node lives."""

        async def work(conn: Connection) -> str:
            held = await hold_claim(conn, model_id, worker)
            row = await (await conn.execute(BUILD_CHOOSE_NODE)).fetchone()
            node_id = row["id"] if row is not None else None
            if node_id is None and held["node_id"] is None and held["target_path"] == target_path:
                return ""  # It waits already; a message that it still does would be an event each second.
            parameters = {
                "model_id": model_id,
                "node_id": node_id,
                "target_path": target_path,
                "source_path": source_path,
            }
            await conn.execute(BUILD_ASSIGN, parameters)
            message = _at_work(node_id, kind.state) if node_id else "waits for a node; start an extractor"
            await change_model(conn, model_id, message, {"state": kind.state, "transfer": json_of(Transfer())})
            return node_id or ""

        assigned = await self._database.run(work)
        if assigned:
            self._wakeups.wake()
        return assigned

    async def report_build(
        self,
        *,
        node_id: str,
        epoch: int,
        model_id: str,
        target_path: str,
        done: bool,
        transfer: Transfer | None,
        failure: Failure | None,
        fidelity: Fidelity | None = None,
    ) -> None:
        """Stores a node's report on its build. A report on a build that was taken from the node is ignored.

        A build that was ended from outside has not failed: its worker assigns it again.
        """
        interrupted = failure is not None and failure.interrupted

        async def work(conn: Connection) -> None:
            await hear(conn, node_id, epoch)
            if interrupted:
                await conn.execute(BUILD_TAKE, {"model_id": model_id, "node_id": node_id, "target_path": target_path})
                return
            model = await (await conn.execute(statements.MODEL_LOCK, {"id": model_id})).fetchone()
            parameters = {
                "model_id": model_id,
                "node_id": node_id,
                "target_path": target_path,
                "done": done,
                "failure": json_of(failure),
                "fidelity": json_of(fidelity),
            }
            row = await (await conn.execute(BUILD_REPORT, parameters)).fetchone()
            if row is not None and model is not None and not done and failure is None:
                columns = {"transfer": json_of(transfer or Transfer())}
                await change_model(conn, model_id, _at_work(node_id, model["state"]), columns)

        await self._change(work)

    async def _end(
        self,
        model_id: str,
        worker: str,
        message: str,
        columns: dict[str, Any],
        also: Callable[[Connection], Awaitable[None]] | None = None,
    ) -> None:
        async def work(conn: Connection) -> bool:
            await hold_claim(conn, model_id, worker)
            if columns["state"] is ModelState.READY:
                folder = await conn.execute(FOLDER_KEEP, {"path": columns["files_path"]})
                row = await folder.fetchone()
                if row is not None and row["doomed"]:
                    await conn.execute(BUILD_UNDO, {"model_id": model_id})
                    return False
                await conn.execute(MODEL_PREPARED, {"id": model_id})
            if also is not None:
                await also(conn)
            await conn.execute(PREPARATION_DELETE, {"model_id": model_id})
            await change_model(conn, model_id, message, columns)
            return True

        if not await self._change(work):
            raise FilesDoomed

    async def _change(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        result = await self._database.run(work)
        self._wakeups.wake()
        return result


def _at_work(node_id: str, state: str) -> str:
    return f"node {node_id} {'quantizes' if state == ModelState.QUANTIZING else 'converts'}"


async def hold_claim(conn: Connection, model_id: str, worker: str) -> dict[str, Any]:
    """Locks the model and then the claim until the transaction ends; returns the claim's row. Raises ClaimLost."""
    row = await (await conn.execute(statements.MODEL_LOCK, {"id": model_id})).fetchone()
    parameters = {"model_id": model_id, "worker": worker}
    held = await (await conn.execute(PREPARATION_HOLD, parameters)).fetchone()
    if row is None or held is None:
        raise ClaimLost
    return held
