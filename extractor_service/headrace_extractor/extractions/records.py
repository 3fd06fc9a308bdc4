"""Extractions on disk: one JSON file each, so that a killed extractor goes on from there."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from headrace_chassis.errors import ServiceError
from headrace_extractor.errors import Failure
from headrace_extractor.extractions.values import Extraction, ExtractionState
from headrace_extractor.sets.spec import ExtractionSpec
from headrace_log.errors import DiskFull
from headrace_log.files import write_atomically

logger = logging.getLogger(__name__)


class Records:
    """The records in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, value: Extraction, request_ids: Iterable[str]) -> None:
        """Writes one record. Raises DiskFull."""
        record = {
            "id": value.id,
            "request_ids": sorted(request_ids),
            "spec": value.spec.to_json(),
            "set_id": value.set_id,
            "path": value.path,
            "state": str(value.state),
            "failure": value.failure.to_json() if value.failure else None,
            "n_rows": value.n_rows,
            "n_rows_computed": value.n_rows_computed,
            "size_bytes": value.size_bytes,
            "n_non_finite": value.n_non_finite,
            "n_documents_skipped": value.n_documents_skipped,
            "cached": value.cached,
            "create_time": value.create_time,
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(value.id), json.dumps(record).encode())

    def save_change(self, value: Extraction, request_ids: Iterable[str]) -> None:
        """Writes a record again. On a full disk the old one stays: a restart goes on from there just as well."""
        try:
            self.save(value, request_ids)
        except DiskFull as exc:
            logger.warning("the record of extraction %s stays as it was: %s", value.id, exc)

    def forget(self, extraction_id: str) -> None:
        """Removes a record."""
        self._path(extraction_id).unlink(missing_ok=True)

    def load(self) -> Iterator[tuple[Extraction, list[str]]]:
        """Yields the extractions with their request ids; sets aside records that hold something else."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.glob("*.json")):
            try:
                record = json.loads(path.read_bytes())
                yield _value_of(record), record["request_ids"]
            except OSError as exc:  # Its disk may be back at the next start.
                logger.warning("%s can't be read, and is left until the next start: %s", path.name, exc)
            except (ServiceError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
                # Another version may have written it.
                logger.warning("%s is no record of an extraction that can be read, and set aside: %s", path.name, exc)
                with contextlib.suppress(OSError):
                    path.rename(path.with_suffix(".unreadable"))

    def _path(self, extraction_id: str) -> Path:
        return self._folder / f"{extraction_id}.json"


def _value_of(record: dict[str, Any]) -> Extraction:
    state = ExtractionState(record["state"])
    return Extraction(
        id=record["id"],
        spec=ExtractionSpec.from_json(record["spec"]),
        set_id=record["set_id"],
        path=record["path"],
        state=state if state.ended else ExtractionState.RECOVERING,
        failure=Failure(**record["failure"]) if record["failure"] else None,
        n_rows=record["n_rows"] if state.ended else 0,  # The index tells how many rows were sealed.
        n_rows_expected=record["n_rows"] if state.ended else 0,
        n_rows_exact=state.ended,
        n_rows_computed=record["n_rows_computed"],
        size_bytes=record.get("size_bytes", 0),  # Older records lack this field and the next two.
        n_non_finite=record.get("n_non_finite", 0),
        n_documents_skipped=record.get("n_documents_skipped", 0),
        cached=record["cached"],
        create_time=record["create_time"],
    )
