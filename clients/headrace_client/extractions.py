"""`client.extractions`: jobs that append rows to activation sets, and the streams that read them."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from headrace_client._convert.extractions import (
    estimate_from_pb,
    extraction_event_from_pb,
    extraction_from_pb,
    spec_to_pb,
)
from headrace_client._mapped import Unmappable, seems_here
from headrace_client._nodes import Nodes, Place, pages
from headrace_client._transport import SILENCE_S, STREAM_LIFE_S, Endpoint, RawStream, ServerStream, new_request_id
from headrace_client._watch import watch
from headrace_client.errors import (
    BY_REASON,
    DeadlineExceeded,
    ExtractionCancelled,
    FailedPrecondition,
    HeadraceError,
)
from headrace_client.order import PLAIN, Reading, Transport
from headrace_client.values import (
    PROVENANCE_COLUMNS,
    Dtype,
    Estimate,
    Extraction,
    ExtractionEvent,
    ExtractionState,
    Recipe,
    Retain,
    Retention,
    StreamHeader,
)

ESTIMATE_DEADLINE_S = 300.0  # Counting rows reads the whole corpus.
RELEASE_DEADLINE_S = 5.0
_MOST_SMALL_CHUNK_BYTES = 3_670_016  # 3.5 MiB: fits gRPC's default limit of 4 MiB.


class Extractions:
    """Extractions on the extractors."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._places: dict[str, Place] = {}

    def estimate(
        self,
        model: str,
        corpus: str,
        hookpoints: str | Sequence[str],
        *,
        recipe: Recipe | None = None,
        retention: Retention | None = None,
        max_rows: int = 0,
        node: str = "",
        deadline_s: float = ESTIMATE_DEADLINE_S,
    ) -> Estimate:
        """Counts rows, bytes and seconds before any work."""
        spec = _spec(model, corpus, hookpoints, recipe, retention, max_rows=max_rows, allow_non_finite=False)
        place = self._nodes.pick(node_id=node, model_id=model, corpus_id=corpus)
        endpoint = self._nodes.endpoint(place)
        return estimate_from_pb(
            endpoint.unary("ExtractionService.EstimateExtraction", deadline_s=deadline_s, spec=spec)
        )

    def start(
        self,
        model: str,
        corpus: str,
        hookpoints: str | Sequence[str],
        *,
        recipe: Recipe | None = None,
        retention: Retention | None = None,
        max_rows: int = 0,
        allow_non_finite: bool = False,
        node: str = "",
    ) -> Extraction:
        """Starts an extraction, or answers with one that covers it. Rows that exist are never computed again."""
        spec = _spec(model, corpus, hookpoints, recipe, retention, max_rows=max_rows, allow_non_finite=allow_non_finite)
        place = self._nodes.pick(node_id=node, model_id=model, corpus_id=corpus)
        answer = self._nodes.endpoint(place).unary(
            "ExtractionService.StartExtraction", request_id=new_request_id(), spec=spec
        )
        extraction = extraction_from_pb(answer.extraction)
        self._places[extraction.id] = place
        return extraction

    def get(self, extraction_id: str) -> Extraction:
        """Reads one extraction."""
        return self._located(extraction_id)[1]

    def list(self, *, node: str = "") -> Iterator[Extraction]:
        """Iterates over the extractions of one node, or of all that are alive, node by node, the newest first."""
        places = (self._nodes.pick(node_id=node),) if node else self._nodes.alive()
        for place in places:
            endpoint = self._nodes.endpoint(place)
            yield from pages(endpoint, "ExtractionService.ListExtractions", "extractions", extraction_from_pb)

    def cancel(self, extraction_id: str) -> Extraction:
        """Stops an extraction; rows so far stay."""
        place, _ = self._located(extraction_id)
        answer = self._nodes.endpoint(place).unary(
            "ExtractionService.CancelExtraction", request_id=new_request_id(), extraction_id=extraction_id
        )
        return extraction_from_pb(answer.extraction)

    def watch(
        self, extraction_id: str, *, after_seq: int = 0, deadline_s: float | None = None
    ) -> Iterator[ExtractionEvent]:
        """Yields progress, a snapshot first, until the extraction has ended; reconnects behind the last event seen."""
        place, _ = self._located(extraction_id)
        tries = 0

        def connect(seq: int, life_s: float | None) -> ServerStream:
            nonlocal place, tries
            if tries:
                place = self._again(extraction_id, place)
            tries += 1
            return self._nodes.endpoint(place).stream(
                "ExtractionService.WatchExtraction",
                life_s=life_s or STREAM_LIFE_S,
                extraction_id=extraction_id,
                after_seq=seq,
            )

        return watch(connect, extraction_event_from_pb, after_seq=after_seq, deadline_s=deadline_s)

    def wait(
        self,
        extraction_id: str,
        on_progress: Callable[[Extraction], None] | None = None,
        deadline_s: float | None = None,
    ) -> Extraction:
        """Waits until it is DONE. Raises its failure's error class, ExtractionCancelled or DeadlineExceeded."""
        for event in self.watch(extraction_id, deadline_s=deadline_s):
            if on_progress is not None:
                on_progress(event.extraction)
            if event.extraction.ended:
                return _done(event.extraction)
        return _done(self.get(extraction_id))

    def source(self, extraction_id: str, request: StreamRequest) -> StreamSource:
        """Where a stream of this extraction's rows comes from."""
        # Where it is known to be, without asking: if that server is away just now, the stream waits for it.
        place = self._places.get(extraction_id) or self._nodes.only or self._located(extraction_id)[0]
        return StreamSource(
            nodes=self._nodes, place=place, request=request, extraction_id=extraction_id, relocate=self._again
        )

    def _located(self, extraction_id: str) -> tuple[Place, Extraction]:
        def probe(endpoint: Endpoint) -> Extraction:
            answer = endpoint.unary("ExtractionService.GetExtraction", extraction_id=extraction_id)
            return extraction_from_pb(answer.extraction)

        place = self._places.get(extraction_id)
        if place is not None:
            try:
                return place, probe(self._nodes.endpoint(place))
            except HeadraceError:
                self._places.pop(extraction_id, None)  # It may have moved: ask everybody.
        place, extraction = self._nodes.find(probe)
        self._places[extraction_id] = place
        return place, extraction

    def _again(self, extraction_id: str, place: Place) -> Place:
        """The extraction's node, at the address it has now."""
        now = Place(node_id=place.node_id, address=self._nodes.address_again(place))
        self._places[extraction_id] = now
        return now


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


