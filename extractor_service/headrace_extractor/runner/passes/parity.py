"""The parity receipt: stored rows against plain transformers' values for the same document alone.

A few documents of a run, short ones and the longest, go through the model once more: one at a time, without packing,
masks or position ids, with the tokens that transformers' own tokenizer gives. The residual stream is compared with
`output_hidden_states` where its entries are the stream, and other hookpoints with a plain hook on their module. The
worst row counts. The choice of documents depends on the batches alone.
"""

# ruff: noqa: N803, N806 -- capital suffixes are shapes
# S tokens of a sequence · R kept rows · D model width

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from headrace_extractor.corpora.packing import TokenBatch
from headrace_extractor.errors import ModelUnsupported
from headrace_extractor.runner.hooks.binding import anatomy_of
from headrace_extractor.runner.hooks.capture import Site
from headrace_extractor.runner.hooks.rounding import is_quantized, row_errors
from headrace_extractor.runner.passes.alone import rows_alone
from headrace_extractor.runner.passes.own_tokens import OwnTokens
from headrace_extractor.runner.passes.quantized_rows import dequantize_rows
from headrace_extractor.runner.passes.rows import TORCH_DTYPES
from headrace_extractor.runner.passes.samples import MAX_TOKENS, Sample, choose, choose_longest, longest_in
from headrace_log.layout import ColumnSpec
from headrace_log.writer import Reservation

MAX_SAMPLES = 8
# Largest share of a run's tokens that go through the model twice; the first sample is taken in any case. A few tokens
# alone take as long as a third of a batch, since all weights are read for them: so the second sample comes no sooner
# than after this many batches, and each later one when the number of batches has doubled.
MAX_SHARE = 1 / 200
FIRST_GAP = 64
# Bounds of the relative error, by norms, of the worst row of a sample. In a network of 30 blocks rounding made 9e-6 in
# float32, which leaves room for devices that round the factors of a product, and 0.054 in bfloat16. With documents that
# see one another, or with the rows of another layer, rows are off by 0.3.
_COMPUTE_BOUNDS = {torch.float32: 0.005, torch.float16: 0.1, torch.bfloat16: 0.2}
_QUANTIZED_BOUND = 0.2
# Of a format's own: half of its last bit, or, for scaled integers, a row with a single outlier.
_STORAGE_BOUNDS = {torch.float16: 0.001, torch.bfloat16: 0.005, torch.float8_e4m3fn: 0.065, torch.int8: 0.3}
# Shares of rows that may be off by more where an expert was chosen by a hair, which rounding of 16 bits brings about in
# many rows.
_EXCUSED_SPARSE = {torch.float32: 0.05}
_EXCUSED = 0.5


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


