"""Reads an ingested corpus: a folder with `documents.bin`, `offsets.npy` and `corpus.json`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from extractor_service.packing import Int32Array


class DocumentReader:
    """Maps a corpus folder; documents are read as they are asked for."""

    def __init__(self, folder: Path) -> None:
        raise NotImplementedError

    @property
    def tokenized(self) -> bool:
        """True when it holds token ids instead of text."""
        raise NotImplementedError

    @property
    def digest(self) -> str:
        """SHA-256 over the documents, hex."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def text(self, index: int) -> str:
        """Returns a document of a text corpus."""
        raise NotImplementedError

    def token_ids(self, index: int) -> Int32Array:
        """Returns a document of a tokenized corpus, as a read-only view."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
