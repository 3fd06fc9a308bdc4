"""Where a stream's rows come from: StreamActivations and ReleaseRows of the extractor."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from headrace_client.errors import FailedPrecondition, InvalidArgument
from headrace_client.reading.mapped import Unmappable, seems_here
from headrace_client.rpc.nodes import ExtractorAddress, Nodes
from headrace_client.rpc.server_stream import RawStream
from headrace_client.values import (
    DEFAULT_TUNING,
    PLAIN,
    Extraction,
    Reading,
    StreamHeader,
    StreamTuning,
    Transport,
    Window,
)

RELEASE_DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """Which rows of an extraction a stream brings, and how.

    `columns` empty stands for all. `start_row` is inclusive, `end_row` exclusive with 0 for all; both are places in the
    order of `reading`. `reader` is the name under which the server keeps rows of a WINDOW set.
    """

    extraction: Extraction
    columns: tuple[str, ...] = ()
    start_row: int = 0
    end_row: int = 0
    reader: str = ""
    reading: Reading = PLAIN
    tuning: StreamTuning = DEFAULT_TUNING

    def __post_init__(self) -> None:
        start_row, end_row = self.start_row, self.end_row
        if start_row < 0 or end_row < 0 or (end_row and end_row < start_row):
            raise InvalidArgument(
                f"rows {start_row} to {end_row} are no range: start_row is at least 0, end_row 0 or at least start_row",
                fields={"start_row": str(start_row), "end_row": str(end_row)},
            )

    @property
    def explicit_release(self) -> bool:
        """True for a WINDOW set: its rows are kept until this reader releases them."""
        return isinstance(self.extraction.retention, Window)


@dataclass(kw_only=True)
class StreamSource:
    """Opens a stream's connections, each a socket of its own, so that a hung one is not used again."""

    nodes: Nodes
    extractor: ExtractorAddress
    request: StreamRequest
    relocate: Callable[[str, ExtractorAddress], ExtractorAddress]
    reader: str = ""
    inline: bool = False

    def open(self, start_row: int, *, again: bool) -> AbstractContextManager[RawStream]:
        """Connects; `again` asks the registry for the node's address first."""
        request, tuning = self.request, self.request.tuning
        if again:
            self.extractor = self.relocate(request.extraction.id, self.extractor)
        more: dict[str, Any] = request.reading.fields()
        way = tuning.transport
        if not self.inline and (
            way is Transport.MAPPED or (way is Transport.AUTO and seems_here(request.extraction.path))
        ):
            more["transport"] = "TRANSPORT_MAPPED"
        return self.nodes.endpoint(self.extractor).raw_stream(
            "ExtractionService.StreamActivations",
            silence_s=tuning.silence_s,
            extraction_id=request.extraction.id,
            start_row=start_row,
            end_row=request.end_row,
            columns=list(request.columns),
            chunk_bytes=tuning.chunk_bytes,
            allow_large_chunks=True,  # A single row may be larger than gRPC's default limit of 4 MiB.
            reader=request.reader,
            explicit_release=request.explicit_release,
            **more,
        )

    def greeted(self, header: StreamHeader) -> None:
        """Takes the server's name for this reader: another one than asked for while it knows an earlier connection."""
        self.reader = header.reader
        if self.request.tuning.transport is Transport.MAPPED and not header.mapped:
            raise Unmappable("the server offers no mapped rows of this set")

    def stop_mapping(self, why: Unmappable) -> None:
        """Asks for rows in messages from now on; FailedPrecondition where the caller wants them from files only."""
        self.inline = True
        if self.request.tuning.transport is Transport.MAPPED:
            raise FailedPrecondition(
                str(why),
                reason="NOT_MAPPABLE",
                remedy="run where the set's folder is, with the right to read it, or take transport AUTO",
            ) from why

    def release(self, row: int) -> None:
        """Tells the server that rows before `row` may go."""
        self.nodes.endpoint(self.extractor).unary(
            "ExtractionService.ReleaseRows",
            deadline_s=RELEASE_DEADLINE_S,
            extraction_id=self.request.extraction.id,
            reader=self.reader or self.request.reader,
            row=row,
        )


def reader_name() -> str:
    """A name for a reader, by which people find its host and process."""
    return f"{socket.gethostname()[:200]}-{os.getpid()}-{secrets.token_hex(4)}"
