"""Notices files that changed since their model became READY. Such a model is prepared anew, under a new commit."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

from headrace_models.folder import changed_files
from headrace_registry.models.models import FileRecord, Model, ModelState, SourceKind
from headrace_registry.postgres.models.records import RecordStore

log = logging.getLogger(__name__)

_SHOWN = 3


class Freshness:
    """Compares the files of READY models with their stamps."""

    def __init__(self, records: RecordStore) -> None:
        self._records = records

    async def look(self, model: Model, *, verify: bool = False) -> None:
        """Takes the model back if its files changed, or with `verify` in any case. Raises ModelInUse.

        Reads no file: the preparation, which reads them all, finds that a file was only touched.
        """
        if model.state is not ModelState.READY:
            return
        record = await self._records.read(model.id)
        changed = await asyncio.to_thread(_changed, model, record) if record is not None else []
        if not changed and not verify:
            return
        shown = ", ".join(changed[:_SHOWN]) + (", …" if len(changed) > _SHOWN else "")
        why = f"its files changed ({shown})" if changed else "its files are to be verified"
        log.info("model %s: %s", model.id, why)
        await self._records.take_back(model, why=why)


def _changed(model: Model, record: FileRecord) -> list[str]:
    """Names of files whose stamps differ; without their digests, so that nothing is read."""
    changed = changed_files(Path(record.path), [replace(stamp, sha256="") for stamp in record.files])
    if record.source_files:
        is_folder = model.source.kind is SourceKind.FOLDER
        folder = Path(model.source.location) if is_folder else Path(model.source.location).parent
        stamps = [replace(stamp, sha256="") for stamp in record.source_files]
        changed += changed_files(folder, stamps, beside=is_folder)
    return sorted(set(changed))
