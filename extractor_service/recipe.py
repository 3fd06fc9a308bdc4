"""The recipe: how documents become rows. All of it is part of a set's identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from extractor_service.errors import FieldInvalid

MIN_CONTEXT_SIZE = 2  # A BOS and one token.
MAX_CONTEXT_SIZE = 131_072
MAX_BATCH_SIZE = 1024

PACKED = "packed"
ONE_DOCUMENT = "one_document"

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "packing": (PACKED, ONE_DOCUMENT),
    "bos": ("document", "none"),
    "eos": ("none", "document"),
    "storage_dtype": ("float32", "float16", "bfloat16"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Checked when made: raises FieldInvalid naming `spec.recipe.<field>` and what it may be."""

    context_size: int = 256
    packing: str = PACKED  # PACKED or ONE_DOCUMENT
    attend_across_documents: bool = False
    bos: str = "document"  # `document` or `none`
    eos: str = "none"  # `none` or `document`
    drop_special_tokens: bool = False
    drop_first_positions: int = 0  # of each document piece
    batch_size: int = 4  # sequences
    storage_dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_range("context_size", self.context_size, MIN_CONTEXT_SIZE, MAX_CONTEXT_SIZE)
        _check_range("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)
        _check_range("drop_first_positions", self.drop_first_positions, 0, self.context_size - 1)
        for name, allowed in _CHOICES.items():
            _check_choice(name, getattr(self, name), allowed)
        for name in ("attend_across_documents", "drop_special_tokens"):
            _check_choice(name, getattr(self, name), (False, True))

    def to_json(self) -> dict[str, Any]:
        """Returns it as a JSON object, every field filled in."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """Reads what `to_json` wrote; a missing field takes its default, an unknown one is refused."""
        unknown = sorted(set(value) - {field.name for field in fields(cls)})
        if unknown:
            raise _invalid(unknown[0], "is no field of a recipe; leave it out")
        return cls(**value)


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise _invalid(name, f"is {value!r}; it must be an integer from {low} to {high}")


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if type(value) is not type(allowed[0]) or value not in allowed:
        raise _invalid(name, f"is {value!r}; it must be one of {', '.join(map(str, allowed))}")


def _invalid(name: str, what: str) -> FieldInvalid:
    field = f"spec.recipe.{name}"
    return FieldInvalid(f"{field} {what}.", field=field)