def default_columns(extraction: Extraction, columns: str | Sequence[str] | None) -> tuple[str, ...]:
    """The columns asked for; all the extraction's hookpoints for None."""
    if columns is None:
        return extraction.hookpoints
    return (columns,) if isinstance(columns, str) else tuple(columns)


def all_columns(extraction: Extraction) -> tuple[str, ...]:
    """Provenance and hookpoints."""
    return (*PROVENANCE_COLUMNS, *extraction.hookpoints)


def with_scales(extraction: Extraction, columns: Sequence[str]) -> tuple[str, ...]:
    """`columns`, and those that the values of 8-bit ones are to be multiplied by."""
    if extraction.recipe.storage_dtype not in (Dtype.FLOAT8_E4M3, Dtype.INT8):
        return tuple(columns)
    scales = (f"{name}.scale" for name in columns if name in extraction.hookpoints)
    return tuple(dict.fromkeys((*columns, *scales)))


def _spec(
    model: str,
    corpus: str,
    hookpoints: str | Sequence[str],
    recipe: Recipe | None,
    retention: Retention | None,
    *,
    max_rows: int,
    allow_non_finite: bool,
) -> object:
    return spec_to_pb(
        model_id=model,
        corpus_id=corpus,
        hookpoints=(hookpoints,) if isinstance(hookpoints, str) else hookpoints,
        recipe=recipe or Recipe(),
        retention=retention or Retain(),
        max_rows=max_rows,
        allow_non_finite=allow_non_finite,
    )


def _done(extraction: Extraction) -> Extraction:
    """Returns it if it is DONE, raises otherwise."""
    if extraction.state is ExtractionState.DONE:
        return extraction
    if extraction.state is ExtractionState.CANCELLED:
        raise ExtractionCancelled(f"extraction {extraction.id} was cancelled at row {extraction.n_rows}")
    if extraction.failure is not None:
        failure = extraction.failure
        kind = BY_REASON.get(failure.reason, HeadraceError)
        raise kind(failure.message, reason=failure.reason, metadata=failure.metadata)
    raise DeadlineExceeded(f"the watch of extraction {extraction.id} ended while it was {extraction.state}")
