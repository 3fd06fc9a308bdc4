"""One short forward pass over a sample text: the residual stream behind every block, and how far two of them differ."""

# ruff: noqa: N803, N806 -- capital suffixes are shapes: T tokens · D model width

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headrace_extractor.corpora.tokenizer import Tokenizer
from headrace_extractor.runner.hooks.binding import bind, documents_isolated, n_layers_of
from headrace_extractor.runner.hooks.capture import capture
from headrace_extractor.runner.models.sample_text import SAMPLE_TEXT

MAX_TOKENS = 384
# A prime: ids that follow no pattern, for a model without a tokenizer.
_STRIDE = 7919


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far two tensors of rows are apart."""

    cosine: float
    relative_error: float
    max_abs: float
    max_reference: float


def sample_ids(files_path: Path, *, limit: int = MAX_TOKENS, longest: int | None = None) -> list[int]:
    """Returns token ids of the sample text; of a model without a tokenizer, ids spread over its vocabulary."""
    tokenizer = Tokenizer.load(files_path, ids_only=True)
    limit = min(limit, longest or limit)
    if not tokenizer.digest:
        return [(position * _STRIDE) % tokenizer.vocab_size for position in range(limit)]
    return [*tokenizer.special.prefix, *tokenizer.encode_batch([SAMPLE_TEXT])[0].tolist()][:limit]


def residuals(model: PreTrainedModel, token_ids: Sequence[int]) -> list[Tensor]:
    """Returns the output of each block, `[T, D]` on the host in the dtype of the pass, in order."""
    wanted = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers_of(model))]
    ids = torch.tensor([list(token_ids)], device=model.device)
    positions = torch.arange(len(token_ids), device=model.device)[None]
    sites = bind(model, wanted)
    with torch.inference_mode(), capture(sites) as captured, documents_isolated(model, positions) as arguments:
        model(input_ids=ids, use_cache=False, **arguments)
    return [captured[name][0].cpu() for name in wanted]


def difference(found_TD: Tensor, reference_TD: Tensor) -> Difference:
    """Compares row by row, in double precision."""
    found_TD, reference_TD = found_TD.double(), reference_TD.double()
    apart_TD = found_TD - reference_TD
    cosine = torch.nn.functional.cosine_similarity(found_TD, reference_TD, dim=-1).mean()
    norm = reference_TD.norm()
    return Difference(
        cosine=float(cosine),
        relative_error=float(apart_TD.norm() / norm) if norm else math.nan,
        max_abs=float(apart_TD.abs().max()),
        max_reference=float(reference_TD.abs().max()),
    )


def worst(differences: Sequence[Difference]) -> Mapping[str, float]:
    """Returns the worst of each figure over all layers."""
    return {
        "max_abs_difference": max(each.max_abs for each in differences),
        "max_relative_error": max(each.relative_error for each in differences),
        "min_cosine": min(each.cosine for each in differences),
    }
