"""Where the extractors are: node addresses from the registry, connections to them, and who holds what."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from headrace_client.errors import HeadraceError, NodeLost, NodeNotFound, NotFound, Unavailable
from headrace_client.rpc.convert.residencies import node_from_pb, residency_from_pb
from headrace_client.rpc.endpoint import Endpoint
from headrace_client.rpc.status import client_closed
from headrace_client.values import Node, NodeState, Residency, ResidencyState

LOOKUP_DEADLINE_S = 5.0  # Re-resolving an address must not hold up a reconnect for long.
PAGE_SIZE = 1000
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An extractor: its node id (empty if the caller gave an address) and its address."""

    node_id: str
    address: str


@dataclass
class Nodes:
    """Finds extractors. With `fixed`, the address of one, the registry is never asked. Threads may share it."""

    registry: Endpoint
    dial: Callable[[str], Endpoint]
    fixed: str | None = None
    _endpoints: dict[str, Endpoint] = field(default_factory=dict)
    _known: tuple[Place, ...] = ()
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False

    def list(self, *, deadline_s: float | None = None) -> tuple[Node, ...]:
        """All nodes, alive or not."""
        return tuple(pages(self.registry, "ResidencyService.ListNodes", "nodes", node_from_pb, deadline_s=deadline_s))

    def residencies(
        self, *, model_id: str = "", node_id: str = "", include_ended: bool = False
    ) -> tuple[Residency, ...]:
        """Residencies, the newest first."""
        return tuple(
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
    def only(self) -> Place | None:
        """The one extractor there is to ask, if its address was given."""
        return Place(node_id="", address=self.fixed) if self.fixed else None

    def alive(self, *, deadline_s: float | None = None) -> tuple[Place, ...]:
        """The extractors to be reached now; those last known while the registry is away. None is NodeLost."""
        if self.only:
            return (self.only,)
        try:
            nodes = self.list(deadline_s=deadline_s)
        except Unavailable:
            if self._known:
                return self._known
            raise
        places = tuple(Place(node_id=n.id, address=n.address) for n in nodes if n.state is NodeState.ALIVE)
        if not places:
            raise NodeLost(f"no extractor is alive; the registry at {self.registry.address} knows {len(nodes)} nodes")
        self._known = places
        return places

    def endpoint(self, place: Place) -> Endpoint:
        """The connection to an extractor, made once for each address. Raises Cancelled once closed."""
        with self._lock:
            if self._closed:
                raise client_closed()
            if place.address not in self._endpoints:
                self._endpoints[place.address] = self.dial(place.address)
            return self._endpoints[place.address]

    def pick(self, *, node_id: str = "", model_id: str = "", corpus_id: str = "") -> Place:
        """The node named; else one that holds the corpus, best one where the model is resident too; else the first."""
        places = self.alive()
        if node_id and not self.fixed:
            return self._named(places, node_id)
        if len(places) == 1:
            return places[0]
        if corpus_id:
            places = tuple(place for place in places if self._has_corpus(place, corpus_id)) or places
        if model_id:
            places = self._with_model(places, model_id) or places
        return places[0]

    def find(self, probe: Callable[[Endpoint], _T]) -> tuple[Place, _T]:
        """Asks the extractors in turn until one does not answer NotFound; raises the last error if all do."""
        missing: HeadraceError = NodeLost("no extractor is alive")
        unreachable: HeadraceError | None = None
        for place in self.alive():
            try:
                return place, probe(self.endpoint(place))
            except NotFound as exc:
                missing = exc
            except Unavailable as exc:
                unreachable = exc
        raise unreachable or missing  # With a node away nobody can say that the thing does not exist.

    def address_again(self, place: Place) -> str:
        """The address of a node as the registry knows it now; the known one while the registry is away."""
        if self.fixed or not place.node_id:
            return place.address
        try:
            nodes = self.list(deadline_s=LOOKUP_DEADLINE_S)
        except HeadraceError:
            return place.address
        return next((node.address for node in nodes if node.id == place.node_id), place.address)

    def close(self) -> None:
        """Closes all connections to extractors."""
        with self._lock:
            self._closed = True
            endpoints, self._endpoints = list(self._endpoints.values()), {}
        for endpoint in endpoints:
            endpoint.close()

    def _named(self, places: tuple[Place, ...], node_id: str) -> Place:
        for place in places:
            if place.node_id == node_id:
                return place
        raise NodeNotFound(f"no node {node_id!r} is alive; alive: {', '.join(place.node_id for place in places)}")

    def _has_corpus(self, place: Place, corpus_id: str) -> bool:
        try:
            self.endpoint(place).unary("CorpusService.GetCorpus", corpus_id=corpus_id)
        except (NotFound, Unavailable):
            return False
        return True

    def _with_model(self, places: tuple[Place, ...], model_id: str) -> tuple[Place, ...]:
        resident = {one.node_id for one in self.residencies(model_id=model_id) if one.state is ResidencyState.RESIDENT}
        return tuple(place for place in places if place.node_id in resident)


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
