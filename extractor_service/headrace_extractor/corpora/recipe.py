"""The recipe: how documents become rows. All of its fields are part of a set's identity.

In JSON, fields added after the first version are left out while they have their default: so recipes written before
those fields existed keep their meaning, and sets made from them keep their identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from headrace_extractor.errors import FieldInvalid

MIN_CONTEXT_SIZE = 2  # A BOS and one token.
MAX_CONTEXT_SIZE = 131_072
MAX_BATCH_SIZE = 1024
MAX_DOCUMENTS = 2**31 - 1  # The log's `document` column is int32.

PACKED = "packed"
ONE_DOCUMENT = "one_document"
SPLIT = "split"
TRUNCATE = "truncate"
BY_TOKENIZER = "tokenizer"
MAX_POSITION = 2**31 - 1  # The log's `position` column is int32.

# What happens by default to documents longer than a sequence.
_LONG_DOCUMENTS = {PACKED: SPLIT, ONE_DOCUMENT: TRUNCATE}

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "packing": (PACKED, ONE_DOCUMENT),
    "bos": (BY_TOKENIZER, "document", "none"),
    "eos": ("none", "document"),
    "long_documents": (SPLIT, TRUNCATE),
    "storage_dtype": ("float32", "float16", "bfloat16", "float8_e4m3", "int8"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWindow:
    """Positions from `start` to before `end` of a document, inserted tokens counted.

    Negative numbers count from the end of the document, as far as truncation leaves it; an `end` of 0 is that end.
    """

    start: int = 0
    end: int = 0

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            _check_range(f"window.{name}", value, -MAX_POSITION, MAX_POSITION)
        same_side = (self.start < 0) == (self.end < 0) and self.end != 0
        if same_side and self.start >= self.end:
            raise _invalid("window", f"goes from {self.start} to {self.end} and holds no position; end it later")

    @property
    def is_all(self) -> bool:
        """True if the window leaves out no position."""
        return self.start == self.end == 0

    def bounds(self, n_positions: int) -> tuple[int, int]:
        """Returns the first position and one past the last among `n_positions`; either may lie outside of them."""
        start = self.start + n_positions if self.start < 0 else self.start
        return start, self.end + n_positions if self.end <= 0 else self.end


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A checked recipe; raises FieldInvalid naming `spec.recipe.<field>` and its allowed values."""

    context_size: int = 256
    packing: str = PACKED  # PACKED or ONE_DOCUMENT
    attend_across_documents: bool = False
    # BY_TOKENIZER: all that the model's own tokenizer puts around one text; `document`: BOS alone; or `none`.
    bos: str = BY_TOKENIZER
    eos: str = "none"  # `none` or `document`
    drop_special_tokens: bool = False
    drop_first_positions: int = 0  # of each document piece
    batch_size: int = 4  # sequences
    storage_dtype: str = "float32"
    long_documents: str = ""  # SPLIT or TRUNCATE; empty becomes the default of the packing
    window: TokenWindow | None = None  # positions of each document that become rows; None: all
    chat_template: bool = False
    skip_bad_documents: bool = False  # A document that can't be tokenized gives no rows, instead of an error.
    max_documents: int = 0  # of the corpus, from its first; 0: all

    def __post_init__(self) -> None:
        _check_range("context_size", self.context_size, MIN_CONTEXT_SIZE, MAX_CONTEXT_SIZE)
        _check_range("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)
        _check_range("drop_first_positions", self.drop_first_positions, 0, self.context_size - 1)
        _check_range("max_documents", self.max_documents, 0, MAX_DOCUMENTS)
        if self.long_documents == "":
            object.__setattr__(self, "long_documents", _LONG_DOCUMENTS.get(str(self.packing), SPLIT))
        if not isinstance(self.window, TokenWindow | None):
            raise _invalid("window", f"is {self.window!r}; it must have a start and an end")
        if self.window is not None and self.window.is_all:
            object.__setattr__(self, "window", None)
        for name, allowed in _CHOICES.items():
            _check_choice(name, getattr(self, name), allowed)
        for name in ("attend_across_documents", "drop_special_tokens", "chat_template", "skip_bad_documents"):
            _check_choice(name, getattr(self, name), (False, True))

    def to_json(self) -> dict[str, Any]:
        """Returns the recipe as a JSON object, with the omissions that the module's docstring explains."""
        value = asdict(self)
        if self.long_documents == _LONG_DOCUMENTS[self.packing]:
            del value["long_documents"]
        for name in ("window", "chat_template", "skip_bad_documents", "max_documents"):
            if not value[name]:
                del value[name]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_json`; a missing field takes its default, an unknown one is refused."""
        unknown = sorted(set(value) - {field.name for field in fields(cls)})
        if unknown:
            raise _invalid(unknown[0], "is no field of a recipe; leave it out")
        window = value.get("window")
        if isinstance(window, Mapping) and set(window) <= {"start", "end"}:
            window = TokenWindow(**window)
        return cls(**{**value, "window": window})


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise _invalid(name, f"is {value!r}; it must be an integer from {low} to {high}")


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if type(value) is not type(allowed[0]) or value not in allowed:
        raise _invalid(name, f"is {value!r}; it must be one of {', '.join(map(str, allowed))}")


def _invalid(name: str, what: str) -> FieldInvalid:
    field = f"spec.recipe.{name}"
    return FieldInvalid(f"{field} {what}.", field=field)
