"""The extractors: their addresses from the registry, connections to them, and which of them to ask."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from headrace_client.errors import AlreadyExists, HeadraceError, NodeLost, NodeNotFound, NotFound, Unavailable
from headrace_client.rpc.convert.residencies import node_from_pb, residency_from_pb
from headrace_client.rpc.endpoint import Endpoint
from headrace_client.rpc.status import client_closed
from headrace_client.values import Listing, Node, NodeState, Residency, ResidencyState

LOOKUP_DEADLINE_S = 5.0  # Re-resolving an address must not hold up a reconnect for long.
PAGE_SIZE = 1000  # The largest page of the servers.
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractorAddress:
    """An extractor: its node id (empty if the caller gave an address) and its `host:port`."""

    node_id: str
    address: str


@dataclass
class Nodes:
    """Finds extractors. With `fixed`, the address of one, the registry is never asked. Threads may share it."""

    registry: Endpoint
    dial: Callable[[str], Endpoint]
    fixed: str | None = None
    _endpoints: dict[str, Endpoint] = field(default_factory=dict)
    _known: tuple[ExtractorAddress, ...] = ()
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False

    def list(self, *, deadline_s: float | None = None) -> Listing[Node]:
        """All nodes, alive or not."""
        return Listing(pages(self.registry, "ResidencyService.ListNodes", "nodes", node_from_pb, deadline_s=deadline_s))

    def residencies(self, *, model_id: str = "", node_id: str = "", include_ended: bool = False) -> Listing[Residency]:
        """Residencies, the newest first."""
        return Listing(
            pages(
                self.registry,
                "ResidencyService.ListResidencies",
                "residencies",
                residency_from_pb,
                model_id=model_id,
                node_id=node_id,
                include_ended=include_ended,
            )
        )

    @property
    def only(self) -> ExtractorAddress | None:
        """The extractor at the address that the caller gave; None where the registry tells the addresses."""
        return ExtractorAddress(node_id="", address=self.fixed) if self.fixed else None

    def alive(self, *, deadline_s: float | None = None) -> tuple[ExtractorAddress, ...]:
        """Living extractors; the last known ones while the registry is away. Raises NodeLost if there are none."""
        if self.only:
            return (self.only,)
        try:
            nodes = self.list(deadline_s=deadline_s)
        except Unavailable:
            if self._known:
                return self._known
            raise
        extractors = tuple(
            ExtractorAddress(node_id=node.id, address=node.address) for node in nodes if node.state is NodeState.ALIVE
        )
        if not extractors:
            raise NodeLost(f"no extractor is alive; the registry at {self.registry.address} knows {len(nodes)} nodes")
        self._known = extractors  # The registry may be away at the next call.
        return extractors

    def endpoint(self, extractor: ExtractorAddress) -> Endpoint:
        """The connection to an extractor, made once for each address. Raises Cancelled once closed."""
        address = extractor.address
        with self._lock:
            if self._closed:
                raise client_closed()
            if address not in self._endpoints:
                self._endpoints[address] = self.dial(address)
            return self._endpoints[address]

    def pick(self, *, node_id: str = "", model_id: str = "", corpus_id: str = "") -> ExtractorAddress:
        """Picks the extractor for a call.

        In this order: the node named; a node with the corpus and the model resident; a node with the corpus; a node
        with the model resident; the first alive.
        """
        extractors = self.alive()
        if node_id and not self.fixed:
            for extractor in extractors:
                if extractor.node_id == node_id:
                    return extractor
            alive = ", ".join(extractor.node_id for extractor in extractors)
            raise NodeNotFound(f"no node {node_id!r} is alive; alive: {alive}")
        if len(extractors) == 1:
            return extractors[0]
        if corpus_id:
            extractors = self._holders(extractors, corpus_id) or extractors
        if model_id:
            residencies = self.residencies(model_id=model_id)
            resident = {one.node_id for one in residencies if one.state is ResidencyState.RESIDENT}
            extractors = tuple(extractor for extractor in extractors if extractor.node_id in resident) or extractors
        return extractors[0]

    def _holders(self, extractors: Sequence[ExtractorAddress], corpus_id: str) -> tuple[ExtractorAddress, ...]:
        """Returns the extractors that hold a corpus. Raises AlreadyExists if its id names different documents."""
        digests = {}
        for extractor in extractors:
            with suppress(NotFound, Unavailable):
                answer = self.endpoint(extractor).unary("CorpusService.GetCorpus", corpus_id=corpus_id)
                digests[extractor] = answer.corpus.digest
        if len(set(digests.values())) > 1:
            held = ", ".join(f"{extractor.node_id} ({digest[:12]})" for extractor, digest in digests.items())
            raise AlreadyExists(
                f"corpus {corpus_id!r} is not the same on all nodes: {held}; name a node, or remove one of them with "
                f"`headrace corpora rm {corpus_id} --node NODE`",
                reason="ALREADY_EXISTS",
            )
        return tuple(digests)

    def on_each(self, work: Callable[[Endpoint], object], *, node_id: str = "") -> tuple[ExtractorAddress, ...]:
        """Does `work` on one extractor, or on all; returns those that did not answer NotFound.

        Raises NotFound if all did, or else the last error once every extractor was asked.
        """
        done: list[ExtractorAddress] = []
        missing: HeadraceError = NodeLost("no extractor is alive")
        failed: HeadraceError | None = None
        for extractor in (self.pick(node_id=node_id),) if node_id else self.alive():
            try:
                work(self.endpoint(extractor))
                done.append(extractor)
            except NotFound as exc:
                missing = exc
            except HeadraceError as exc:
                failed = exc
        if failed is not None or not done:
            raise failed or missing
        return tuple(done)

    def find(self, probe: Callable[[Endpoint], _T]) -> tuple[ExtractorAddress, _T]:
        """Asks the extractors in turn until one does not answer NotFound; raises the last error if all do."""
        missing: HeadraceError = NodeLost("no extractor is alive")
        unreachable: HeadraceError | None = None
        for extractor in self.alive():
            try:
                return extractor, probe(self.endpoint(extractor))
            except NotFound as exc:
                missing = exc
            except Unavailable as exc:
                unreachable = exc
        # A node that is away may hold the thing: then NotFound would be wrong.
        raise unreachable or missing

    def address_again(self, extractor: ExtractorAddress) -> str:
        """The present address of a node, from the registry; the known address while the registry is away."""
        if self.fixed or not extractor.node_id:
            return extractor.address
        try:
            nodes = self.list(deadline_s=LOOKUP_DEADLINE_S)
        except HeadraceError:
            return extractor.address
        return next((node.address for node in nodes if node.id == extractor.node_id), extractor.address)

    def close(self) -> None:
        """Closes all connections to extractors."""
        with self._lock:
            self._closed = True
            endpoints, self._endpoints = list(self._endpoints.values()), {}
        for endpoint in endpoints:
            endpoint.close()


def pages(
    endpoint: Endpoint,
    method: str,
    field_name: str,
    read: Callable[..., _T],
    *,
    deadline_s: float | None = None,
    **fields: object,
) -> Iterator[_T]:
    """Iterates over all pages of a List method."""
    token = ""
    while True:
        page = endpoint.unary(method, deadline_s=deadline_s, page_size=PAGE_SIZE, page_token=token, **fields)
        yield from (read(item) for item in getattr(page, field_name))
        token = page.next_page_token
        if not token:
            return
