"""`HeadraceClient`: one object for the registry and the extractors behind it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from headrace_client.corpora import Corpora
from headrace_client.errors import InvalidArgument
from headrace_client.extractions import Extractions
from headrace_client.models import Models
from headrace_client.pins import Pins
from headrace_client.reading.columns import default_columns, with_scales
from headrace_client.reading.prefetch import StreamOptions
from headrace_client.reading.source import StreamRequest, reader_name
from headrace_client.reading.stream import ChunkStream
from headrace_client.residencies import Residencies
from headrace_client.rpc.convert.extractions import hookpoint_from_pb
from headrace_client.rpc.endpoint import DEADLINE_S, SILENCE_S, Endpoint, Security
from headrace_client.rpc.nodes import Nodes
from headrace_client.rpc.watch import Backoff
from headrace_client.sets import Sets
from headrace_client.values import (
    Extraction,
    Hookpoint,
    Node,
    NormLimit,
    Progress,
    Reading,
    ReadOrder,
    Transport,
    Window,
    choice,
)

if TYPE_CHECKING:
    import torch

    from headrace_client.reading.tensors import ActivationStream

_QUEUE_BYTES = 64 * 1024 * 1024
_DECODE_AT_ONCE = 100_000  # The server's limit for one DecodeTokens call.


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
        self.sets = Sets(registry)

    @classmethod
    def connect(
        cls,
        registry: str = "127.0.0.1:7470",
        *,
        extractor: str | None = None,
        token: str | None = None,
        ca_file: str | Path | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> Self:
        """Makes a client; connections are opened by the first calls.

        `extractor` is the address of one extractor; without it the registry tells where they are. `ca_file` (PEM)
        turns TLS on, for all servers. `deadline_s` holds for every call that has no deadline of its own.
        """
        for name, address in (("registry", registry), ("extractor", extractor)):
            if address is not None and not _is_address(address):
                raise InvalidArgument(f"{name} is host:port, not {address!r}", fields={name: address})
        security = Security.load(token, ca_file)

        def dial(address: str) -> Endpoint:
            return Endpoint(address, security, deadline_s=deadline_s)

        first = dial(registry)
        return cls(first, Nodes(registry=first, dial=dial, fixed=extractor))

    def nodes(self) -> tuple[Node, ...]:
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

    def hookpoints(self, model: str, *, node: str = "") -> tuple[Hookpoint, ...]:
        """Lists the hookpoints of a model, in the order of the forward pass."""
        endpoint = self._nodes.endpoint(self._nodes.pick(node_id=node, model_id=model))
        answer = endpoint.unary("ExtractionService.ListHookpoints", model_id=model)
        return tuple(hookpoint_from_pb(one) for one in answer.hookpoints)

    def decode_tokens(self, model: str, ids: Sequence[int]) -> list[str]:
        """Turns token ids into text, one string per id."""
        endpoint = self._nodes.endpoint(self._nodes.pick(model_id=model))
        texts: list[str] = []
        for at in range(0, len(ids), _DECODE_AT_ONCE):
            some = [int(token) for token in ids[at : at + _DECODE_AT_ONCE]]
            texts += endpoint.unary("ExtractionService.DecodeTokens", model_id=model, token_ids=some).texts
        return texts

    def chunks(
        self,
        extraction: Extraction | str,
        columns: str | Sequence[str] | None = None,
        *,
        start_row: int = 0,
        end_row: int = 0,
        chunk_bytes: int = 0,
        queue_bytes: int = _QUEUE_BYTES,
        silence_s: float = SILENCE_S,
        reconnect_deadline_s: float = 120.0,
        backoff: Backoff | None = None,
        reader: str = "",
        order: ReadOrder | str = ReadOrder.SEQUENTIAL,
        seed: int = 0,
        epoch: int = 0,
        shard: tuple[int, int] = (0, 1),
        block_rows: int = 0,
        transport: Transport | str = Transport.AUTO,
    ) -> ChunkStream:
        """Streams rows as numpy views, chunk by chunk; see ChunkStream.

        `columns` None: the extraction's hookpoints. `end_row` 0: all the extraction will have. `queue_bytes` bounds
        what is read ahead. A server that says nothing for `silence_s` is given up and connected again. For `order`,
        `seed`, `epoch`, `shard` and `block_rows` see Reading: with them, rows are counted in places of that order.
        """
        reading = Reading(
            order=choice(ReadOrder, str(order), "order"),
            seed=seed,
            epoch=epoch,
            shard=shard,
            block_rows=block_rows,
        )
        known = self.extractions.get(extraction) if isinstance(extraction, str) else extraction
        _check_rows(start_row, end_row)
        window = isinstance(known.retention, Window)
        request = StreamRequest(
            columns=default_columns(known, columns),
            end_row=end_row,
            chunk_bytes=chunk_bytes,
            reader=reader or reader_name(),
            explicit_release=window,
            silence_s=silence_s,
            reading=reading,
            transport=choice(Transport, str(transport), "transport"),
            path=known.path,
        )
        options = StreamOptions(
            start_row=start_row,
            end_row=end_row,
            reading=reading,
            queue_bytes=queue_bytes,
            explicit_release=window,
            reconnect_deadline_s=reconnect_deadline_s,
            backoff=backoff or Backoff(),
        )
        stream = ChunkStream(self.extractions.source(known.id, request), options)
        self._streams.add(stream)
        return stream

    def activations(
        self,
        extraction: Extraction | str,
        *,
        batch_size: int = 4096,
        columns: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        start_row: int = 0,
        end_row: int = 0,
        epochs: int | None = 1,
        drop_last: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
        chunk_bytes: int = 0,
        queue_bytes: int = _QUEUE_BYTES,
        silence_s: float = SILENCE_S,
        reconnect_deadline_s: float = 120.0,
        order: ReadOrder | str = ReadOrder.SEQUENTIAL,
        seed: int = 0,
        first_epoch: int = 0,
        shard: tuple[int, int] = (0, 1),
        block_rows: int = 0,
        mix_blocks: int = 0,
        norm_limit: NormLimit | None = None,
        copy: bool = True,
        transport: Transport | str = Transport.AUTO,
    ) -> ActivationStream:
        """Streams rows as batches of torch tensors; see ActivationStream. `epochs` None: for ever.

        Shuffled rows (`order`) come in another order in each epoch, from that of `first_epoch` on. For data-parallel
        ranks, `shard` is (rank, world).
        """
        from headrace_client.reading.tensors import (  # noqa: PLC0415 - torch, for those who ask for tensors.
            ActivationStream,
            BatchOptions,
        )

        known = self.extractions.get(extraction) if isinstance(extraction, str) else extraction
        _check_rows(start_row, end_row)
        options = BatchOptions(
            columns=default_columns(known, columns),
            batch_size=batch_size,
            dtype=dtype,
            start_row=start_row,
            epochs=epochs,
            drop_last=drop_last,
            reading=Reading(
                order=choice(ReadOrder, str(order), "order"),
                seed=seed,
                epoch=first_epoch,
                shard=shard,
                block_rows=block_rows,
            ),
            mix_blocks=mix_blocks,
            norm_limit=norm_limit,
            copy=copy,
        )

        def open_at(row: int, reading: Reading) -> ChunkStream:
            return self.chunks(
                known,
                with_scales(known, options.columns),
                start_row=row,
                end_row=end_row,
                chunk_bytes=chunk_bytes,
                queue_bytes=queue_bytes,
                silence_s=silence_s,
                reconnect_deadline_s=reconnect_deadline_s,
                order=reading.order,
                seed=reading.seed,
                epoch=reading.epoch,
                shard=reading.shard,
                block_rows=reading.block_rows,
                transport=transport,
            )

        return ActivationStream(open_at, known, options, on_progress)

    def close(self) -> None:
        """Closes all connections. Streams end; who reads on gets Cancelled."""
        for stream in tuple(self._streams):  # Each has a connection of its own.
            stream.close()
        self._nodes.close()
        self._registry.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdigit() and int(port) <= 65535


def _check_rows(start_row: int, end_row: int) -> None:
    if start_row < 0 or end_row < 0 or (end_row and end_row < start_row):
        raise InvalidArgument(
            f"rows {start_row} to {end_row} are no range: start_row is at least 0, end_row 0 or at least start_row",
            fields={"start_row": str(start_row), "end_row": str(end_row)},
        )
