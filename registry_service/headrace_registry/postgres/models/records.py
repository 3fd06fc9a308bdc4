"""Records of the files of READY models in Postgres, and the way back of a model whose files changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from psycopg.types.json import Jsonb

from headrace_models.folder import FileStamp
from headrace_registry.errors import ModelInUse
from headrace_registry.models.models import FileRecord, Model, ModelState, SourceKind
from headrace_registry.postgres.models.models import change_model, lock_model
from headrace_registry.postgres.residency.unloading import order_unload
from headrace_registry.postgres.rows import stamps_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.wakeups import Wakeups

RECORD_READ = "SELECT path, files, source_files, distrusted FROM model_files WHERE model_id = %(model_id)s"
RECORD_WRITE = """
INSERT INTO model_files (model_id, path, files, source_files)
VALUES (%(model_id)s, %(path)s, %(files)s, %(source_files)s)
ON CONFLICT (model_id) DO UPDATE
SET path = excluded.path, files = excluded.files, source_files = excluded.source_files, distrusted = false
"""
RECORD_DISTRUST = "UPDATE model_files SET distrusted = true WHERE model_id = %(model_id)s"


class RecordStore:
    """Reads records, and takes models back."""

    def __init__(self, database: Database, wakeups: Wakeups) -> None:
        self._database = database
        self._wakeups = wakeups

    async def read(self, model_id: str) -> FileRecord | None:
        """Returns the record of a model; None for a model that was never READY in this version."""

        async def work(conn: Connection) -> FileRecord | None:
            row = await (await conn.execute(RECORD_READ, {"model_id": model_id})).fetchone()
            if row is None:
                return None
            return FileRecord(
                path=row["path"],
                files=stamps_of(row["files"]),
                source_files=stamps_of(row["source_files"]),
                distrusted=row["distrusted"],
            )

        return await self._database.single(work)

    async def take_back(self, model: Model, *, why: str) -> None:
        """Makes a READY model REGISTERED, so that it is prepared anew, and unloads it. Raises ModelInUse.

        Does nothing if the model has changed since it was read: another call was faster.
        """

        async def work(conn: Connection) -> None:
            now = await lock_model(conn, model.id)
            if now.state is not ModelState.READY or now.revision != model.revision:
                return
            try:
                await order_unload(conn, model.id, node_id="", force=False, actor="registry", why=why)
            except ModelInUse as exc:
                raise ModelInUse(
                    f"{why}, and {exc.message}; then prepare it again", metadata=exc.metadata, resource=exc.resource
                ) from exc
            columns = {"state": ModelState.REGISTERED, "files_path": "", "store_bytes": 0}
            if model.source.kind is not SourceKind.HUB:
                columns["commit_sha"] = ""  # The content of local files is their commit.
            await conn.execute(RECORD_DISTRUST, {"model_id": model.id})
            await change_model(conn, model.id, f"{why}; prepare it again", columns)

        await self._database.run(work)
        self._wakeups.wake()


async def write_record(
    conn: Connection, model_id: str, *, path: str, files: Iterable[FileStamp], source_files: Iterable[FileStamp]
) -> None:
    """Records the files of a model that becomes READY."""
    values = {
        "model_id": model_id,
        "path": path,
        "files": Jsonb([asdict(stamp) for stamp in files]),
        "source_files": Jsonb([asdict(stamp) for stamp in source_files]),
    }
    await conn.execute(RECORD_WRITE, values)
