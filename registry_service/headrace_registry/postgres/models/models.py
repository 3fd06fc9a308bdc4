"""Models in Postgres: registration, change, listing, events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from psycopg import sql

from headrace_registry.errors import AlreadyExists, EtagMismatch, FieldInvalid, ModelInUse, ModelNotFound
from headrace_registry.models.filters import Match, Term
from headrace_registry.models.identifiers import derived_ids
from headrace_registry.models.models import Failure, Model, ModelEvent, NewModel, SourceKind
from headrace_registry.paging import Page
from headrace_registry.postgres import statements
from headrace_registry.postgres.requests import Request, recall, remember
from headrace_registry.postgres.residency.pins import pin_owners
from headrace_registry.postgres.residency.unloading import order_unload, use_of
from headrace_registry.postgres.rows import json_of, model_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.wakeups import Wakeups

MODEL_READ = "SELECT * FROM models WHERE id = %(id)s"
MODEL_READ_WITH_FILES = """
SELECT m.*, f.files FROM models m LEFT JOIN model_files f ON f.model_id = m.id AND f.path = m.files_path
WHERE m.id = %(id)s
"""
# Longer than a deletion waits for memory.
MODEL_DELETING = "UPDATE models SET deleting_until = registry_now() + interval '30 s' WHERE id = %(id)s"
# Two registrations of one identity at the same time make one model.
IDENTITY_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(%(identity)s, 1))"
MODEL_OF_IDENTITY = "SELECT * FROM models WHERE identity = %(identity)s ORDER BY create_time, id LIMIT 1"
MODEL_INSERT = """
INSERT INTO models (id, identity, source_kind, location, source_revision, quantization, load_options, labels)
VALUES (%(id)s, %(identity)s, %(source_kind)s, %(location)s, %(source_revision)s, %(quantization)s,
        %(load_options)s, %(labels)s)
ON CONFLICT (id) DO NOTHING
RETURNING id
"""
MODEL_DELETE = "DELETE FROM models WHERE id = %(id)s"
# One statement, so that a change and its event have the same number and are never seen apart.
MODEL_TOUCH = """
WITH touched AS (
    UPDATE models
    SET event_seq = event_seq + 1, revision = revision + 1, update_time = registry_now()
    WHERE id = %(id)s
    RETURNING *
), recorded AS (
    INSERT INTO model_events (model_id, seq, time, message, model)
    SELECT id, event_seq, update_time, %(message)s, to_jsonb(touched) FROM touched
), trimmed AS (
    DELETE FROM model_events e USING touched t WHERE e.model_id = t.id AND e.seq <= t.event_seq - %(keep)s
)
SELECT * FROM touched
"""
MODEL_SNAPSHOT = "SELECT *, registry_now() AS now FROM models WHERE id = %(id)s"
MODEL_EVENTS = """
SELECT seq, time, message, model FROM model_events
WHERE model_id = %(id)s AND seq > %(after_seq)s
ORDER BY seq LIMIT %(limit)s
"""
RESIDENCIES_ACTIVE_OF_MODEL = """
SELECT id, node_id, device_id, state FROM residencies
WHERE model_id = %(model_id)s AND (%(node_id)s = '' OR node_id = %(node_id)s)
  AND state NOT IN ('UNLOADED', 'FAILED', 'LOST')
ORDER BY node_id, device_id, id
"""
ATTEMPTS_END_OF_MODEL = """
UPDATE validation_attempts SET done = true, failure = %(failure)s, update_time = registry_now()
WHERE model_id = %(id)s AND NOT done
"""
# On nodes that may still hold the memory of an attempt.
ATTEMPTS_HELD_OF_MODEL = """
SELECT a.node_id, a.device_id FROM validation_attempts a
JOIN nodes n ON n.id = a.node_id AND n.epoch = a.node_epoch AND n.state = 'ALIVE'
WHERE a.model_id = %(id)s AND a.held ORDER BY a.node_id, a.device_id
"""
# Comes before the statement that dooms them: only a second statement sees decisions made while this one waited.
FOLDERS_LOCK_OF_MODEL = """
SELECT path FROM store_folders f
WHERE f.model_id = %(id)s OR f.path = (SELECT files_path FROM models WHERE id = %(id)s)
ORDER BY path FOR UPDATE
"""
FOLDERS_DOOM_OF_MODEL = """
UPDATE store_folders f SET doom_time = registry_now(), reserved_bytes = 0
WHERE (f.model_id = %(id)s OR f.path = (SELECT files_path FROM models WHERE id = %(id)s)) AND f.doom_time IS NULL
  AND NOT EXISTS (SELECT 1 FROM models o WHERE o.id <> %(id)s
                  AND (o.files_path = f.path OR (o.source_kind = 'folder' AND o.location = f.path)))
  AND NOT EXISTS (SELECT 1 FROM preparations p WHERE p.model_id <> %(id)s
                  AND (p.model_id = f.model_id OR f.path IN (p.target_path, p.source_path)))
