"""Where a stream's rows come from: the extractor's StreamActivations and ReleaseRows."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from headrace_client.errors import FailedPrecondition
from headrace_client.reading.mapped import Unmappable, seems_here
from headrace_client.rpc.endpoint import SILENCE_S
from headrace_client.rpc.nodes import Nodes, Place
from headrace_client.rpc.server_stream import RawStream
from headrace_client.values import PLAIN, Reading, StreamHeader, Transport

RELEASE_DEADLINE_S = 5.0
_MOST_SMALL_CHUNK_BYTES = 3_670_016  # 3.5 MiB: fits gRPC's default limit of 4 MiB.


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """What to ask StreamActivations for; `columns` empty for all, `chunk_bytes` 0 for the server's choice.

    `path` is the set's folder as the server sees it.
    """

    columns: tuple[str, ...] = ()
    end_row: int = 0
    chunk_bytes: int = 0
    reader: str = ""
    explicit_release: bool = False
    silence_s: float = SILENCE_S
    reading: Reading = PLAIN
    transport: Transport = Transport.INLINE
    path: str = ""


@dataclass(kw_only=True)
class StreamSource:
    """Opens a stream's connections, each a socket of its own, so that a hung one is not used again."""

    nodes: Nodes
    place: Place
    extraction_id: str
    request: StreamRequest
    relocate: Callable[[str, Place], Place]
    reader: str = ""
    inline: bool = False

    def open(self, start_row: int, *, again: bool) -> AbstractContextManager[RawStream]:
        """Connects; `again` asks the registry for the node's address first."""
        if again:
            self.place = self.relocate(self.extraction_id, self.place)
        more: dict[str, Any] = self.request.reading.fields()
        if self._maps():
            more["transport"] = "TRANSPORT_MAPPED"
        return self.nodes.endpoint(self.place).raw_stream(
            "ExtractionService.StreamActivations",
            silence_s=self.request.silence_s,
            extraction_id=self.extraction_id,
            start_row=start_row,
            end_row=self.request.end_row,
            columns=list(self.request.columns),
            chunk_bytes=self.request.chunk_bytes,
            allow_large_chunks=self.request.chunk_bytes > _MOST_SMALL_CHUNK_BYTES,
            reader=self.request.reader,
            explicit_release=self.request.explicit_release,
            **more,
        )

    def greeted(self, header: StreamHeader) -> None:
        """Takes the server's name for this reader: another than asked for while it knows an earlier connection."""
        self.reader = header.reader
        if self.request.transport is Transport.MAPPED and not header.mapped:
            raise Unmappable("the server offers no mapped rows of this set")

    def stop_mapping(self, why: Unmappable) -> None:
        """Asks for rows in messages from now on; FailedPrecondition where the caller wants them from files only."""
        self.inline = True
        if self.request.transport is Transport.MAPPED:
            raise FailedPrecondition(
                str(why),
                reason="NOT_MAPPABLE",
                remedy="run where the set's folder is, with the right to read it, or take transport AUTO",
            ) from why

    def _maps(self) -> bool:
        if self.inline or self.request.transport is Transport.INLINE:
            return False
        return self.request.transport is Transport.MAPPED or seems_here(self.request.path)

    def release(self, row: int) -> None:
        """Tells the server that rows before `row` may go."""
        self.nodes.endpoint(self.place).unary(
            "ExtractionService.ReleaseRows",
            deadline_s=RELEASE_DEADLINE_S,
            extraction_id=self.extraction_id,
            reader=self.reader or self.request.reader,
            row=row,
        )


def reader_name() -> str:
    """A name for a reader that tells people whose it is."""
    return f"{socket.gethostname()[:200]}-{os.getpid()}-{secrets.token_hex(4)}"
