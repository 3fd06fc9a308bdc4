"""Proves that a loaded model keeps documents that share a sequence apart, for sequences of a given length.

Three documents in one sequence, a short one, a long one and another short one, share a batch with a document that fills
its sequence: so there are documents beyond every window and chunk that such a sequence can hold, and at every place of
it. Each must be what it is by itself, row by row, up to rounding. The blocks compute in float32 meanwhile, where that
is possible, so that rounding is far below any leak. The same document by itself, in batches of other shapes, shows what
rounding does.
"""

# ruff: noqa: N803, N806 -- capital suffixes are shapes
# B sequences · S tokens in a sequence · R rows of a document

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headrace_extractor.runner.hooks.capture import Site, capture
from headrace_extractor.runner.hooks.rounding import (
    in_float32,
    is_quantized,
    least_beyond_rounding,
    most_of_rounding,
    row_errors,
)
from headrace_extractor.runner.out_of_memory import is_out_of_memory

Apart = Callable[[Tensor], AbstractContextManager[dict[str, Any]]]

# Odd, so that no document begins at the border of a chunk; long enough for a state that decays within a few tokens.
_SHORT = 13
# Of the largest error that another batch shape makes by rounding. The shapes tried here are not all there are.
_FACTOR = 8
# A choice of experts by a hair makes another row with other tokens; a leak makes the same rows wrong each time.
_N_TRIALS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether documents stay apart; `error` is that of the worst row, `bound` the most that rounding explains."""

    holds: bool
    error: float
    bound: float


def try_isolation(
    model: PreTrainedModel, blocks: Sequence[nn.Module], apart: Apart, length: int, *, causal: bool
) -> Verdict:
    """Compares documents in sequences of `length` tokens, kept apart by `apart`, with each by itself."""
    if length < 2:
        return Verdict(holds=True, error=0.0, bound=0.0)
    # First in float32, where no kernel works in the model's own dtype only, as FlashAttention's do.
    can_widen = model.config._attn_implementation in ("sdpa", "eager") and not is_quantized(model)  # noqa: SLF001
    for exact in (True, False) if can_widen and model.dtype != torch.float32 else (False,):
        trial = _Trial(model, blocks, apart, length, causal=causal, exact=exact)
        try:
            with torch.no_grad(), in_float32(blocks) if exact else nullcontext():
                return trial.verdict()
        except (TypeError, ValueError, RuntimeError, IndexError) as exc:
            if is_out_of_memory(exc) and not exact:
                raise
    return Verdict(holds=False, error=torch.inf, bound=0.0)  # Its code does not take the arguments.


class _Trial:
    """The passes of a proof. Rows are the outputs of the first, the middle and the last block, `[B, S, ...]` each."""

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[nn.Module],
        apart: Apart,
        length: int,
        *,
        causal: bool,
        exact: bool,
    ) -> None:
        self._model, self._apart, self._causal = model, apart, causal
        dtype = torch.float32 if exact else model.dtype
        self._is_coarse = dtype != torch.float32 or is_quantized(model)
        # Where the shapes tried here round alike, and where a model is so noisy that nothing could be proven.
        self._least, self._most = least_beyond_rounding(dtype), most_of_rounding(dtype)
        # A leak in one block is in the outputs of all later ones. The first has the least rounding.
        seen = sorted({0, len(blocks) // 2, len(blocks) - 1})
        keep = partial(torch.Tensor.to, dtype=torch.float32, copy=True)
        self._sites = [Site(name=str(n), module=blocks[n], is_input=False, take=keep) for n in seen]
        short = max(1, min(_SHORT, length // 3))
        lengths = [n for n in (short, length - 2 * short, short) if n]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self._parts = [slice(end - n, end) for n, end in zip(lengths, ends, strict=True)]
        self._positions_S = torch.cat([torch.arange(n) for n in lengths])
        self._length = length

    def verdict(self) -> Verdict:
        """Returns the verdict on the rows that are wrong with whatever tokens."""
        wrong_R: Tensor | None = None
        for seed in range(_N_TRIALS):
            errors_R, bounds_R = self._errors(seed)
            beyond_R = torch.where(errors_R > bounds_R, errors_R, 0)
            wrong_R = beyond_R if wrong_R is None else torch.minimum(wrong_R, beyond_R)
            if not bool(wrong_R.any()):
                return Verdict(holds=True, error=float(errors_R.max()), bound=float(bounds_R.max()))
        assert wrong_R is not None
        worst = int(wrong_R.argmax())
        return Verdict(holds=False, error=float(wrong_R[worst]), bound=float(bounds_R[worst]))

    def _errors(self, seed: int) -> tuple[Tensor, Tensor]:
        """Returns the error of every row, and the most that rounding explains of it."""
        joined_S, filling_S = self._tokens(2 * seed), self._tokens(2 * seed + 1)
        # Where no token looks ahead, the beginning of a document by itself is the same rows again in another shape.
        long = max(self._parts, key=lambda part: part.stop - part.start)
        filling_S[: long.stop - long.start] = joined_S[long]
        together = self._packed(torch.stack([filling_S, joined_S]))
        filling = self._alone(filling_S)
        documents = [self._alone(joined_S[part]) for part in self._parts]
        # A model that gives no numbers by itself spreads them, through any mask; extractions end with NON_FINITE.
        alone_is_finite = all(bool(rows.isfinite().all()) for each in (filling, *documents) for rows in each.values())
        if alone_is_finite and not all(bool(rows.isfinite().all()) for rows in together.values()):
            raise ValueError("rows that are numbers alone are none when packed")
        noises = [_errors_of(self._alone(joined_S[self._parts[0]], copies=2), documents[0], row=1)]
        if self._causal:
            (alone,) = (each for each, part in zip(documents, self._parts, strict=True) if part == long)
            noises.append(_errors_of(filling, alone, n_rows=long.stop - long.start))
        bound = min(self._most, max(self._least, _FACTOR * float(torch.cat(noises).max())))
        errors = [_errors_of(together, filling, row=0)]
        errors += [
            _errors_of(together, each, row=1, first=part.start, n_rows=part.stop - part.start)
            for each, part in zip(documents, self._parts, strict=True)
        ]
        bounds = [torch.full_like(each, bound) for each in errors]
        if self._is_coarse:
            errors_R, bounds_R = self._change_of_others(filling_S, joined_S, together)
            errors, bounds = [*errors, errors_R], [*bounds, bounds_R]
        return torch.cat(errors), torch.cat(bounds)

    def _change_of_others(
        self, filling_S: Tensor, joined_S: Tensor, together: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns the change of the last document's rows when other tokens precede it, and its bounds.

        Rounding is the same in passes of one shape, so this shows leaks that rounding hides from a comparison with the
        document by itself. Kernels whose work depends on the batch's content show when another sequence changes.
        """
        last = self._parts[-1]
        other_S = self._tokens(-1 - int(joined_S[0]))
        before_S = torch.cat([other_S[: last.start], joined_S[last]])
        change_R, noise_R = (
            _errors_of(self._packed(ids_BS), together, row=1, first=last.start, n_rows=last.stop - last.start)
            for ids_BS in (torch.stack([filling_S, before_S]), torch.stack([other_S, joined_S]))
        )
        return change_R, torch.full_like(noise_R, _FACTOR * float(noise_R.max()))

    def _tokens(self, seed: int) -> Tensor:
        """Draws `[S]` token ids that have no meaning of their own."""
        config = self._model.config
        named = {**config.to_dict(), **config.get_text_config().to_dict()}
        special = {value for key, value in named.items() if "token" in key and isinstance(value, int)}
        n_ids = getattr(self._model.get_input_embeddings(), "num_embeddings", 0) or config.get_text_config().vocab_size
        ids = torch.tensor([number for number in range(n_ids) if number not in special] or range(n_ids))
        generator = torch.Generator().manual_seed(seed)
        return ids[torch.randint(len(ids), (self._length,), generator=generator)]

    def _packed(self, ids_BS: Tensor) -> dict[str, Tensor]:
        positions_BS = torch.stack([torch.arange(self._length), self._positions_S]).to(self._model.device)
        with capture(self._sites) as captured, self._apart(positions_BS) as arguments:
            self._model(input_ids=ids_BS.to(self._model.device), use_cache=False, **arguments)
        return captured

    def _alone(self, ids_S: Tensor, *, copies: int = 1) -> dict[str, Tensor]:
        """Runs the model's own forward over one document, without any of our arguments."""
        with capture(self._sites) as captured:
            self._model(input_ids=ids_S.to(self._model.device).repeat(copies, 1), use_cache=False)
        return captured


def _errors_of(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    row: int = 0,
    first: int = 0,
    n_rows: int | None = None,
) -> Tensor:
    """Returns `[R]`, the worst error of each row over the blocks.

    Rows from `first` on in sequence `row` are compared with the first rows of `expected`, in its first sequence or, if
    that has as many, in the same one.
    """
    errors = []
    for name, whole_BSD in expected.items():
        if whole_BSD.dim() < 3:
            raise ValueError("the blocks' outputs are no rows of sequences")
        is_same_shape = whole_BSD.shape == found[name].shape
        end = first + (whole_BSD.shape[1] if n_rows is None else n_rows)
        found_RD = found[name][row, first:end]
        expected_RD = whole_BSD[row, first:end] if is_same_shape else whole_BSD[0, : end - first]
        errors.append(row_errors(found_RD.flatten(1), expected_RD.flatten(1)))
    return torch.stack(errors).amax(0)