"""

# Events kept per model: hours of progress at one a second. A watcher that comes later gets a snapshot.
_KEEP_EVENTS = 10_000
_EVENTS_PER_READ = 200

_COLUMNS = {
    "id": sql.SQL("id"),
    "state": sql.SQL("state"),
    "quantization": sql.SQL("quantization"),
    "model_type": sql.SQL("COALESCE(architecture->>'model_type', '')"),
    "repo_id": sql.SQL("CASE WHEN source_kind = 'hub' THEN location ELSE '' END"),
}


class ModelStore:
    """Reads and writes for ModelService."""

    def __init__(self, database: Database, wakeups: Wakeups) -> None:
        self._database = database
        self._wakeups = wakeups

    async def register(self, new: NewModel, request: Request) -> Model:
        """Stores a new model, or returns the registered one with the same identity. Raises AlreadyExists."""

        async def work(conn: Connection) -> Model:
            answered = await recall(conn, request)
            if answered is not None:
                return await read_model(conn, answered)
            await conn.execute(IDENTITY_LOCK, {"identity": new.identity()})
            model = await _existing(conn, new) or await _insert(conn, new)
            await remember(conn, request, model.id)
            return model

        model = await self._database.run(work)
        self._wakeups.wake()
        return model

    async def answered(self, request: Request) -> Model | None:
        """Returns the model of an earlier call with this request_id, as it is now. Raises FieldInvalid as `recall`."""

        async def work(conn: Connection) -> Model | None:
            model_id = await recall(conn, request)
            return await read_model(conn, model_id) if model_id is not None else None

        return await self._database.run(work)

    async def registered(self, new: NewModel) -> Model | None:
        """Returns the registered model with the same identity, if there is one. Raises AlreadyExists."""
        return await self._database.run(lambda conn: _existing(conn, new))

    async def get(self, model_id: str) -> Model:
        """Reads a model with the stamps of its files. Raises ModelNotFound."""

        async def work(conn: Connection) -> Model:
            row = await (await conn.execute(MODEL_READ_WITH_FILES, {"id": model_id})).fetchone()
            if row is None:
                raise ModelNotFound(model_id)
            return model_of(row)

        return await self._database.single(work)

    async def page(self, terms: Sequence[Term], page: Page) -> tuple[list[Model], str]:
        """Returns one page ordered by id, and the token of the next."""

        async def work(conn: Connection) -> list[Model]:
            query, parameters = _listing(terms, page)
            cursor = await conn.execute(query, parameters)
            return [model_of(row) for row in await cursor.fetchall()]

        return page.cut(
            await self._database.single(work),
            lambda model: (model.id,),
            lambda model: len(str((model.labels, model.load_options))),
        )

    async def count(self, terms: Sequence[Term]) -> int:
        """Counts the models on all pages."""
        where, parameters = _where(terms)
        return await self._database.count(
            sql.SQL("SELECT count(*) AS n FROM models WHERE {}").format(where), parameters
        )

    async def update(
        self,
        model_id: str,
        *,
        labels: Mapping[str, str] | None,
        load_options: Mapping[str, Any] | None,
        etag: str,
        request: Request,
    ) -> Model:
        """Replaces labels and load options that are not None.

        Raises EtagMismatch, and ModelInUse if load options would change under a residency.
        """

        async def work(conn: Connection) -> Model:
            model = await lock_model(conn, model_id)
            if await recall(conn, request) is not None:
                return model
            _check_etag(model, etag)
            columns: dict[str, Any] = {}
            if labels is not None:
                columns["labels"] = json_of(labels)
            if load_options is not None and dict(load_options) != dict(model.load_options):
                await check_unused(conn, model_id, "change the load options of")
                changed = NewModel(
                    id=model.id, source=model.source, quantization=model.quantization, load_options=load_options
                )
                columns |= {"load_options": json_of(load_options), "identity": changed.identity()}
            if columns:
                model = await change_model(conn, model_id, "updated", columns)
            await remember(conn, request, model_id)
            return model

        model = await self._database.run(work)
        self._wakeups.wake()
        return model

    async def delete(self, model_id: str, *, force: bool, etag: str, actor: str, request: Request) -> tuple[str, ...]:
        """Deletes a model with its history and its files in the store. Raises EtagMismatch, ModelInUse unless forced.

        With `force` the model is unloaded first: returns the devices that still hold its memory, and nothing is deleted
        as long as there are any. Call it again until there is none.
        """

        async def work(conn: Connection) -> tuple[str, ...]:
            if await recall(conn, request) is not None:
                return ()
            model = await lock_model(conn, model_id)
            _check_etag(model, etag)
            if force:
                await conn.execute(MODEL_DELETING, {"id": model_id})  # Until it is gone, no call may load it again.
                await order_unload(conn, model_id, node_id="", force=True, actor=actor, why="delete asked for")
                stopped = Failure(reason="STATE_CONFLICT", message="the model is being deleted")
                await conn.execute(ATTEMPTS_END_OF_MODEL, {"id": model_id, "failure": json_of(stopped)})
            devices = await _active_devices(conn, model_id)
            trials = await (await conn.execute(ATTEMPTS_HELD_OF_MODEL, {"id": model_id})).fetchall()
            holding = (*devices, *(f"{row['node_id']}/{row['device_id']} (validation)" for row in trials))
            if force and holding:
                return holding
            if holding:
                end = "end its validation, or wait until the node has freed the memory"
                remedy = "; ".join([*(["UnloadModel first"] if devices else []), *([end] if trials else [])])
                await _refuse_use(conn, model_id, "delete", ", ".join(holding), remedy)
            if not force and await pin_owners(conn, model_id, ""):
                await _refuse_use(conn, model_id, "delete", "", "UnpinModel first")
            await conn.execute(FOLDERS_LOCK_OF_MODEL, {"id": model_id})
            await conn.execute(FOLDERS_DOOM_OF_MODEL, {"id": model_id})
            await conn.execute(MODEL_DELETE, {"id": model_id})
            await remember(conn, request, model_id)
            return ()

        devices = await self._database.run(work)
        self._wakeups.wake()
        return devices

    async def snapshot(self, model_id: str) -> ModelEvent:
        """Returns the model as it is now, as an event."""
        return await self._database.run(lambda conn: _snapshot(conn, model_id))

    async def events_after(self, model_id: str, after_seq: int) -> tuple[list[ModelEvent], bool]:
        """Returns the next events in order, perhaps none. Raises ModelNotFound once the model is deleted.

        For a model that was deleted and registered again the numbers begin anew: then returns a snapshot, and True.
        """

        async def work(conn: Connection) -> tuple[list[ModelEvent], bool]:
            parameters = {"id": model_id, "after_seq": after_seq, "limit": _EVENTS_PER_READ}
            rows = await (await conn.execute(MODEL_EVENTS, parameters)).fetchall()
            events = [
                ModelEvent(seq=row["seq"], time=row["time"], message=row["message"], model=model_of(row["model"]))
                for row in rows
            ]
            if not events:
                snapshot = await _snapshot(conn, model_id)
                if snapshot.seq < after_seq:
                    return [snapshot], True
            return events, False

        return await self._database.run(work)


async def read_model(conn: Connection, model_id: str) -> Model:
    """Raises ModelNotFound."""
    row = await (await conn.execute(MODEL_READ, {"id": model_id})).fetchone()
    if row is None:
        raise ModelNotFound(model_id)
    return model_of(row)


async def _snapshot(conn: Connection, model_id: str) -> ModelEvent:
    row = await (await conn.execute(MODEL_SNAPSHOT, {"id": model_id})).fetchone()
    if row is None:
        raise ModelNotFound(model_id)
    now: datetime = row["now"]
    return ModelEvent(seq=row["event_seq"], time=now, model=model_of(row))


async def lock_model(conn: Connection, model_id: str) -> Model:
    """Reads a model and locks it until the transaction ends. Raises ModelNotFound."""
    row = await (await conn.execute(statements.MODEL_LOCK, {"id": model_id})).fetchone()
    if row is None:
        raise ModelNotFound(model_id)
    return model_of(row)


async def change_model(conn: Connection, model_id: str, message: str, columns: Mapping[str, Any]) -> Model:
    """Sets columns and appends the event with this message, both or neither."""
    if columns:
        sets = sql.SQL(", ").join(sql.SQL("{} = {}").format(sql.Identifier(n), sql.Placeholder(n)) for n in columns)
        await conn.execute(sql.SQL("UPDATE models SET {} WHERE id = %(id)s").format(sets), {**columns, "id": model_id})
    parameters = {"id": model_id, "message": message, "keep": _KEEP_EVENTS}
    row = await (await conn.execute(MODEL_TOUCH, parameters)).fetchone()
    if row is None:
        raise ModelNotFound(model_id)
    return model_of(row)


async def check_unused(conn: Connection, model_id: str, verb: str) -> None:
    """Raises ModelInUse while the model is on a device or on its way there."""
    if devices := await _active_devices(conn, model_id):
        await _refuse_use(conn, model_id, verb, ", ".join(devices), "UnloadModel first")


async def _refuse_use(conn: Connection, model_id: str, verb: str, places: str, remedy: str) -> None:
    use = await use_of(conn, model_id, "")
    why = ", ".join(part for part in (f"on {places}" if places else "", use.words) if part)
    raise ModelInUse(
        f"can't {verb} {model_id!r}: it is {why}; {remedy}",
        metadata={**use.metadata, "places": places},
        resource=("model", model_id),
    )


async def _active_devices(conn: Connection, model_id: str) -> tuple[str, ...]:
    """Returns the devices of the model's active residencies as `node/device`.

    The caller has locked the model, so that none is added; they may end meanwhile.
    """
    parameters = {"model_id": model_id, "node_id": ""}
    rows = await (await conn.execute(RESIDENCIES_ACTIVE_OF_MODEL, parameters)).fetchall()
    return tuple(f"{row['node_id']}/{row['device_id']}" for row in rows)


async def _existing(conn: Connection, new: NewModel) -> Model | None:
    """Returns the registered model with the same identity. Raises AlreadyExists if the id names a different one."""
    if not new.id:
        row = await (await conn.execute(MODEL_OF_IDENTITY, {"identity": new.identity()})).fetchone()
        return model_of(row) if row is not None else None
    row = await (await conn.execute(MODEL_READ, {"id": new.id})).fetchone()
    if row is None:
        return None
    if row["identity"] != new.identity():
        raise AlreadyExists(
            f"model {new.id!r} exists with another source, quantization or load options; choose another id",
            resource=("model", new.id),
        )
    return model_of(row)


async def _insert(conn: Connection, new: NewModel) -> Model:
    values = {
        "identity": new.identity(),
        "source_kind": new.source.kind,
        "location": new.source.location,
        "source_revision": new.source.revision,
        "quantization": new.quantization,
        "load_options": json_of(new.load_options),
        "labels": json_of(new.labels),
    }
    for candidate in [new.id] if new.id else derived_ids(new):
        row = await (await conn.execute(MODEL_INSERT, {**values, "id": candidate})).fetchone()
        if row is not None:
            is_open = new.source.kind is SourceKind.HUB and not new.commit_sha
            message = (
                "registered; the hub did not tell its commit, which the preparation will" if is_open else "registered"
            )
            return await change_model(conn, candidate, message, {"commit_sha": new.commit_sha})
    existing = await _existing(conn, new)  # Another call took the id at the same moment.
    if existing is None:
        raise AlreadyExists("every id derived from the source is taken; give an id")
    return existing


def _check_etag(model: Model, etag: str) -> None:
    if etag and etag != model.etag:
        raise EtagMismatch(
            f"model {model.id!r} changed since that etag; read it again and repeat the change",
            metadata={"etag": model.etag},
            resource=("model", model.id),
        )


def _listing(terms: Sequence[Term], page: Page) -> tuple[sql.Composed, dict[str, Any]]:
    where, parameters = _where(terms)
    if page.after is not None:
        parameters["after"] = page.after[0]
        where = sql.SQL("id > %(after)s AND {}").format(where)
    listed = sql.SQL("SELECT * FROM models WHERE {} ORDER BY id LIMIT %(limit)s").format(where)
    return listed, {**parameters, "limit": page.size + 1}


def _where(terms: Sequence[Term]) -> tuple[sql.Composed, dict[str, Any]]:
    """The condition of a filter, and its parameters."""
    parameters: dict[str, Any] = {}
    conditions: list[sql.Composable] = [sql.SQL("TRUE")]
    for number, term in enumerate(terms):
        parameters[f"value_{number}"] = term.value
        column: sql.Composable = _COLUMNS.get(term.field, sql.SQL(""))
        if term.field == "labels":
            parameters[f"label_{number}"] = term.label
            column = sql.SQL("COALESCE(labels->>{}, '')").format(sql.Placeholder(f"label_{number}"))
        value = sql.Placeholder(f"value_{number}")
        compared = "{} = {}" if term.match is Match.EQUALS else "position(lower({1}::text) in lower({0})) > 0"
        conditions.append(sql.SQL(compared).format(column, value))
    return sql.SQL(" AND ").join(conditions), parameters


def require_update(mask: Sequence[str]) -> set[str]:
    """Checks an update mask and returns the fields it names."""
    wanted = set(mask)
    unknown = wanted - {"labels", "load_options"}
    if unknown or not wanted:
        raise FieldInvalid("update_mask", "name `labels`, `load_options` or both; nothing else can be changed")
    return wanted
