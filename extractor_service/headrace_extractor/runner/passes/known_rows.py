"""Compares the origin of rows with the set's own, where columns are added to rows that exist.

A newer library may cut texts into other tokens, and a document may be skipped in one run and not in another. Then a new
column would stand beside the tokens, documents and columns of other rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from headrace_extractor.errors import StateConflict
from headrace_log.layout import PROVENANCE
from headrace_log.reader import SetReader
from headrace_log.segment_file import check_sealed


class KnownRows:
    """The origin of rows that a set has: token, document and position."""

    def __init__(self, folder: Path, written: Collection[str]) -> None:
        """Opens the set's columns of origin that are not among those `written`."""
        self._folder = folder
        self._reader = SetReader(folder, [column.name for column in PROVENANCE if column.name not in written])

    def check(self, row: int, origins: Mapping[str, np.ndarray]) -> None:
        """Raises StateConflict unless the rows from `row` on are of these origins, as far as the set has them.

        Raises the log's DigestMismatch if the set's own file is damaged.
        """
        columns, n_rows = self._reader.columns, len(next(iter(origins.values())))
        end_row = min(row + n_rows, self._reader.sealed_rows) if columns else row
        done = row
        while done < end_row:
            run = self._reader.read(done, end_row - done, end_row=end_row)
            for column, stored in zip(columns, run.columns, strict=True):
                found = origins[column.name][done - row : run.end_row - row]
                differs = np.flatnonzero(np.frombuffer(stored, dtype=np.int32) != found)
                if differs.size:
                    at = int(differs[0])
                    record = self._reader.sealed_segment(done + at)
                    if record is not None:  # A damaged file tells nothing about the corpus.
                        check_sealed(self._folder, column, record)
                    raise StateConflict(
                        f"Row {done + at} of the set has {column.name} {np.frombuffer(stored, np.int32)[at]}, and the "
                        f"corpus now gives {found[at]} there: its documents become other tokens than when the set was "
                        "begun. Delete the set, then start the extraction again.",
                        metadata={"row": str(done + at), "column": column.name},
                    )
            done = run.end_row
