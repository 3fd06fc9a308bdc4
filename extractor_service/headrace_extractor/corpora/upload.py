"""A corpus that is uploaded in pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from headrace_extractor.corpora.quota import Share
from headrace_extractor.corpora.spec import Corpus
from headrace_extractor.corpora.writer import disk_errors


class CorpusUpload:
    """Spools to a temporary file and ingests it at `finish`; a `with` block left without `finish` keeps nothing.

    Methods block; call them one at a time, from any thread.
    """

    def __init__(self, spool: Path, share: Share, ingest: Callable[[BinaryIO], Corpus]) -> None:
        self._spool = spool
        self._share = share
        self._ingest = ingest
        with disk_errors(spool.parent):
            self._file: BinaryIO = spool.open("x+b")

    def write(self, content: bytes) -> None:
        """Appends a piece of the file; raises DiskFull."""
        self._share.take(len(content))
        with disk_errors(self._spool.parent, lambda: len(content)):
            self._file.write(content)

    def finish(self) -> Corpus:
        """Parses the file and returns the corpus; raises the errors of `CorpusStore.ingest`."""
        with disk_errors(self._spool.parent):
            self._file.flush()
        self._file.seek(0)
        return self._ingest(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.unlink(missing_ok=True)
        self._share.give_back()
        try:
            self._file.close()
        except OSError:  # The disk is full: closing can't write the rest of the file, which is deleted anyway.
            if kind is None:
                raise
