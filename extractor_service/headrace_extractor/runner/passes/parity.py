"""The parity receipt: stored rows against what transformers computes for the same document alone.

A few documents of a run are put through the model once more: one at a time, without packing, masks or position ids. The
residual stream is compared with `output_hidden_states` where that has it, other hookpoints with a plain hook on their
module. Which documents depends on the batches alone.
"""

# ruff: noqa: N803, N806 -- capital suffixes are shapes
# S tokens of a sequence · R kept rows · D model width

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from headrace_extractor.corpora.packing import TokenBatch
from headrace_extractor.errors import ModelUnsupported
from headrace_extractor.hookpoints.names import BLOCK_SITE
from headrace_extractor.runner.hooks.binding import anatomy_of
from headrace_extractor.runner.hooks.capture import Site, capture
from headrace_extractor.runner.passes.quantized_rows import dequantize_rows
from headrace_extractor.runner.passes.rows import TORCH_DTYPES
from headrace_log.layout import ColumnSpec
from headrace_log.writer import Reservation

MAX_SAMPLES = 8
# Of the tokens of a run, so many go through the model twice; the first sample is taken anyhow. A few tokens alone take
# as long as a third of a batch, since all weights are read for them: the next sample comes after so many batches, then
# after twice as many, and so on.
MAX_SHARE = 1 / 200
FIRST_GAP = 64
# Shorter ones say little; of longer ones the beginning is enough, where later tokens don't change it.
MIN_TOKENS = 16
MAX_TOKENS = 128
# Of the median row of a sample, by norms. Documents that see one another, or another layer, are off by 0.3 and more in
# most rows; single rows can be off far more for a good reason: where an expert is chosen by a hair, or terms cancel.
_COMPUTE_BOUNDS = {torch.float32: 0.005, torch.float16: 0.1, torch.bfloat16: 0.2}
_QUANTIZED_BOUND = 0.2  # Some kernels treat a batch by its outliers.
_STORAGE_BOUNDS = {torch.float16: 0.001, torch.bfloat16: 0.005, torch.float8_e4m3fn: 0.06, torch.int8: 0.3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How one column compares, over all rows sampled; NaN and infinite rows left out."""

    rows: int = 0
    max_difference: float = 0.0
    min_cosine: float = 1.0
    max_relative_error: float = 0.0

    def merged(self, other: Parity) -> Parity:
        """Both samples together."""
        return Parity(
            rows=self.rows + other.rows,
            max_difference=max(self.max_difference, other.max_difference),
            min_cosine=min(self.min_cosine, other.min_cosine),
            max_relative_error=max(self.max_relative_error, other.max_relative_error),
        )

    def to_json(self) -> dict[str, float]:
        """Manifest entry."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True, kw_only=True)
class Sample:
    """A document in a batch: its tokens, and rows `[first_row, end_row)` of the batch, collected as they are stored."""

    token_ids: np.ndarray
    kept: np.ndarray  # Which of the tokens are rows.
    first_row: int
    stored: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def end_row(self) -> int:
        """One past its last row."""
        return self.first_row + int(np.count_nonzero(self.kept))


class ParityCheck:
    """Samples one run; `receipt` has what was found, by column. `sites` and `columns` are those to be compared."""

    def __init__(
        self,
        model: PreTrainedModel,
        columns: Sequence[ColumnSpec],
        sites: Sequence[Site],
        on_receipt: Callable[[Mapping[str, Parity]], None],
    ) -> None:
        self._model = model
        self._columns = tuple(columns)
        self._sites = tuple(sites)
        self._on_receipt = on_receipt
        self._anatomy = anatomy_of(model)
        self._n_tokens = 0
        self._n_compared = 0
        self._n_samples = 0
        self._n_batches = 0
        self._next_sample = 0  # Not before this batch.
        self._sample: Sample | None = None
        self.receipt: dict[str, Parity] = {}

    def begin(self, batch: TokenBatch, done: int, n_rows: int) -> None:
        """A batch whose first `done` rows exist is about to be stored up to `n_rows`: chooses a document, or none."""
        self._sample = None
        self._n_tokens += batch.token_ids.size
        number, self._n_batches = self._n_batches, self._n_batches + 1
        if not self._columns or done or number < self._next_sample or self._n_samples == MAX_SAMPLES:
            return
        sample = choose(batch, self._most_tokens(batch), n_rows)
        if sample and (not self._n_samples or self._n_compared + len(sample.token_ids) <= self._n_tokens * MAX_SHARE):
            self._sample = sample

    def stored(self, reservation: Reservation, first: int) -> None:
        """Rows from `first` on, counted in the batch, are in the log's memory: copies those that were chosen."""
        sample = self._sample
        if sample is None:
            return
        start, end = max(sample.first_row, first), min(sample.end_row, first + reservation.n_rows)
        if start >= end:
            return
        for column in self._columns:
            rows_RD = _read(column, reservation, start - first, end - first)
            sample.stored.setdefault(column.name, []).append(rows_RD)

    def end(self) -> None:
        """The batch is stored as far as it will be. Raises ModelUnsupported if rows are not the document's own."""
        sample, self._sample = self._sample, None
        if sample is None or not sample.stored:
            return
        self._n_samples += 1
        self._n_compared += len(sample.token_ids)
        self._next_sample = max(FIRST_GAP, 2 * self._n_batches)
        alone = rows_alone(self._model, sample.token_ids, self._sites)
        kept_R = torch.from_numpy(np.flatnonzero(sample.kept))
        for column in self._columns:
            stored_RD = torch.cat(sample.stored[column.name])
            found = self._compare(column, stored_RD, alone[column.name].cpu()[kept_R[: len(stored_RD)]])
            if not found.rows:
                continue  # Nothing was compared: a receipt would say that all is well.
            before = self.receipt.get(column.name)
            self.receipt[column.name] = before.merged(found) if before else found
        self._on_receipt(self.receipt)

    def _most_tokens(self, batch: TokenBatch) -> int | None:
        """Of a document, so many have the rows that they have in the whole; None: only the whole has."""
        if not self._anatomy.causal:
            return None
        passed = [limit for limit in self._anatomy.rotation_limits if limit < batch.token_ids.shape[1]]
        return max([MAX_TOKENS, *(limit + 1 for limit in passed)])

    def _compare(self, column: ColumnSpec, stored_RD: Tensor, alone_RD: Tensor) -> Parity:
        stored_RD, alone_RD = stored_RD.double(), alone_RD.double()
        finite_R = stored_RD.isfinite().all(1) & alone_RD.isfinite().all(1)
        stored_RD, alone_RD = stored_RD[finite_R], alone_RD[finite_R]
        if not len(stored_RD):
            return Parity()
        difference_RD = stored_RD - alone_RD
        errors_R = _ratio(difference_RD.norm(dim=1), alone_RD.norm(dim=1))
        self._check(column, errors_R.median().item())
        products_R = stored_RD.norm(dim=1) * alone_RD.norm(dim=1)
        cosines_R = torch.where(products_R > 0, (stored_RD * alone_RD).sum(1) / products_R, 1.0 - errors_R.clamp(max=1))
        return Parity(
            rows=len(stored_RD),
            max_difference=difference_RD.abs().max().item(),
            min_cosine=min(1.0, cosines_R.min().item()),
            max_relative_error=errors_R.max().item(),
        )

    def _check(self, column: ColumnSpec, error: float) -> None:
        model = self._model
        bound = _COMPUTE_BOUNDS.get(model.dtype, _QUANTIZED_BOUND)
        if getattr(model.config, "quantization_config", None) is not None:
            bound = max(bound, _QUANTIZED_BOUND)
        bound += _STORAGE_BOUNDS.get(TORCH_DTYPES[column.dtype], 0.0)
        if error <= bound:
            return
        raise ModelUnsupported(
            f"Half of the rows of {column.name} differ by {error:.2g} of their length from what transformers computes "
            f"for the same document alone, and {bound:.2g} is the most that rounding explains; extract with packing "
            "one_document or in compute dtype float32, or use another model.",
            metadata={"column": column.name, "relative_error": f"{error:.6g}", "bound": f"{bound:.6g}"},
        )


def choose(batch: TokenBatch, most_tokens: int | None, n_rows: int) -> Sample | None:
    """The shortest document of at least MIN_TOKENS that others precede in its sequence; else what comes nearest.

    Longer ones are cut to `most_tokens`; None: later tokens change earlier rows, so that only a whole one will do. Only
    the first `n_rows` rows of the batch will be stored.
    """
    rows_up_to = np.cumsum(batch.keep).reshape(batch.keep.shape)
    best: tuple[tuple[int, bool, bool, int], int, int, int] | None = None
    for sequence, start, end in _pieces(batch):
        n_kept = np.count_nonzero(batch.keep[sequence, start:end])
        if not n_kept:
            continue
        length, end_row = end - start, int(rows_up_to[sequence, end - 1])
        short, missed = length < MIN_TOKENS, 0 if end_row <= n_rows else 1 + end_row - n_kept
        rank = (missed, short, start == 0, -length if short else length)
        if best is None or rank < best[0]:
            best = (rank, sequence, start, end)
    if best is None:
        return None
    _, sequence, start, end = best
    end = end if most_tokens is None else min(end, start + most_tokens)
    kept = batch.keep[sequence, start:end]
    before = np.count_nonzero(batch.keep[:sequence]) + np.count_nonzero(batch.keep[sequence, :start])
    if not kept.any():
        return None
    return Sample(token_ids=batch.token_ids[sequence, start:end], kept=kept, first_row=int(before))


@torch.inference_mode()
def rows_alone(model: PreTrainedModel, token_ids_S: np.ndarray, sites: Sequence[Site]) -> dict[str, Tensor]:
    """What the model computes for one document: `[S, D]` a site."""
    input_ids = torch.from_numpy(token_ids_S.astype(np.int64))[None].to(model.device)
    rows = dict(_hidden_states(model, input_ids, sites))
    hooked = [site for site in sites if site.name not in rows]
    if hooked:
        with capture(hooked) as captured:
            model(input_ids=input_ids, use_cache=False)
        rows |= {name: acts.reshape(len(token_ids_S), -1) for name, acts in captured.items()}
    return rows


def _hidden_states(model: PreTrainedModel, input_ids: Tensor, sites: Sequence[Site]) -> Iterator[tuple[str, Tensor]]:
    """Yields the residual streams between blocks, by site; behind the last block there is the final norm already."""
    n_layers = len(anatomy_of(model).blocks)
    places = {site.name: place for site in sites if (place := _place(site.name)) is not None and place < n_layers}
    if not places:
        return
    output: Any = model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
    hidden_states = getattr(output, "hidden_states", None)
    if hidden_states is None or len(hidden_states) != n_layers + 1:
        return
    for name, place in places.items():
        yield name, hidden_states[place].flatten(0, 1)


def _place(name: str) -> int | None:
    """Where `output_hidden_states` has a hookpoint."""
    match = BLOCK_SITE.fullmatch(name)
    ahead = {"hook_resid_pre": 0, "hook_resid_post": 1}.get(match[2]) if match else None
    return None if match is None or ahead is None else int(match[1]) + ahead


def _pieces(batch: TokenBatch) -> Iterator[tuple[int, int, int]]:
    """Sequence, start and end of what sees itself only: position ids start again with each."""
    for sequence, positions in enumerate(batch.position_ids):
        bounds = [*np.flatnonzero(positions == 0).tolist(), len(positions)]
        yield from ((sequence, start, end) for start, end in pairwise(bounds))


def _read(column: ColumnSpec, reservation: Reservation, start: int, end: int) -> Tensor:
    """A copy of rows in the log's memory, as numbers."""
    memory = torch.frombuffer(reservation.columns[column.name], dtype=TORCH_DTYPES[column.dtype])
    rows_RD = memory.view(-1, column.width)[start:end]
    if not column.scale_column:
        return rows_RD.clone()
    scales = torch.frombuffer(reservation.columns[column.scale_column], dtype=torch.float32)
    return dequantize_rows(rows_RD, scales.view(-1, 1)[start:end])


def _ratio(difference_R: Tensor, length_R: Tensor) -> Tensor:
    """0 where there is no difference, huge where there is one to nothing."""
    return torch.where(difference_R == 0, 0.0, difference_R / length_R.clamp(min=1e-30))
