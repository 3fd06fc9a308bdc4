"""The request for an extraction: model, corpus, hookpoints, recipe, retention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.sets.activation_set import Kind
from headrace_log.layout import PROVENANCE, Dtype, scale_column

_ORIGINS = tuple(column.name for column in PROVENANCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long rows stay; `window_bytes` and `reader_grace_s` are for WINDOW sets."""

    kind: Kind = Kind.RETAIN
    window_bytes: int = 256 * 1024 * 1024
    reader_grace_s: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", Kind(self.kind))  # Records spell it as a string.

    def to_json(self) -> dict[str, Any]:
        """Inverse of the constructor."""
        return {"kind": self.kind, "window_bytes": self.window_bytes, "reader_grace_s": self.reader_grace_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionSpec:
    """What to extract, defaults filled in, hookpoints in forward order."""

    model_id: str
    corpus_id: str
    hookpoints: tuple[str, ...]
    recipe: Recipe
    retention: Retention = field(default_factory=Retention)
    max_rows: int = 0
    allow_non_finite: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns: provenance, then the hookpoints, each 8-bit one followed by its scales."""
        if Dtype(self.recipe.storage_dtype).itemsize > 1:
            return (*_ORIGINS, *self.hookpoints)
        return (*_ORIGINS, *(name for point in self.hookpoints for name in (point, scale_column(point))))

    def to_json(self) -> dict[str, Any]:
        """Inverse of `from_json`."""
        return {
            "model_id": self.model_id,
            "corpus_id": self.corpus_id,
            "hookpoints": list(self.hookpoints),
            "recipe": self.recipe.to_json(),
            "retention": self.retention.to_json(),
            "max_rows": self.max_rows,
            "allow_non_finite": self.allow_non_finite,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ExtractionSpec:
        """Reads what `to_json` wrote."""
        return cls(
            model_id=document["model_id"],
            corpus_id=document["corpus_id"],
            hookpoints=tuple(document["hookpoints"]),
            recipe=Recipe.from_json(document["recipe"]),
            retention=Retention(**document["retention"]),
            max_rows=document["max_rows"],
            allow_non_finite=document["allow_non_finite"],
        )
