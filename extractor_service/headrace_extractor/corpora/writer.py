"""Writes the folder of a corpus, a document at a time, in bounded memory.

    documents.bin   the documents one after another: UTF-8 text, token ids as little-endian int32, or conversations as
                    JSON lists of messages
    offsets.npy     int64, one more than documents: the offset at which each begins, and the end of the last
    corpus.json     `Corpus` and the version of this format

The digest is SHA-256 over a line with the `DocumentKind`, then for each document its size in bytes as a little-endian
uint64 and its content. `corpus.json` is written last, and the whole folder is under a temporary name until then.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from headrace_extractor.corpora.spec import Corpus, DocumentKind
from headrace_extractor.errors import CorpusEmpty, DiskFull

FORMAT = 1
DOCUMENTS, OFFSETS, CORPUS = "documents.bin", "offsets.npy", "corpus.json"
MAX_DOCUMENTS = 2**31 - 1  # The log's `document` column is int32.

_BUFFER_BYTES = 1024 * 1024
_LENGTH = struct.Struct("<Q")
NPY_HEADER_BYTES = 128  # numpy's own size for such a header; fixed, because the count is only known at the end
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class DocumentWriter:
    """Makes `folder` and fills it. Documents stay in memory until `flush`, which is due once the writer `is_full`."""

    def __init__(self, folder: Path, *, tokenized: bool, chat: bool = False) -> None:
        folder.mkdir()
        self._folder = folder
        self._kind = DocumentKind.of(tokenized=tokenized, chat=chat)
        self._hash = digest_of(self._kind)
        self._size = 0
        self._n_documents = 0
        self._buffer = bytearray()
        self._offsets = array("q", [0])
        self._documents_file: BinaryIO = (folder / DOCUMENTS).open("xb")
        self._offsets_file: BinaryIO = (folder / OFFSETS).open("xb")
        self._offsets_file.write(bytes(NPY_HEADER_BYTES))

    def add(self, document: bytes) -> None:
        """Appends a document in the form of the corpus's kind (see the module)."""
        self._hash.update(_LENGTH.pack(len(document)))
        self._hash.update(document)
        self._buffer += document
        self._size += len(document)
        self._n_documents += 1
        self._offsets.append(self._size)

    @property
    def buffered_bytes(self) -> int:
        """Bytes that the next `flush` writes."""
        return len(self._buffer) + len(self._offsets) * 8

    @property
    def is_full(self) -> bool:
        """True if the documents in memory are worth a write."""
        return self.buffered_bytes >= _BUFFER_BYTES

    def finish(self, *, corpus_id: str, origin: str, create_time: float) -> Corpus:
        """Completes the folder and makes it durable; raises CorpusEmpty if no document has content."""
        if self._size == 0:
            raise CorpusEmpty(
                f"The corpus {corpus_id!r} holds no document with content; check the file and its format.",
                resource=("corpus", corpus_id),
            )
        self.flush()
        self._offsets_file.seek(0)
        self._offsets_file.write(npy_header(self._n_documents + 1))
        for file in (self._documents_file, self._offsets_file):
            file.flush()
            os.fsync(file.fileno())
        corpus = Corpus(
            id=corpus_id,
            digest=self._hash.hexdigest(),
            n_documents=self._n_documents,
            size_bytes=self._size,
            tokenized=self._kind == DocumentKind.TOKEN_IDS,
            origin=origin,
            create_time=create_time,
            chat=self._kind == DocumentKind.CHAT,
        )
        with (self._folder / CORPUS).open("x", encoding="utf-8") as json_file:
            json.dump({"format": FORMAT, **corpus.to_json()}, json_file, indent=1)
            json_file.flush()
            os.fsync(json_file.fileno())
        sync_folder(self._folder)
        return corpus

    def flush(self) -> None:
        """Writes the documents in memory. Raises DiskFull for more documents than a corpus can hold."""
        if self._n_documents > MAX_DOCUMENTS:
            raise DiskFull(
                f"A corpus holds at most {MAX_DOCUMENTS} documents; split it.", metadata={"limit": str(MAX_DOCUMENTS)}
            )
        self._documents_file.write(self._buffer)
        self._offsets_file.write(np.array(self._offsets, dtype="<i8").tobytes())
        self._buffer = bytearray()
        self._offsets = array("q")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a full disk the buffered rest can't be written either; this error must not hide the first one.
        for file in (self._documents_file, self._offsets_file):
            try:
                file.close()
            except OSError:
                if kind is None:
                    raise


def digest_of(kind: DocumentKind) -> hashlib._Hash:
    """Returns the digest of a corpus before its first document."""
    return hashlib.sha256(f"headrace corpus 1 {kind}\n".encode())


def npy_header(n_offsets: int) -> bytes:
    """Returns the header of a one-dimensional int64 array in numpy's format 1.0, padded to its fixed size."""
    fields = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({n_offsets},), }}"
    header = fields.encode().ljust(NPY_HEADER_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


@contextmanager
def disk_errors(folder: Path, wanted_bytes: Callable[[], int] = lambda: 1) -> Iterator[None]:
    """Turns a full disk (or disk quota) into DiskFull."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _NO_SPACE:
            raise
        free = shutil.disk_usage(folder).free
        raise DiskFull(
            f"The disk under {folder} is full ({free} bytes free); delete corpora or sets, or move the data directory.",
            metadata={"required_bytes": str(wanted_bytes()), "free_bytes": str(free)},
        ) from exc


def sync_folder(folder: Path) -> None:
    """Makes new and renamed entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
