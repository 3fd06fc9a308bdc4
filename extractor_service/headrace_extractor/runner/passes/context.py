"""Checks, before any row, that a recipe's sequences give each document the rows that it has by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from headrace_extractor.corpora.recipe import PACKED, Recipe
from headrace_extractor.errors import FieldInvalid
from headrace_extractor.hookpoints.catalogue import cannot_isolate
from headrace_extractor.hookpoints.places import NOT_AT_ALL
from headrace_extractor.runner.hooks.binding import anatomy_of, documents_isolated
from headrace_extractor.runner.hooks.proof import Verdict, try_isolation
from headrace_extractor.runner.models.loading import LoadedModel

# Parts of the names under which configs keep lengths that matter: windows, chunks, scales, limits of a rotation.
_LENGTHS = ("window", "chunk", "scale", "local", "position", "block_size", "span")
# So many of these lengths are tried for the advice of an error.
_MAX_TRIED = 6

_VERDICTS: WeakKeyDictionary[PreTrainedModel, dict[int, Verdict]] = WeakKeyDictionary()


def check_context(recipe: Recipe, loaded: LoadedModel) -> None:
    """Raises FieldInvalid for a context the model does not have, or in which documents change one another's rows."""
    # Beyond its positions a model has no embedding, or rotates by angles that depend on the tokens it saw before.
    limit = loaded.n_positions
    if limit is not None and recipe.context_size > limit:
        raise FieldInvalid(
            f"context_size is {recipe.context_size}, and the model has {limit} positions; use at most that.",
            field="spec.recipe.context_size",
            metadata={"max_position_embeddings": str(limit)},
        )
    # A document by itself, and a sequence that is one text, are computed as they would be alone.
    if recipe.packing != PACKED or recipe.attend_across_documents:
        return
    anatomy, model, length = anatomy_of(loaded.model), loaded.model, recipe.context_size
    if anatomy.isolation == NOT_AT_ALL:
        raise cannot_isolate(model.config.model_type)
    limit = min(anatomy.rotation_limits, default=length)
    if length > limit:
        raise FieldInvalid(
            f"context_size is {length}, and a document of more than {limit} tokens changes how this model rotates all "
            f"others in its batch; use packing one_document, or a context_size of at most {limit}.",
            field="spec.recipe.context_size",
            metadata={"original_max_position_embeddings": str(limit)},
        )
    verdict = isolation_of(model, length)
    if verdict.holds:
        return
    metadata = {"relative_error": f"{verdict.error:.3g}", "bound": f"{verdict.bound:.3g}"}
    shorter = next((tried for tried in _shorter_lengths(model, length) if isolation_of(model, tried).holds), 0)
    if not shorter:
        raise cannot_isolate(model.config.model_type, metadata=metadata)
    raise FieldInvalid(
        f"context_size is {length}, and in sequences that long documents change one another's rows in this model, by "
        f"{verdict.error:.2g} of their length; use packing one_document, or a context_size of at most {shorter}.",
        field="spec.recipe.context_size",
        metadata=metadata | {"proven_context_size": str(shorter)},
    )


def isolation_of(model: PreTrainedModel, length: int) -> Verdict:
    """Returns whether a model keeps documents in sequences of `length` tokens apart: tried once while it is loaded."""
    known = _VERDICTS.setdefault(model, {})
    longer = next((verdict for tried, verdict in known.items() if tried >= length and verdict.holds), None)
    if longer is not None:
        return longer
    if length not in known:
        anatomy = anatomy_of(model)
        known[length] = try_isolation(
            model, anatomy.blocks, partial(documents_isolated, model), length, causal=anatomy.causal
        )
    return known[length]


def _shorter_lengths(model: PreTrainedModel, length: int) -> list[int]:
    """Lists lengths below `length` at which the config says that something changes, the longest first."""
    config = model.config.to_dict()
    found = set(_numbers(config)) | set(_numbers(config.get("text_config") or {}))
    # A window may count both sides, or a place from 0.
    near = {tried for number in found for tried in (number, number - 1, number // 2)}
    return sorted((tried for tried in near if 2 <= tried < length), reverse=True)[:_MAX_TRIED]


def _numbers(config: Mapping[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif type(value) is int and any(part in str(name) for part in _LENGTHS):
            yield value
