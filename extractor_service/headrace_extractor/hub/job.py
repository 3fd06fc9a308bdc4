"""The protocol between the server and the child process that reads a dataset.

The job is one line of JSON on the child's standard input, which stays open: its end means that the server is gone. The
answer is frames on standard output: a byte for the kind of frame, a length, the content.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from headrace_extractor.corpora.files.contents import MAX_DOCUMENT_BYTES
from headrace_extractor.errors import FieldInvalid

RESOLVED, DOCUMENT, WAITING, DONE, FAILED = b"R", b"D", b"W", b"E", b"F"
MAX_NAME = 255
_HEADER = struct.Struct("<cQ")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MAX_FRAME_BYTES = MAX_DOCUMENT_BYTES + 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HubJob:
    """A checked order to read a dataset; raises FieldInvalid naming `hub.<field>`."""

    repo_id: str
    revision: str = ""
    config: str = ""
    split: str = ""
    column: str = "text"
    kind: str = "text"  # a DocumentKind
    max_documents: int = 0
    token: str = field(default="", repr=False)
    backoff_s: float = 2.0

    def __post_init__(self) -> None:
        if not _REPO_ID.fullmatch(self.repo_id) or ".." in self.repo_id or len(self.repo_id) > MAX_NAME:
            raise FieldInvalid(f"hub.repo_id is {self.repo_id[:MAX_NAME]!r}; write owner/name.", field="hub.repo_id")
        if self.max_documents < 0:
            raise FieldInvalid("hub.max_documents is negative; 0 means all.", field="hub.max_documents")
        for name in ("revision", "config", "split"):
            value = getattr(self, name)
            if len(value) > MAX_NAME or not value.isprintable():
                raise FieldInvalid(
                    f"hub.{name} must have at most {MAX_NAME} printable characters.", field=f"hub.{name}"
                )

    def origin(self, commit_sha: str) -> str:
        """Describes the documents for people; equal texts mean equal documents."""
        parts = [f"hub:{self.repo_id}@{commit_sha}", self.config, self.split, self.column]
        first = [f"first {self.max_documents}"] if self.max_documents else []
        return " ".join([*(part for part in parts if part), *first])

    def line(self) -> bytes:
        """Returns the job as one JSON line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> HubJob:
        """Inverse of `line`."""
        return cls(**json.loads(line))


def frame(kind: bytes, content: bytes = b"") -> bytes:
    """Returns a frame."""
    return _HEADER.pack(kind, len(content)) + content


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Takes further bytes and yields the frames completed by them; raises ValueError for an oversized frame."""
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= _HEADER.size:
            kind, size = _HEADER.unpack_from(self._buffer, at)
            if size > _MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {size} bytes")
            if len(self._buffer) - at - _HEADER.size < size:
                break
            at += _HEADER.size
            yield kind, bytes(self._buffer[at : at + size])
            at += size
        del self._buffer[:at]
