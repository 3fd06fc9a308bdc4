"""Reads the folder of a corpus, in the format described in `writer`. Files are mapped: opening reads little."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from headrace_extractor.corpora.packing import Int32Array
from headrace_extractor.corpora.spec import Corpus, DocumentKind
from headrace_extractor.corpora.writer import CORPUS, DOCUMENTS, FORMAT, OFFSETS, digest_of
from headrace_extractor.errors import CorpusNotFound, DigestMismatch

_LENGTH = struct.Struct("<Q")


class DocumentReader:
    """Documents by index. Safe to use from several threads.

    Raises CorpusNotFound if the folder is gone and DigestMismatch if its files don't fit together. Arrays returned by
    `token_ids` stay valid after `close`, and after the corpus is deleted.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self.corpus = read_corpus(self._folder)
        self._offsets, self._data = _map(self._folder, self.corpus)

    @property
    def tokenized(self) -> bool:
        """True if the corpus holds token ids instead of text."""
        return self.corpus.tokenized

    @property
    def kind(self) -> DocumentKind:
        """The kind of all its documents."""
        return self.corpus.kind

    @property
    def digest(self) -> str:
        """SHA-256 over the documents, hex."""
        return self.corpus.digest

    def __len__(self) -> int:
        return self.corpus.n_documents

    def size_bytes(self, index: int) -> int:
        """Returns the size of a document without reading it."""
        start, end = self._range(index)
        return end - start

    def text(self, index: int) -> str:
        """Returns a document of a text corpus."""
        if self.kind != DocumentKind.TEXT:
            raise TypeError(f"a corpus of {self.kind} has no text")
        return self._content(index).tobytes().decode()

    def messages(self, index: int) -> list[dict[str, Any]]:
        """Returns a conversation: messages with `role`, `content` and all other keys they were ingested with."""
        if self.kind != DocumentKind.CHAT:
            raise TypeError(f"a corpus of {self.kind} has no conversations")
        content = self._content(index).tobytes()
        messages: list[dict[str, Any]] = json.loads(content) if content else []
        return messages

    def token_ids(self, index: int) -> Int32Array:
        """Returns a document of a tokenized corpus, as a read-only view of the file."""
        if not self.tokenized:
            raise TypeError(f"a corpus of {self.kind} has no token ids")
        return self._content(index).view("<i4")

    def verify(self) -> None:
        """Reads all documents; raises DigestMismatch if one is not as it was ingested."""
        digest = digest_of(self.kind)
        for index in range(len(self)):
            content = self._content(index)
            digest.update(_LENGTH.pack(content.size))
            digest.update(content.data)
        if digest.hexdigest() != self.digest:
            raise _damaged(self._folder, "the documents are not those of the digest")

    def close(self) -> None:
        """Releases the files; reading afterwards raises IndexError."""
        self._offsets = np.zeros(0, dtype=np.int64)
        self._data = np.zeros(0, dtype=np.uint8)

    def content(self, index: int) -> bytes:
        """Returns the bytes of a document as they are stored."""
        return self._content(index).tobytes()

    def _content(self, index: int) -> NDArray[np.uint8]:
        start, end = self._range(index)
        content = self._data[start:end]
        if content.size != end - start:
            raise _damaged(self._folder, f"document {index} lies outside {DOCUMENTS}")
        return content

    def _range(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self._offsets.size - 1:
            raise IndexError(index)
        return int(self._offsets[index]), int(self._offsets[index + 1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_corpus(folder: Path) -> Corpus:
    """Reads the description of a corpus in its folder; raises CorpusNotFound, or DigestMismatch for damaged files."""
    try:
        value = json.loads((folder / CORPUS).read_bytes())
        if value.pop("format") != FORMAT:
            raise _damaged(folder, f"{CORPUS} is of a format this version does not know")
        corpus = Corpus.from_json(value)
    except FileNotFoundError as exc:
        if not folder.is_dir():
            raise CorpusNotFound(
                f"No corpus {folder.name!r} on this node; ListCorpora lists them.", resource=("corpus", folder.name)
            ) from exc
        raise _damaged(folder, f"{CORPUS} is missing") from exc
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise _damaged(folder, f"{CORPUS} can't be read") from exc
    if corpus.id != folder.name:
        raise _damaged(folder, f"{CORPUS} is that of {corpus.id!r}")
    return corpus


def check_files(folder: Path, corpus: Corpus) -> None:
    """Raises DigestMismatch if the sizes of the files don't fit the corpus."""
    _map(folder, corpus)


def _map(folder: Path, corpus: Corpus) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    try:
        offsets = np.load(folder / OFFSETS, mmap_mode="r", allow_pickle=False)
        data = np.memmap(folder / DOCUMENTS, dtype=np.uint8, mode="r")
    except (OSError, ValueError, EOFError) as exc:
        raise _damaged(folder, f"{OFFSETS} or {DOCUMENTS} can't be read") from exc
    if offsets.dtype != np.dtype("<i8") or offsets.shape != (corpus.n_documents + 1,):
        raise _damaged(folder, f"{OFFSETS} is not of the size {CORPUS} says")
    if data.size != corpus.size_bytes or int(offsets[0]) != 0 or int(offsets[-1]) != corpus.size_bytes:
        raise _damaged(folder, f"{DOCUMENTS} is not of the size {CORPUS} says")
    # Plain arrays over the same mapping: a memmap's own indexing is several times slower.
    return offsets.view(np.ndarray), data.view(np.ndarray)


def _damaged(folder: Path, what: str) -> DigestMismatch:
    return DigestMismatch(
        f"The files of corpus {folder.name!r} are damaged: {what}; delete it and upload it again.",
        resource=("corpus", folder.name),
    )
