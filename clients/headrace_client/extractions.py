"""`client.extractions`: jobs that append rows to activation sets, and the streams that read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from headrace_client.errors import BY_REASON, DeadlineExceeded, ExtractionCancelled, HeadraceError
from headrace_client.progress import of_extraction, told
from headrace_client.reading.source import StreamRequest, StreamSource
from headrace_client.rpc.convert.extractions import (
    estimate_from_pb,
    extraction_event_from_pb,
    extraction_from_pb,
    spec_to_pb,
)
from headrace_client.rpc.endpoint import STREAM_LIFE_S, Endpoint, new_request_id
from headrace_client.rpc.nodes import ExtractorAddress, Nodes, pages
from headrace_client.rpc.server_stream import ServerStream
from headrace_client.rpc.watch import watch
from headrace_client.values import (
    Estimate,
    Extraction,
    ExtractionEvent,
    ExtractionState,
    Listing,
    Recipe,
    Retain,
    Retention,
)

ESTIMATE_DEADLINE_S = 300.0  # Counting rows reads the whole corpus.


class Extractions:
    """Extractions on the extractors."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._extractors: dict[str, ExtractorAddress] = {}  # By extraction, as they were last found.

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
        extractor = self._nodes.pick(node_id=node, model_id=model, corpus_id=corpus)
        answer = self._nodes.endpoint(extractor).unary(
            "ExtractionService.EstimateExtraction", deadline_s=deadline_s, spec=spec
        )
        return estimate_from_pb(answer)

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
        """Starts an extraction, or returns one that covers it. Rows that exist are never computed again."""
        spec = _spec(model, corpus, hookpoints, recipe, retention, max_rows=max_rows, allow_non_finite=allow_non_finite)
        extractor = self._nodes.pick(node_id=node, model_id=model, corpus_id=corpus)
        answer = self._nodes.endpoint(extractor).unary(
            "ExtractionService.StartExtraction", request_id=new_request_id(), spec=spec
        )
        extraction = extraction_from_pb(answer.extraction, node_id=extractor.node_id)
        self._extractors[extraction.id] = extractor
        return extraction

    def get(self, extraction_id: str) -> Extraction:
        """Reads one extraction."""
        return self._located(extraction_id)[1]

    def list(self, *, node: str = "") -> Listing[Extraction]:
        """Lists the extractions of one node, or of all living nodes, node by node, the newest first."""
        found: Listing[Extraction] = Listing()
        for extractor in (self._nodes.pick(node_id=node),) if node else self._nodes.alive():
            endpoint = self._nodes.endpoint(extractor)
            read = partial(extraction_from_pb, node_id=extractor.node_id)
            found += pages(endpoint, "ExtractionService.ListExtractions", "extractions", read)
        return found

    def cancel(self, extraction_id: str) -> Extraction:
        """Stops an extraction; rows so far stay."""
        extractor, _ = self._located(extraction_id)
        answer = self._nodes.endpoint(extractor).unary(
            "ExtractionService.CancelExtraction", request_id=new_request_id(), extraction_id=extraction_id
        )
        return extraction_from_pb(answer.extraction, node_id=extractor.node_id)

    def watch(
        self, extraction_id: str, *, after_seq: int = 0, deadline_s: float | None = None
    ) -> Iterator[ExtractionEvent]:
        """Yields progress, a snapshot first, until the extraction has ended; reconnects behind the last event seen."""
        extractor, _ = self._located(extraction_id)
        tries = 0

        def connect(seq: int, life_s: float | None) -> ServerStream:
            nonlocal extractor, tries
            if tries:
                extractor = self._relocated(extraction_id, extractor)
            tries += 1
            return self._nodes.endpoint(extractor).stream(
                "ExtractionService.WatchExtraction",
                life_s=life_s or STREAM_LIFE_S,
                extraction_id=extraction_id,
                after_seq=seq,
            )

        read = partial(extraction_event_from_pb, node_id=extractor.node_id)
        return watch(connect, read, after_seq=after_seq, deadline_s=deadline_s)

    def wait(
        self,
        extraction_id: str,
        on_progress: Callable[[Extraction], None] | None = None,
        deadline_s: float | None = None,
        *,
        progress: bool = False,
    ) -> Extraction:
        """Waits until it is DONE, with `progress` under a bar, which needs headrace[progress].

        Raises its failure's error class, ExtractionCancelled or DeadlineExceeded.
        """
        with told(extraction_id, on_progress, progress=progress, measure=of_extraction) as tell:
            for event in self.watch(extraction_id, deadline_s=deadline_s):
                tell(event.extraction)
                if event.extraction.ended:
                    return _done(event.extraction)
        return _done(self.get(extraction_id))

    def source(self, request: StreamRequest) -> StreamSource:
        """Makes the source of a stream of rows, on the extraction's node."""
        extraction_id = request.extraction.id
        # A known address is taken without asking: if that server is away just now, the stream waits for it.
        extractor = self._extractors.get(extraction_id) or self._nodes.only or self._located(extraction_id)[0]
        return StreamSource(nodes=self._nodes, extractor=extractor, request=request, relocate=self._relocated)

    def _located(self, extraction_id: str) -> tuple[ExtractorAddress, Extraction]:
        def probe(endpoint: Endpoint) -> Any:
            return endpoint.unary("ExtractionService.GetExtraction", extraction_id=extraction_id).extraction

        # A wrong argument, such as an Extraction, need not have a hash: it is refused as it is put on the wire.
        extractor = self._extractors.get(extraction_id) if isinstance(extraction_id, str) else None
        if extractor is not None:
            try:
                found = probe(self._nodes.endpoint(extractor))
                return extractor, extraction_from_pb(found, node_id=extractor.node_id)
            except HeadraceError:
                self._extractors.pop(extraction_id, None)  # It may have moved: ask all extractors.
        extractor, found = self._nodes.find(probe)
        self._extractors[extraction_id] = extractor
        return extractor, extraction_from_pb(found, node_id=extractor.node_id)

    def _relocated(self, extraction_id: str, extractor: ExtractorAddress) -> ExtractorAddress:
        """The extraction's node at its present address."""
        now = ExtractorAddress(node_id=extractor.node_id, address=self._nodes.address_again(extractor))
        self._extractors[extraction_id] = now
        return now


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
    """Returns an extraction that is DONE, raises otherwise."""
    if extraction.state is ExtractionState.DONE:
        return extraction
    if extraction.state is ExtractionState.CANCELLED:
        raise ExtractionCancelled(f"extraction {extraction.id} was cancelled at row {extraction.n_rows}")
    if extraction.failure is not None:
        failure = extraction.failure
        kind = BY_REASON.get(failure.reason, HeadraceError)
        raise kind(failure.message, reason=failure.reason, metadata=failure.metadata)
    raise DeadlineExceeded(f"the watch of extraction {extraction.id} ended while it was {extraction.state}")
