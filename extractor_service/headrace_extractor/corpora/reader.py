"""Reads the folder of a corpus, in the format described in `writer`. Opening reads little.

Files are read by `pread`, never mapped: a mapped file that shrinks would end the process by SIGBUS.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from headrace_extractor.corpora.packing import Int32Array
from headrace_extractor.corpora.spec import Corpus, DocumentKind
from headrace_extractor.corpora.writer import (
    CORPUS,
    DOCUMENTS,
    FORMAT,
    NPY_HEADER_BYTES,
    OFFSETS,
    digest_of,
    npy_header,
)
from headrace_extractor.errors import CorpusNotFound, DigestMismatch

_LENGTH = struct.Struct("<Q")
# Offsets are read so many at a time: one read for hundreds of documents in a row.
_BLOCK = 4096
# Documents between two looks for a stop.
_VERIFIED_AT_ONCE = 1000


class DocumentReader:
    """Documents by index. Safe to use from several threads.

    Raises CorpusNotFound if the folder is gone and DigestMismatch if its files don't fit together.
    """

    def __init__(self, folder: Path | str) -> None:
        self._descriptors: tuple[int, ...] = ()
        self._folder = Path(folder)
        self.corpus = read_corpus(self._folder)
        self._n_documents = self.corpus.n_documents
        self._descriptors = self._offsets, self._documents = _open(self._folder, self.corpus)
        self._block: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))  # The offsets read last.

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
        try:
            return self.content(index).decode()
        except UnicodeDecodeError as exc:
            raise _damaged(self._folder, f"document {index} is no text") from exc

    def messages(self, index: int) -> list[dict[str, Any]]:
        """Returns a conversation: messages with `role`, `content` and all other keys they were ingested with."""
        if self.kind != DocumentKind.CHAT:
            raise TypeError(f"a corpus of {self.kind} has no conversations")
        content = self.content(index)
        try:
            messages: list[dict[str, Any]] = json.loads(content) if content else []
        except ValueError as exc:
            raise _damaged(self._folder, f"document {index} is no conversation") from exc
        return messages

    def token_ids(self, index: int) -> Int32Array:
        """Returns a document of a tokenized corpus; read-only."""
        if not self.tokenized:
            raise TypeError(f"a corpus of {self.kind} has no token ids")
        content = self.content(index)
        if len(content) % 4:
            raise _damaged(self._folder, f"document {index} holds parts of token ids")
        return np.frombuffer(content, "<i4")

    @property
    def stamp(self) -> tuple[int, ...]:
        """Inodes, sizes and times of the files: equal for as long as nothing was written to them."""
        stats = [os.fstat(descriptor) for descriptor in self._descriptors]
        return tuple(n for stat in stats for n in (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))

    def verify(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Reads all documents; raises DigestMismatch if one is not as it was ingested. Ends early once `stop()`."""
        digest = digest_of(self.kind)
        for index in range(len(self)):
            if index % _VERIFIED_AT_ONCE == 0 and stop():
                return
            content = self.content(index)
            digest.update(_LENGTH.pack(len(content)))
            digest.update(content)
        if digest.hexdigest() != self.digest:
            raise _damaged(self._folder, "the documents are not those of the digest")

    def close(self) -> None:
        """Closes the files; reading afterwards raises IndexError."""
        self._n_documents = 0
        descriptors, self._descriptors = self._descriptors, ()
        for descriptor in descriptors:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def content(self, index: int) -> bytes:
        """Returns the bytes of a document as they are stored."""
        start, end = self._range(index)
        return self._read(self._documents, start, end - start, DOCUMENTS)

    def _range(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self._n_documents:
            raise IndexError(index)
        number, at = divmod(index, _BLOCK)
        block = self._block
        if block[0] != number:
            first = number * _BLOCK
            n_offsets = min(_BLOCK, self._n_documents - first) + 1
            content = self._read(self._offsets, NPY_HEADER_BYTES + 8 * first, 8 * n_offsets, OFFSETS)
            block = self._block = (number, np.frombuffer(content, "<i8"))
        start, end = int(block[1][at]), int(block[1][at + 1])
        if not 0 <= start <= end <= self.corpus.size_bytes:
            raise _damaged(self._folder, f"document {index} lies outside {DOCUMENTS}")
        return start, end

    def _read(self, descriptor: int, offset: int, n_bytes: int, name: str) -> bytes:
        parts, end = [], offset + n_bytes
        while offset < end:
            try:
                part = os.pread(descriptor, end - offset, offset)
            except OSError as exc:
                raise _damaged(self._folder, f"{name} can't be read: {exc.strerror}") from exc
            if not part:
                raise _damaged(self._folder, f"{name} is cut short")
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

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
    except OSError as exc:
        raise _damaged(folder, f"{CORPUS} can't be read ({exc.strerror})") from exc
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise _damaged(folder, f"{CORPUS} can't be read") from exc
    if corpus.id != folder.name:
        raise _damaged(folder, f"{CORPUS} is that of {corpus.id!r}")
    return corpus


def check_files(folder: Path, corpus: Corpus) -> None:
    """Raises DigestMismatch if the sizes of the files don't fit the corpus."""
    for descriptor in _open(folder, corpus):
        os.close(descriptor)


def _open(folder: Path, corpus: Corpus) -> tuple[int, int]:
    """Opens offsets and documents, after a look at their sizes and at the first and the last offset."""
    n_offsets = corpus.n_documents + 1
    with ExitStack() as stack:
        try:
            offsets = os.open(folder / OFFSETS, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, offsets)
            documents = os.open(folder / DOCUMENTS, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, documents)
            header = os.pread(offsets, NPY_HEADER_BYTES, 0)
            ends = [os.pread(offsets, 8, NPY_HEADER_BYTES + 8 * at) for at in (0, corpus.n_documents)]
        except OSError as exc:
            raise _damaged(folder, f"{OFFSETS} or {DOCUMENTS} can't be read ({exc.strerror})") from exc
        if os.fstat(offsets).st_size != NPY_HEADER_BYTES + 8 * n_offsets or header != npy_header(n_offsets):
            raise _damaged(folder, f"{OFFSETS} is not of the size {CORPUS} says")
        size = os.fstat(documents).st_size
        if size != corpus.size_bytes or ends != [bytes(8), corpus.size_bytes.to_bytes(8, "little")]:
            raise _damaged(folder, f"{DOCUMENTS} is not of the size {CORPUS} says")
        stack.pop_all()
        return offsets, documents


def _damaged(folder: Path, what: str) -> DigestMismatch:
    return DigestMismatch(
        f"The files of corpus {folder.name!r} are damaged: {what}; delete it and upload it again.",
        resource=("corpus", folder.name),
    )
