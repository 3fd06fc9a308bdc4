"""Writes the folder of a corpus from each kind of source; the functions that run under confinement.

Each is a generator: it yields the number of bytes that it is about to write, goes on once it may, and returns the
corpus as JSON. A file's documents may have a thousand times the bytes of the file: more is not compression.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

from headrace_chassis.confined.limits import Limits
from headrace_extractor.corpora.files.contents import malformed
from headrace_extractor.corpora.files.parsers import parse
from headrace_extractor.corpora.ingest.mixing import Mix, MixPart, check_kinds, draw
from headrace_extractor.corpora.reader import DocumentReader
from headrace_extractor.corpora.spec import CorpusFormat, CorpusSpec, DocumentKind, TextSplit
from headrace_extractor.corpora.writer import DocumentWriter, disk_errors

_MIB = 1024 * 1024
# A document of 64 MiB takes half a gigabyte while its JSON is parsed, and twice that in characters of four bytes.
LIMITS = Limits(memory_bytes=2048 * _MIB, cpu_s=30, wall_s=300.0, output_bytes=_MIB)
MAX_EXPANSION = 1000
# A file smaller than its one document is common.
_FREE_EXPANSION_BYTES = 64 * _MIB

Steps: TypeAlias = Generator[int, None, dict[str, Any]]


def write_file(file: int, *, spec: dict[str, Any], origin: str, target: dict[str, Any]) -> Steps:
    """Writes the documents of an open file, from its beginning."""
    checked = spec_from_json(spec)
    with open(file, "rb", closefd=False) as opened:
        opened.seek(0)
        size = os.fstat(file).st_size
        documents = _bounded(parse(opened, checked, origin), _FREE_EXPANSION_BYTES + MAX_EXPANSION * size)
        return (yield from write_documents(documents, kind=checked.kind(origin), origin=origin, **target))


def write_mix(*, mix: dict[str, Any], folders: list[str], target: dict[str, Any]) -> Steps:
    """Writes a mixture of the corpora in the folders, one for each part of the mix."""
    checked = Mix(**{**mix, "parts": tuple(MixPart(**part) for part in mix["parts"])})
    with ExitStack() as stack:
        readers = [stack.enter_context(DocumentReader(folder)) for folder in folders]
        check_kinds(readers)
        documents = draw(checked, readers)
        return (yield from write_documents(documents, kind=readers[0].kind, origin=checked.origin, **target))


def write_documents(
    documents: Iterable[bytes], *, kind: DocumentKind, origin: str, folder: str, corpus_id: str, create_time: float
) -> Steps:
    """Writes documents in the form that `DocumentWriter` stores; `folder`, `corpus_id` and `create_time` are a target.

    Raises CorpusEmpty, DiskFull, and the errors of the iterator.
    """
    path = Path(folder)
    tokenized, chat = kind == DocumentKind.TOKEN_IDS, kind == DocumentKind.CHAT
    with disk_errors(path.parent), DocumentWriter(path, tokenized=tokenized, chat=chat) as writer:
        for document in documents:
            writer.add(document)
            if writer.is_full:
                yield writer.buffered_bytes
                writer.flush()
        yield writer.buffered_bytes
        return writer.finish(corpus_id=corpus_id, origin=origin, create_time=create_time).to_json()


def spec_to_json(spec: CorpusSpec) -> dict[str, Any]:
    """Inverse of `spec_from_json`."""
    return {
        "id": spec.id,
        "format": spec.format,
        "text_column": spec.text_column,
        "text_split": spec.text_split,
        "file_name": spec.file_name,
        "chat": spec.chat,
    }


def spec_from_json(value: dict[str, Any]) -> CorpusSpec:
    """Returns the spec that a child was given."""
    return CorpusSpec(
        **{
            **value,
            "format": CorpusFormat(value["format"]) if value["format"] else None,
            "text_split": TextSplit(value["text_split"]),
        }
    )


def _bounded(documents: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    n_bytes = 0
    for document in documents:
        n_bytes += len(document)
        if n_bytes > max_bytes:
            raise malformed(
                f"The documents take more than {MAX_EXPANSION} times the bytes of their file; write them to several"
                " files, or leave out the copies.",
                limit_bytes=max_bytes,
            )
        yield document
