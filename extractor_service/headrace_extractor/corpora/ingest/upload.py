"""A corpus that is uploaded in pieces."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from headrace_chassis.errors import ShuttingDown
from headrace_extractor.corpora.quota import Share
from headrace_extractor.corpora.spec import Corpus
from headrace_extractor.corpora.writer import disk_errors


class CorpusUpload:
    """Spools to a temporary file and ingests it at `finish`; a `with` block left without `finish` keeps nothing.

    Methods block; call them one at a time, from any thread. The block may be left while one of them still runs, as when
    a call is cancelled: what is written afterwards is dropped, and a `finish` under way keeps the file to its end.
    """

    def __init__(self, spool: Path, share: Share, ingest: Callable[[BinaryIO], Corpus]) -> None:
        self._spool = spool
        self._share = share
        self._ingest = ingest
        self._lock = threading.Lock()
        self._left = False
        self._file: BinaryIO | None = None

    def write(self, content: bytes) -> None:
        """Appends a piece of the file; raises DiskFull."""
        with self._lock:
            if self._left:
                return
            self._share.take(len(content))
            with disk_errors(self._spool.parent, lambda: len(content)):
                self._opened().write(content)

    def finish(self) -> Corpus:
        """Parses the file and returns the corpus; raises the errors of `CorpusStore.ingest`."""
        with self._lock:
            if self._left:
                raise ShuttingDown  # The call is over: no answer can be sent any more.
            with disk_errors(self._spool.parent):
                self._opened().flush()
                # A descriptor of its own, which stays this file's if the block is left: its number is given out again.
                file = os.fdopen(os.dup(self._opened().fileno()), "rb")
        with file:
            file.seek(0)
            return self._ingest(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._left = True
            self._spool.unlink(missing_ok=True)
            self._share.give_back()
            try:
                if self._file is not None:
                    self._file.close()
            except OSError:  # The disk is full: closing can't write the rest of the file, which is deleted anyway.
                if kind is None:
                    raise

    def _opened(self) -> BinaryIO:
        """Returns the file, which a write or `finish` makes: before them there is nothing to leave behind."""
        if self._file is None:
            self._file = self._spool.open("x+b")
        return self._file
