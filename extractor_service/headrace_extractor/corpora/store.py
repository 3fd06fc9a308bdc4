"""The corpora of a node: ingest, read, list, delete.

A corpus is a folder `<root>/<id>` that appears whole, by a rename, and never changes. Unfinished work has a name such
as `.ingest-7`; an interrupted ingest leaves such files, and the next start removes them. One process owns a root.
All methods block and may be called from several threads.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from headrace_chassis.confined.in_process import IN_PROCESS, OwnTalk
from headrace_chassis.confined.ports import Confinement, Talk
from headrace_chassis.errors import ShuttingDown
from headrace_extractor.corpora.files.contents import token_bytes
from headrace_extractor.corpora.files.opening import open_beneath
from headrace_extractor.corpora.ingest.mixing import Mix
from headrace_extractor.corpora.ingest.steps import LIMITS, spec_to_json, write_documents, write_file, write_mix
from headrace_extractor.corpora.ingest.upload import CorpusUpload
from headrace_extractor.corpora.quota import Quota, Share
from headrace_extractor.corpora.reader import DocumentReader, check_files, read_corpus
from headrace_extractor.corpora.spec import Corpus, CorpusSpec, DocumentKind, check_id, is_id
from headrace_extractor.corpora.writer import sync_folder
from headrace_extractor.errors import (
    AlreadyExists,
    CorpusMalformed,
    CorpusNotFound,
    DigestMismatch,
    FieldInvalid,
    PathNotAllowed,
)
from headrace_extractor.requests import Requests

DEFAULT_MAX_BYTES = 1024**4
DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
# Names of unfinished work. A file server may have names of its own that start with a dot.
_TEMPORARY = re.compile(r"\.(upload|ingest|deleted)-\d+")


class Register(Protocol):
    """The registry, in which one corpus id names the same documents on all nodes."""

    def claim(self, corpus: Corpus) -> None:
        """Asks whether this node may keep a corpus; raises AlreadyExists if another node holds other documents."""

    def changed(self) -> None:
        """Has all corpora of this node told."""


class CorpusStore:
    """Keeps corpora of at most `max_bytes` under `root`; reads files of this machine only below `allowed_roots`.

    Files and mixtures are read, and their corpora written, under `confinement`.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        allowed_roots: Sequence[Path | str] = (),
        max_bytes: int = DEFAULT_MAX_BYTES,
        confinement: Confinement = IN_PROCESS,
        now: Callable[[], float] = time.time,
        register: Register | None = None,
    ) -> None:
        self._root = Path(root)
        self._allowed_roots = tuple(Path(os.path.realpath(allowed)) for allowed in allowed_roots)
        self._confinement = confinement
        self._now = now
        self._register = register
        # Id and digest by an ingest's folder, between the claim and the corpus.
        self._claims: dict[Path, tuple[str, str]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.deletions = Requests()
        self._names = itertools.count()
        self._corpora: dict[str, Corpus] = {}
        self._damaged: dict[str, DigestMismatch] = {}
        self._root.mkdir(parents=True, exist_ok=True)
        for entry in sorted(self._root.iterdir()):
            if _TEMPORARY.fullmatch(entry.name):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            elif entry.is_dir() and is_id(entry.name):  # The root of a file system has a lost+found.
                try:
                    corpus = read_corpus(entry)
                    check_files(entry, corpus)
                except DigestMismatch as exc:
                    self._damaged[entry.name] = exc
                else:
                    self._corpora[entry.name] = corpus
        used = sum(_disk_bytes(corpus) for corpus in self._corpora.values())
        self._quota = Quota(self._root, limit_bytes=max_bytes, used_bytes=used)

    def close(self) -> None:
        """Makes running ingests end with ShuttingDown, each within a MiB of work."""
        self._closed = True

    def get(self, corpus_id: str) -> Corpus:
        """Returns a corpus; raises CorpusNotFound, or DigestMismatch if its files are damaged."""
        with self._lock:
            if corpus_id in self._damaged:
                raise self._damaged[corpus_id]
            if corpus_id not in self._corpora:
                raise _not_found(corpus_id)
            return self._corpora[corpus_id]

    def __len__(self) -> int:
        """Number of corpora."""
        return len(self._corpora)

    def list(self, page_size: int = 0, page_token: str = "") -> tuple[Sequence[Corpus], str]:
        """Returns a page of corpora ordered by id, and the token of the next page, empty at the end."""
        if page_size < 0:
            raise FieldInvalid("page_size must not be negative; 0 means 100.", field="page_size")
        try:
            after = base64.b64decode(page_token, altchars=b"-_", validate=True).decode()
            if page_token:
                check_id(after)
        except (binascii.Error, ValueError, FieldInvalid) as exc:
            raise FieldInvalid(
                "page_token is none that this server gave out; start again without.", field="page_token"
            ) from exc
        size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        with self._lock:
            rest = sorted(corpus_id for corpus_id in self._corpora if corpus_id > after)
            page = [self._corpora[corpus_id] for corpus_id in rest[:size]]
        next_token = base64.urlsafe_b64encode(page[-1].id.encode()).decode() if len(rest) > size else ""
        return page, next_token

    def digests(self) -> dict[str, str]:
        """Returns the digest of each corpus, by id; also of those that are about to be kept."""
        with self._lock:
            return {**dict(self._claims.values()), **{corpus.id: corpus.digest for corpus in self._corpora.values()}}

    def delete(self, corpus_id: str, request_id: str = "") -> None:
        """Removes a corpus; open readers go on reading. Raises CorpusNotFound, unless this request has removed it."""
        trash = self._temporary("deleted")
        with self._lock:
            if self.deletions.recall(request_id) is not None:
                return
            corpus = self._corpora.get(corpus_id)
            if corpus is None and corpus_id not in self._damaged:
                raise _not_found(corpus_id)
            (self._root / corpus_id).rename(trash)
            self.deletions.remember(request_id, corpus_id)
            self._corpora.pop(corpus_id, None)
            self._damaged.pop(corpus_id, None)
        shutil.rmtree(trash, ignore_errors=True)
        if corpus is not None:
            self._quota.give_back(_disk_bytes(corpus))
        self._tell_changes()

    def open(self, corpus_id: str) -> DocumentReader:
        """Opens a corpus for reading; the caller closes it."""
        return DocumentReader(self.path(corpus_id))

    def path(self, corpus_id: str) -> Path:
        """Returns the folder of a corpus, for a runner to open; raises the errors of `get`."""
        return self._root / self.get(corpus_id).id

    def upload(self, spec: CorpusSpec) -> CorpusUpload:
        """Starts an upload in pieces, to be used in a `with` block."""
        spec.file_format()  # Better refused now than after the last piece.
        return CorpusUpload(
            self._temporary("upload"),
            Share(self._quota, self._check_open),
            lambda file: self.ingest(spec, file, origin=spec.file_name),
        )

    def ingest(self, spec: CorpusSpec, file: BinaryIO, *, origin: str = "") -> Corpus:
        """Ingests an open, seekable file; returns the existing corpus if the id holds the same documents already.

        Raises CorpusMalformed, CorpusEmpty, AlreadyExists (the id holds other documents), DiskFull.
        """
        spec.file_format(origin)
        job = {"spec": spec_to_json(spec), "origin": origin}
        with _descriptor(file) as descriptor:
            return self._ingest(
                spec.id,
                lambda target: self._confinement.open(
                    write_file, {**job, "target": target}, files=(descriptor,), refuse=_unreadable, limits=LIMITS
                ),
            )

    def ingest_path(self, spec: CorpusSpec, path: str) -> Corpus:
        """Ingests a file of this machine; raises PathNotAllowed unless it lies under an allowed root."""
        spec.file_format(path)
        if not Path(path).is_absolute() or "\0" in path:
            raise FieldInvalid(f"{path!r} is no absolute path.", field="path.path")
        try:
            real = Path(os.path.realpath(path))
        except OSError as exc:  # A part of the path was replaced meanwhile.
            raise FieldInvalid(f"{path} can't be opened: {exc.strerror}.", field="path.path") from exc
        if not any(real.is_relative_to(allowed) for allowed in self._allowed_roots):
            roots = ", ".join(map(str, self._allowed_roots)) or "there are none"
            raise PathNotAllowed(
                f"{path} lies outside the corpus roots ({roots}); move the file there, or start the extractor with"
                " --corpus-root for its folder.",
                metadata={"path": path, "corpus_roots": roots},
            )
        with open_beneath(real) as file:
            return self.ingest(spec, file, origin=path)

    def ingest_tokens(self, corpus_id: str, documents: Iterable[Sequence[int]], *, origin: str = "token ids") -> Corpus:
        """Ingests documents that are lists of token ids, which must be non-negative int32."""
        check_id(corpus_id)
        contents = (token_bytes(tokens, f"Document {i}", document=i) for i, tokens in enumerate(documents))
        return self.ingest_documents(corpus_id, contents, origin=origin, kind=DocumentKind.TOKEN_IDS)

    def ingest_mix(self, corpus_id: str, mix: Mix) -> Corpus:
        """Ingests a mixture of this node's corpora; raises CorpusNotFound, CorpusMalformed for different kinds."""
        check_id(corpus_id)
        job = {"mix": asdict(mix), "folders": [str(self.path(part.corpus_id)) for part in mix.parts]}
        return self._ingest(
            corpus_id,
            lambda target: self._confinement.open(
                write_mix, {**job, "target": target}, refuse=_unreadable, limits=LIMITS
            ),
        )

    def known(self, corpus_id: str, origin: str) -> Corpus | None:
        """Returns the corpus if this node has it and it comes from `origin`."""
        with self._lock:
            corpus = self._corpora.get(corpus_id)
        return corpus if corpus is not None and corpus.origin == origin else None

    def ingest_documents(
        self, corpus_id: str, documents: Iterable[bytes], *, origin: str, kind: DocumentKind
    ) -> Corpus:
        """Ingests documents as bytes in the form that `DocumentWriter` stores.

        Raises the errors of `ingest`, and those of the iterator.
        """
        return self._ingest(
            corpus_id,
            lambda target: nullcontext(OwnTalk(write_documents(documents, kind=kind, origin=origin, **target))),
        )

    def _ingest(self, corpus_id: str, write: Callable[[dict[str, Any]], AbstractContextManager[Talk]]) -> Corpus:
        """Takes space for each write, and gives the finished folder its name."""
        folder = self._temporary("ingest")
        share = Share(self._quota, self._check_open)
        target = {"folder": str(folder), "corpus_id": corpus_id, "create_time": self._now()}
        try:
            with write(target) as talk:
                for n_bytes in talk:
                    share.take(n_bytes)
                corpus = Corpus.from_json(talk.answer)
            if (existing := self._existing(corpus)) is not None:
                return existing
            if self._register is not None:
                with self._lock:
                    self._claims[folder] = (corpus_id, corpus.digest)
                self._register.claim(corpus)  # Not under the lock: the registry may take its time.
            with self._lock:
                if (existing := self._existing(corpus)) is not None:
                    return existing
                folder.rename(self._root / corpus_id)
                sync_folder(self._root)
                self._corpora[corpus_id] = corpus
                # The bytes count already as this ingest's share, which is given back next.
                self._quota.take(_disk_bytes(corpus), forced=True)
                return corpus
        finally:
            with self._lock:
                self._claims.pop(folder, None)
            shutil.rmtree(folder, ignore_errors=True)
            share.give_back()

    def _existing(self, corpus: Corpus) -> Corpus | None:
        """Returns the corpus of this id if its documents are the same. Raises AlreadyExists if they are others."""
        existing = self._corpora.get(corpus.id)
        if existing is not None and existing.digest == corpus.digest:
            return existing
        if existing is not None or corpus.id in self._damaged:
            self._tell_changes()
            raise AlreadyExists(
                f"A corpus {corpus.id!r} with other documents exists; choose another id, or delete it first.",
                resource=("corpus", corpus.id),
            )
        return None

    def _tell_changes(self) -> None:
        if self._register is not None:
            self._register.changed()

    def _check_open(self) -> None:
        if self._closed:
            raise ShuttingDown

    def _temporary(self, purpose: str) -> Path:
        return self._root / f".{purpose}-{next(self._names)}"


@contextmanager
def _descriptor(file: BinaryIO) -> Iterator[int]:
    """Yields the descriptor of a file; of a copy, if the file is in memory alone."""
    try:
        descriptor = file.fileno()
    except OSError:
        file.seek(0)
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            yield copy.fileno()
    else:
        yield descriptor


def _unreadable(why: str) -> CorpusMalformed:
    return CorpusMalformed(f"The file {why}; is its format right? Else split it.")


def _disk_bytes(corpus: Corpus) -> int:
    return corpus.size_bytes + 8 * (corpus.n_documents + 1)


def _not_found(corpus_id: str) -> CorpusNotFound:
    return CorpusNotFound(
        f"No corpus {corpus_id[:255]!r} on this node; ListCorpora lists them.", resource=("corpus", corpus_id[:255])
    )
