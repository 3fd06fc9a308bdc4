"""The parity receipt: stored rows against plain transformers' values for the same document alone.

A few documents of a run go through the model once more: one at a time, without packing, masks or position ids. The
residual stream is compared with `output_hidden_states`, which has it up to the last block's input, and other hookpoints
with a plain hook on their module. The choice of documents depends on the batches alone.
"""

# ruff: noqa: N803, N806 -- capital suffixes are shapes
# S tokens of a sequence · R kept rows · D model width

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
# Largest share of a run's tokens that go through the model twice; the first sample is taken in any case. A few tokens
# alone take as long as a third of a batch, since all weights are read for them: so the second sample comes no sooner
# than after this many batches, and each later one when the number of batches has doubled.
MAX_SHARE = 1 / 200
FIRST_GAP = 64
# Shorter documents say little. The beginning of longer ones is enough, if later tokens don't change it.
MIN_TOKENS = 16
MAX_TOKENS = 128
# Bounds of the relative error, by norms, of the median row of a sample. With documents that see one another, or with
# the rows of another layer, most rows are off by 0.3 and more. Single rows can be off far more for a good reason: an
# expert was chosen by a hair, or terms cancel.
_COMPUTE_BOUNDS = {torch.float32: 0.005, torch.float16: 0.1, torch.bfloat16: 0.2}
_QUANTIZED_BOUND = 0.2  # Some kernels treat a batch by its outliers.
_STORAGE_BOUNDS = {torch.float16: 0.001, torch.bfloat16: 0.005, torch.float8_e4m3fn: 0.06, torch.int8: 0.3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How one column compares, over all sampled rows without NaN and infinite values."""

    rows: int = 0
    max_difference: float = 0.0
    min_cosine: float = 1.0
    max_relative_error: float = 0.0

    def merged(self, other: Parity) -> Parity:
        """Returns the figures of both samples together."""
        return Parity(
            rows=self.rows + other.rows,
            max_difference=max(self.max_difference, other.max_difference),
            min_cosine=min(self.min_cosine, other.min_cosine),
            max_relative_error=max(self.max_relative_error, other.max_relative_error),
        )

    def to_json(self) -> dict[str, float]:
        """Returns the entry of the manifest."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True, kw_only=True)
class Sample:
    """A document in a batch: its tokens, and rows `[first_row, end_row)` of the batch, copied while they are stored."""

    token_ids: np.ndarray
    kept: np.ndarray  # Which of the tokens are rows.
    first_row: int
    stored: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def end_row(self) -> int:
        """One past its last row."""
        return self.first_row + int(np.count_nonzero(self.kept))


class ParityCheck:
    """Samples one run and compares `columns`, captured at `sites`; `receipt` has the figures so far, by column."""

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
        """Chooses a document of the batch to come, or none; its first `done` rows exist, rows up to `n_rows` will."""
        self._sample = None
        self._n_tokens += batch.token_ids.size
        number, self._n_batches = self._n_batches, self._n_batches + 1
        if not self._columns or done or number < self._next_sample or self._n_samples == MAX_SAMPLES:
            return
        most_tokens = None
        if self._anatomy.causal:
            # A document beyond a rotation limit is rotated by other angles: its beginning has to pass that limit too.
            passed = [limit for limit in self._anatomy.rotation_limits if limit < batch.token_ids.shape[1]]
            most_tokens = max([MAX_TOKENS, *(limit + 1 for limit in passed)])
        sample = choose(batch, most_tokens, n_rows)
        if sample and (not self._n_samples or self._n_compared + len(sample.token_ids) <= self._n_tokens * MAX_SHARE):
            self._sample = sample

    def stored(self, reservation: Reservation, first: int) -> None:
        """Copies the sample's rows out of the log's memory; the reservation holds rows from `first` on of the batch."""
        sample = self._sample
        if sample is None:
            return
        start, end = max(sample.first_row, first), min(sample.end_row, first + reservation.n_rows)
        if start >= end:
            return
        here = slice(start - first, end - first)
        for column in self._columns:
            memory = torch.frombuffer(reservation.columns[column.name], dtype=TORCH_DTYPES[column.dtype])
            rows_RD = memory.view(-1, column.width)[here].clone()
            if column.scale_column:
                scales = torch.frombuffer(reservation.columns[column.scale_column], dtype=torch.float32)
                rows_RD = dequantize_rows(rows_RD, scales.view(-1, 1)[here])
            sample.stored.setdefault(column.name, []).append(rows_RD)

    def end(self) -> None:
        """Compares the sample, when the batch is stored. Raises ModelUnsupported if rows are not the document's own."""
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
                continue  # No row could be compared, and a receipt would say that all is well.
            before = self.receipt.get(column.name)
            self.receipt[column.name] = before.merged(found) if before else found
        self._on_receipt(self.receipt)

    def _compare(self, column: ColumnSpec, stored_RD: Tensor, alone_RD: Tensor) -> Parity:
        """Returns the figures of one sample; raises ModelUnsupported if its median row is off by more than rounding."""
        stored_RD, alone_RD = stored_RD.double(), alone_RD.double()
        finite_R = stored_RD.isfinite().all(1) & alone_RD.isfinite().all(1)
        stored_RD, alone_RD = stored_RD[finite_R], alone_RD[finite_R]
        if not len(stored_RD):
            return Parity()
        difference_RD = stored_RD - alone_RD
        lengths_R, differences_R = alone_RD.norm(dim=1), difference_RD.norm(dim=1)
        # 0 where there is no difference, huge where the row alone is zero.
        errors_R = torch.where(differences_R == 0, 0.0, differences_R / lengths_R.clamp(min=1e-30))
        error = errors_R.median().item()
        bound = _COMPUTE_BOUNDS.get(self._model.dtype, _QUANTIZED_BOUND)
        if getattr(self._model.config, "quantization_config", None) is not None:
            bound = max(bound, _QUANTIZED_BOUND)
        bound += _STORAGE_BOUNDS.get(TORCH_DTYPES[column.dtype], 0.0)
        if not error <= bound:
            raise ModelUnsupported(
                f"Half of the rows of {column.name} differ by {error:.2g} of their length from what transformers "
                f"computes for the same document alone, and {bound:.2g} is the most that rounding explains; extract "
                "with packing one_document or in compute dtype float32, or use another model.",
                metadata={"column": column.name, "relative_error": f"{error:.6g}", "bound": f"{bound:.6g}"},
            )
        products_R = stored_RD.norm(dim=1) * lengths_R
        cosines_R = torch.where(products_R > 0, (stored_RD * alone_RD).sum(1) / products_R, 1.0 - errors_R.clamp(max=1))
        return Parity(
            rows=len(stored_RD),
            max_difference=difference_RD.abs().max().item(),
            min_cosine=min(1.0, cosines_R.min().item()),
            max_relative_error=errors_R.max().item(),
        )


def choose(batch: TokenBatch, most_tokens: int | None, n_rows: int) -> Sample | None:
    """Returns the shortest document of at least MIN_TOKENS behind another in its sequence, or the next best there is.

    A longer document is cut to its first `most_tokens`. None: later tokens change earlier rows, so a document stays
    whole. Only the first `n_rows` rows of the batch will be stored. Returns None for a batch without rows.
    """
    rows_up_to = np.cumsum(batch.keep).reshape(batch.keep.shape)
    best: tuple[tuple[int, bool, bool, int], int, int, int] | None = None
    for sequence, positions in enumerate(batch.position_ids):
        # Position ids start again with each piece that sees only itself.
        bounds = [*np.flatnonzero(positions == 0).tolist(), len(positions)]
        for start, end in pairwise(bounds):
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
    """Computes one document with plain transformers: `[S, D]` a site."""
    input_ids = torch.from_numpy(token_ids_S.astype(np.int64))[None].to(model.device)
    n_layers = len(anatomy_of(model).blocks)
    entry_of = {}  # Of `hidden_states`: the blocks' inputs. Its last entry is behind the final norm.
    for site in sites:
        match = BLOCK_SITE.fullmatch(site.name)
        offset = {"hook_resid_pre": 0, "hook_resid_post": 1}.get(match[2]) if match else None
        if match and offset is not None and int(match[1]) + offset < n_layers:
            entry_of[site.name] = int(match[1]) + offset
    rows: dict[str, Tensor] = {}
    if entry_of:
        output: Any = model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
        states = getattr(output, "hidden_states", None)
        if states is not None and len(states) == n_layers + 1:  # Some models' code gives none, or another number.
            rows = {name: states[entry].flatten(0, 1) for name, entry in entry_of.items()}
    hooked = [site for site in sites if site.name not in rows]
    if hooked:
        with capture(hooked) as captured:
            model(input_ids=input_ids, use_cache=False)
        rows |= {name: acts.reshape(len(token_ids_S), -1) for name, acts in captured.items()}
    return rows
