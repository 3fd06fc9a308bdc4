"""Forward passes over token batches, and their rows on the host.

`position_ids` are passed and, for most models, no attention mask. transformers then takes a step other than +1 between
neighbouring position ids of a sequence for the start of a document and masks attention across it, in every sequence of
the batch on its own; if no sequence has such a step, attention is plain causal (`isolation.py` has the models that need
more). The packer numbers positions anew in each piece of a document, or through the whole sequence when documents may
attend to one another, so its `position_ids` decide.
"""

# ruff: noqa: N806 -- capital suffixes are shapes
# B sequences · S tokens in a sequence · T = B*S tokens of a batch · R kept rows · D model width

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headrace_extractor.corpora.packing import TokenBatch
from headrace_extractor.runner.hooks.binding import documents_isolated
from headrace_extractor.runner.hooks.capture import Site, capture
from headrace_extractor.runner.passes.quantized_rows import quantize_rows
from headrace_log.layout import scale_column

# The device fills one while the other is written to the log.
_STAGING_BUFFERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRows:
    """A batch with its activations on the host, by column name; `index` picks the kept tokens, None means all rows."""

    batch: TokenBatch
    activations: dict[str, Tensor]
    index: Tensor | None


class Fetch(Protocol):
    """Brings activations to the host."""

    def rows(self, passes: Iterable[tuple[TokenBatch, dict[str, Tensor]]]) -> Iterator[BatchRows]:
        """Yields the batches of `passes` in order, on the host; rows are valid until the next batch is asked for."""


@torch.inference_mode()
def forward_rows(model: PreTrainedModel, batch: TokenBatch, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Runs the model over a batch as far as the deepest site; returns `[T, D]` a site, on the model's device."""
    token_ids_BS = torch.from_numpy(batch.token_ids).to(model.device, torch.int64)
    position_ids_BS = torch.from_numpy(batch.position_ids).to(model.device, torch.int64)
    with capture(sites) as captured, documents_isolated(model, position_ids_BS) as arguments:
        model(input_ids=token_ids_BS, use_cache=False, **arguments)
    n_tokens = token_ids_BS.numel()
    return {name: acts.reshape(n_tokens, -1) for name, acts in captured.items()}


def fetch_for(device: torch.device, dtypes: Mapping[str, torch.dtype]) -> Fetch:
    """Chooses how rows come to the host; `dtypes` are the log's, by column."""
    return StagedFetch(device, dtypes) if device.type == "cuda" else DirectFetch()


class DirectFetch:
    """For devices that share the host's memory, or copy synchronously."""

    def rows(self, passes: Iterable[tuple[TokenBatch, dict[str, Tensor]]]) -> Iterator[BatchRows]:
        """Yields each batch as soon as it is computed; nothing is copied on a CPU."""
        for batch, acts in passes:
            yield BatchRows(batch=batch, activations={name: a.cpu() for name, a in acts.items()}, index=_kept(batch))


class StagedFetch:
    """For CUDA: copies kept rows into two pinned buffers, in turns, on a stream of its own.

    Rows of a batch are handed out once the next forward pass has been launched, so copying and writing one batch
    overlaps with the computation of the next.
    """

    def __init__(self, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> None:
        self._dtypes = dtypes
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[dict[str, Tensor]] = [{} for _ in range(_STAGING_BUFFERS)]

    def rows(self, passes: Iterable[tuple[TokenBatch, dict[str, Tensor]]]) -> Iterator[BatchRows]:
        """Yields one batch behind the computation."""
        under_way: tuple[BatchRows, torch.cuda.Event] | None = None
        for number, (batch, acts) in enumerate(passes):
            started = self._start(batch, acts, self._buffers[number % _STAGING_BUFFERS])
            if under_way:
                yield _arrived(*under_way)
            under_way = started
        if under_way:
            yield _arrived(*under_way)

    def _start(
        self, batch: TokenBatch, acts: dict[str, Tensor], buffer: dict[str, Tensor]
    ) -> tuple[BatchRows, torch.cuda.Event]:
        """Starts the copy of a batch into pinned memory; the event tells when it is over."""
        index = _kept(batch)
        on_device = None if index is None else index.to(self._device, non_blocking=True)
        rows_RD: dict[str, Tensor] = {}  # In the log's dtype, with their scales if that has 8 bits.
        for name, acts_TD in acts.items():
            kept_RD = acts_TD if on_device is None else acts_TD.index_select(0, on_device)
            dtype = self._dtypes[name]
            if dtype.itemsize > 1:
                rows_RD[name] = kept_RD.to(dtype)
            else:
                rows_RD[name], rows_RD[scale_column(name)] = quantize_rows(kept_RD, dtype)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        on_host: dict[str, Tensor] = {}
        with torch.cuda.stream(self._stream):
            for name, acts_RD in rows_RD.items():
                n_rows = acts_RD.shape[0]
                # Pinning memory is slow: the buffer of a column is kept, and grows to the largest batch.
                if name not in buffer or buffer[name].shape[0] < n_rows:
                    buffer[name] = torch.empty(acts_RD.shape, dtype=acts_RD.dtype, pin_memory=True)
                on_host[name] = buffer[name][:n_rows].copy_(acts_RD, non_blocking=True)
                acts_RD.record_stream(self._stream)  # Its memory must not be reused before the copy is over.
            event = self._stream.record_event()
        return BatchRows(batch=batch, activations=on_host, index=None), event


def _arrived(rows: BatchRows, event: torch.cuda.Event) -> BatchRows:
    """Waits for the copy of a batch."""
    event.synchronize()
    return rows


def _kept(batch: TokenBatch) -> Tensor | None:
    """Returns the indices of the kept tokens; None if all tokens are kept."""
    keep_T = torch.from_numpy(batch.keep).flatten()
    return None if bool(keep_T.all()) else keep_T.nonzero().squeeze(1)
