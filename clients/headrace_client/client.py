"""`HeadraceClient`: one object for the registry and the extractors behind it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from headrace_client.corpora import Corpora
from headrace_client.errors import InvalidArgument
from headrace_client.extractions import Extractions
from headrace_client.extras import needing
from headrace_client.models import Models
from headrace_client.pins import Pins
from headrace_client.reading.columns import default_columns, with_scales
from headrace_client.reading.source import StreamRequest, reader_name
from headrace_client.reading.stream import ChunkStream
from headrace_client.residencies import Residencies
from headrace_client.rpc.addresses import addresses_of
from headrace_client.rpc.convert.extractions import hookpoint_from_pb
from headrace_client.rpc.endpoint import DEADLINE_S, Endpoint
from headrace_client.rpc.nodes import Nodes
from headrace_client.rpc.security import Security
from headrace_client.sets import Sets
from headrace_client.values import (
    DEFAULT_TUNING,
    PLAIN,
    Extraction,
    Hookpoint,
    Listing,
    Node,
    Progress,
    Reading,
    StreamTuning,
)

if TYPE_CHECKING:
    import torch

    from headrace_client.reading.tensors import ActivationStream

DEFAULT_REGISTRY = "127.0.0.1:7470"
_MOST_TOKENS_PER_CALL = 100_000  # The server's limit for one DecodeTokens call.


class HeadraceClient:
    """Registry and extractors. Use as a context manager, or close it; threads may share it.

    with HeadraceClient.connect() as client:
        extraction = client.extractions.start("smollm2", "docs", "blocks.14.hook_resid_post")
        for batch in client.activations(extraction, batch_size=4096):
            ...
    """

    def __init__(self, registry: Endpoint, nodes: Nodes) -> None:
        self._registry = registry
        self._nodes = nodes
        self._streams: weakref.WeakSet[ChunkStream] = weakref.WeakSet()
        self.models = Models(registry)
        self.corpora = Corpora(nodes)
        self.extractions = Extractions(nodes)
        self.residencies = Residencies(registry, nodes)
        self.pins = Pins(registry)
        self.sets = Sets(registry, nodes)

    @classmethod
    def connect(
        cls,
        registry: str | None = None,
        *,
        extractor: str | None = None,
        token: str | None = None,
        ca_file: str | Path | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> Self:
        """Makes a client; connections are opened by the first calls.

        Addresses are `host:port` or `unix:path`. Several addresses of `registry` with commas between are replicas: the
        next one is asked when one does not answer. `extractor` is the address of one extractor; without it the registry
        tells where they are. `ca_file` (PEM, or `system` for the certificates of this machine) turns TLS on, for all
        servers; a `token` does too beyond loopback, since it is never sent in clear. `deadline_s` holds for every call
        that has no deadline of its own. Without a `registry`, `token` or `ca_file` it takes HEADRACE_REGISTRY (or
        127.0.0.1:7470), HEADRACE_TOKEN and HEADRACE_CA_FILE of the environment.
        """
        if registry is None:
            registry = os.environ.get("HEADRACE_REGISTRY") or DEFAULT_REGISTRY
        token = token or os.environ.get("HEADRACE_TOKEN") or None
        ca_file = ca_file or os.environ.get("HEADRACE_CA_FILE") or None
        addresses_of(registry, name="registry")
        if extractor is not None and len(addresses_of(extractor, name="extractor")) > 1:
            raise InvalidArgument("extractor is one address", fields={"extractor": extractor})
        security = Security.load(token, ca_file)

        def dial(address: str) -> Endpoint:
            return Endpoint(address, security, deadline_s=deadline_s)

        first = dial(registry)
        return cls(first, Nodes(registry=first, dial=dial, fixed=extractor))

    def nodes(self) -> Listing[Node]:
        """Lists the nodes with their devices, alive or not."""
        return self._nodes.list()

    def health(self, address: str | None = None, service: str = "") -> str:
        """Asks the health service of the registry, or of the server at `address`: SERVING or not."""
        if address is None:
            return self._registry.health(service)
        probe = Endpoint(address, self._registry.security)
        try:
            return probe.health(service)
        finally:
            probe.close()

    def hookpoints(self, model: str, *, node: str = "") -> Listing[Hookpoint]:
        """Lists the hookpoints of a model, in the order of the forward pass."""
        endpoint = self._nodes.endpoint(self._nodes.pick(node_id=node, model_id=model))
        answer = endpoint.unary("ExtractionService.ListHookpoints", model_id=model)
        return Listing(hookpoint_from_pb(one) for one in answer.hookpoints)

    def decode_tokens(self, model: str, ids: Sequence[int]) -> list[str]:
        """Turns token ids into text, one string per id."""
        endpoint = self._nodes.endpoint(self._nodes.pick(model_id=model))
        texts: list[str] = []
        for at in range(0, len(ids), _MOST_TOKENS_PER_CALL):
            some = [int(token) for token in ids[at : at + _MOST_TOKENS_PER_CALL]]
            texts += endpoint.unary("ExtractionService.DecodeTokens", model_id=model, token_ids=some).texts
        return texts

    def chunks(
        self,
        extraction: Extraction | str,
        columns: str | Sequence[str] | None = None,
        *,
        start_row: int = 0,
        end_row: int = 0,
        reader: str = "",
        reading: Reading = PLAIN,
        tuning: StreamTuning = DEFAULT_TUNING,
    ) -> ChunkStream:
        """Streams rows as numpy views, chunk by chunk; see ChunkStream.

        `columns` None stands for the extraction's hookpoints, `end_row` 0 for all the rows that it will have. Where
        `reading` has an order or a shard, both rows are places in that order. A WINDOW extraction keeps the rows that a
        reader has not released, for a stream with the same `reader`; without a name each stream gets one of its own.
        """
        if reading.mix_blocks or reading.norm_limit is not None:
            raise InvalidArgument(
                "chunks hold rows as they are stored: mix_blocks and norm_limit are for `activations`",
                fields={"reading": "mix_blocks, norm_limit"},
            )
        known = self.extractions.get(extraction) if isinstance(extraction, str) else extraction
        return self._open(
            StreamRequest(
                extraction=known,
                columns=default_columns(known, columns),
                start_row=start_row,
                end_row=end_row,
                reader=reader,
                reading=reading,
                tuning=tuning,
            )
        )

    def activations(
        self,
        extraction: Extraction | str,
        columns: str | Sequence[str] | None = None,
        *,
        batch_size: int = 4096,
        dtype: torch.dtype | None = None,
        start_row: int = 0,
        end_row: int = 0,
        epochs: int | None = 1,
        drop_last: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
        reading: Reading = PLAIN,
        tuning: StreamTuning = DEFAULT_TUNING,
    ) -> ActivationStream:
        """Streams rows as batches of torch tensors; see ActivationStream.

        `columns`, `start_row`, `end_row` are as in `chunks`. `epochs` None stands for endless ones; a shuffled
        `reading` has another order in each epoch.
        """
        with needing("headrace[torch]"):  # Nothing else here needs torch.
            from headrace_client.reading.tensors import ActivationStream, BatchOptions  # noqa: PLC0415

        known = self.extractions.get(extraction) if isinstance(extraction, str) else extraction
        options = BatchOptions(
            columns=default_columns(known, columns),
            batch_size=batch_size,
            dtype=dtype,
            epochs=epochs,
            drop_last=drop_last,
        )
        request = StreamRequest(
            extraction=known,
            columns=with_scales(known, options.columns),
            start_row=start_row,
            end_row=end_row,
            reading=reading,
            tuning=tuning,
        )
        return ActivationStream(self._open, request, options, on_progress)

    def close(self) -> None:
        """Closes all connections. Streams end; reading on raises Cancelled."""
        for stream in tuple(self._streams):  # Each has a connection of its own.
            stream.close()
        self._nodes.close()
        self._registry.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _open(self, request: StreamRequest) -> ChunkStream:
        # A name for each stream: the epochs of one caller are different readers for the server.
        named = request if request.reader else replace(request, reader=reader_name())
        stream = ChunkStream(self.extractions.source(named), named)
        self._streams.add(stream)
        return stream
