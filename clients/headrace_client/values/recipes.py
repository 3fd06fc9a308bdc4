"""Corpora, and recipes that turn their documents into rows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import ClassVar

from headrace_client.errors import InvalidArgument
from headrace_client.values.common import Dtype, choice
from headrace_client.values.listing import Shown

_MAX_POSITION = 2**31 - 1


class LongDocuments(StrEnum):
    """How a document that exceeds a sequence is treated."""

    SPLIT = "split"
    TRUNCATE = "truncate"


@dataclass(frozen=True, slots=True)
class TokenWindow:
    """Positions from `start` to before `end` of each document become rows, inserted tokens counted.

    Negative numbers count from the end of the document, or of the part of it that the model is given; an `end` of 0 is
    that end: `TokenWindow(-1)` is the last position.
    """

    start: int = 0
    end: int = 0

    def __post_init__(self) -> None:
        if not all(type(value) is int and abs(value) <= _MAX_POSITION for value in (self.start, self.end)):
            raise InvalidArgument(
                f"a window goes from one integer of 32 bits to another, not from {self.start!r} to {self.end!r}",
                fields={"window": "start and end"},
            )

    @classmethod
    def parse(cls, text: str) -> TokenWindow:
        """Reads `START:END`, either of which may be empty, as in a slice; raises InvalidArgument."""
        start, colon, end = text.partition(":")
        try:
            if colon:
                return cls(int(start or 0), int(end or 0))
        except ValueError:
            pass
        raise InvalidArgument(f"a window is START:END, such as -1: or 0:16, not {text!r}", fields={"window": text})


class Packing(StrEnum):
    """How documents fill sequences."""

    PACKED = "packed"
    ONE_DOCUMENT = "one_document"


class BosPolicy(StrEnum):
    """Which tokens are put around a document: all that the model's tokenizer puts around a text, BOS alone, or none."""

    TOKENIZER = "tokenizer"
    DOCUMENT = "document"
    NONE = "none"


class TokenPolicy(StrEnum):
    """Where the end-of-sequence token goes."""

    DOCUMENT = "document"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Corpus(Shown):
    """An ingested source of documents, on one node."""

    SHOWN: ClassVar[tuple[str, ...]] = ("id", "n_documents", "size_bytes", "origin")

    id: str
    digest: str
    n_documents: int
    size_bytes: int
    tokenized: bool
    origin: str = ""
    create_time: datetime | None = None
    chat: bool = False
    node_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How documents become rows; all of it is part of a set's identity.

    `context_size` 2 to 131072 tokens, `batch_size` 1 to 1024 sequences a forward pass, `storage_dtype` a float dtype,
    or INT8 or FLOAT8_E4M3 with a float32 scale a row.
    `long_documents` is by default SPLIT where documents are packed and TRUNCATE where they are not; `window` may be
    given as `(start, end)`, and words as texts: they are members of their enums afterwards. `max_documents` takes the
    first documents of the corpus only; 0: all.
    """

    context_size: int = 256
    packing: Packing | str = Packing.PACKED
    attend_across_documents: bool = False
    bos: BosPolicy | str = BosPolicy.TOKENIZER
    eos: TokenPolicy | str = TokenPolicy.NONE
    drop_special_tokens: bool = False
    drop_first_positions: int = 0
    batch_size: int = 4
    storage_dtype: Dtype | str = Dtype.FLOAT32
    long_documents: LongDocuments | str | None = None
    window: TokenWindow | tuple[int, int] | None = None
    chat_template: bool = False
    skip_bad_documents: bool = False
    max_documents: int = 0

    def __post_init__(self) -> None:
        # Plain strings are taken too: Recipe(packing="one_document").
        for name, kind in (("packing", Packing), ("bos", BosPolicy), ("eos", TokenPolicy)):
            object.__setattr__(self, name, choice(kind, getattr(self, name), name))
        dtype = choice(Dtype, self.storage_dtype, "storage_dtype", but=(Dtype.INT32,))  # Of token ids and positions.
        object.__setattr__(self, "storage_dtype", dtype)
        default = LongDocuments.SPLIT if self.packing == Packing.PACKED else LongDocuments.TRUNCATE
        long_documents = choice(LongDocuments, self.long_documents or default, "long_documents")
        object.__setattr__(self, "long_documents", long_documents)
        if isinstance(self.window, tuple):
            object.__setattr__(self, "window", TokenWindow(*self.window))