class ParityCheck:
    """Samples one run and compares `columns`, captured at `sites`; `receipt` has the figures so far, by column."""

    def __init__(
        self,
        model: PreTrainedModel,
        columns: Sequence[ColumnSpec],
        sites: Sequence[Site],
        own_tokens: OwnTokens,
        on_receipt: Callable[[Mapping[str, Parity]], None],
    ) -> None:
        self._model = model
        self._columns = tuple(columns)
        self._sites = tuple(sites)
        self._own_tokens = own_tokens
        self._on_receipt = on_receipt
        self._anatomy = anatomy_of(model)
        self._n_tokens = 0
        self._n_compared = 0
        self._n_samples = 0
        self._n_batches = 0
        self._next_sample = 0  # Not before this batch.
        self._longest = 0  # Tokens of the longest document so far.
        self._sample: Sample | None = None
        self.receipt: dict[str, Parity] = {}

    def begin(self, batch: TokenBatch, done: int, n_rows: int) -> None:
        """Chooses a document of the batch to come, or none; its first `done` rows exist, rows up to `n_rows` will.

        Short documents and the longest take turns, a short one first: it costs as much as any sample may.
        """
        self._sample = None
        self._n_tokens += batch.token_ids.size
        number, self._n_batches = self._n_batches, self._n_batches + 1
        if not self._columns or done or number < self._next_sample or self._n_samples == MAX_SAMPLES:
            return
        budget = int(self._n_tokens * MAX_SHARE) - self._n_compared
        if self._n_samples % 2:
            sample = choose_longest(batch, budget, n_rows)
            # A longer one may come within reach: the budget grows with each batch.
            self._longest = max(self._longest, longest_in(batch))
            self._sample = sample if sample and 2 * len(sample.token_ids) > self._longest else None
            return
        most_tokens = None
        if self._anatomy.causal:
            # A document beyond a rotation limit is rotated by other angles: its beginning has to pass that limit too.
            passed = [limit for limit in self._anatomy.rotation_limits if limit < batch.token_ids.shape[1]]
            most_tokens = max([MAX_TOKENS, *(limit + 1 for limit in passed)])
        sample = choose(batch, most_tokens, n_rows)
        if sample and (not self._n_samples or len(sample.token_ids) <= budget):
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
        """Compares the sample, when the batch is stored.

        Raises ModelUnsupported if rows or tokens are not the document's own.
        """
        sample, self._sample = self._sample, None
        if sample is None or not sample.stored:
            return
        self._n_samples += 1
        self._n_compared += len(sample.token_ids)
        self._next_sample = max(FIRST_GAP, 2 * self._n_batches)
        if sample.document is not None:
            self._own_tokens.check(sample.document, sample.token_ids[: sample.n_own])
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
        """Returns the figures of one sample; raises ModelUnsupported if rows are off by more than rounding."""
        finite_R = stored_RD.isfinite().all(1) & alone_RD.isfinite().all(1)
        stored_RD, alone_RD = stored_RD[finite_R].double(), alone_RD[finite_R].double()
        n_rows = len(stored_RD)
        if not n_rows:
            return Parity()
        errors_R = row_errors(stored_RD, alone_RD)
        bound, excused = self._rule()
        bound += _STORAGE_BOUNDS.get(TORCH_DTYPES[column.dtype], 0.0)
        error = errors_R.sort().values[math.ceil(n_rows * (1 - excused)) - 1].item()
        if not error <= bound:
            rows = f"{excused:.0%} of the rows" if excused else "Rows"
            raise ModelUnsupported(
                f"{rows} of {column.name} differ by {error:.2g} of their length or more from what transformers "
                f"computes for the same document alone, and {bound:.2g} is the most that rounding explains; extract "
                "with packing one_document or in compute dtype float32, or use another model.",
                metadata={"column": column.name, "relative_error": f"{error:.6g}", "bound": f"{bound:.6g}"},
            )
        products_R = stored_RD.norm(dim=1) * alone_RD.norm(dim=1)
        cosines_R = torch.where(products_R > 0, (stored_RD * alone_RD).sum(1) / products_R, 1.0 - errors_R.clamp(max=1))
        return Parity(
            rows=n_rows,
            max_difference=(stored_RD - alone_RD).abs().max().item(),
            min_cosine=min(1.0, cosines_R.min().item()),
            max_relative_error=errors_R.max().item(),
        )

    def _rule(self) -> tuple[float, float]:
        """Returns the largest error that rounding explains, and the share of rows that may have a larger one."""
        dtype = self._model.dtype
        bound = _COMPUTE_BOUNDS.get(dtype, _QUANTIZED_BOUND)
        if is_quantized(self._model):
            bound = max(bound, _QUANTIZED_BOUND)
        return bound, _EXCUSED_SPARSE.get(dtype, _EXCUSED) if _has_experts(self._model.config.to_dict()) else 0.0


def _has_experts(config: Mapping[str, Any]) -> bool:
    """True if a config, or one nested in it, gives tokens a choice of experts."""
    numbers = [value for name, value in config.items() if "expert" in str(name) and type(value) is int]
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    return max(numbers, default=0) > 1 or any(_has_experts(value) for value in nested)
