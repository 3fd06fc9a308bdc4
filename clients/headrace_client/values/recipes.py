"""What an extraction is to compute: corpora and recipes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from headrace_client.values.choices import choice
from headrace_client.values.common import Dtype
from headrace_client.windows import LongDocuments, TokenWindow


class Packing(StrEnum):
    """How documents fill sequences."""

    PACKED = "packed"
    ONE_DOCUMENT = "one_document"


class TokenPolicy(StrEnum):
    """Where the beginning- or end-of-sequence token goes."""

    DOCUMENT = "document"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """An ingested source of documents."""

    id: str
    digest: str
    n_documents: int
    size_bytes: int
    tokenized: bool
    origin: str = ""
    create_time: datetime | None = None
    chat: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How documents become rows; all of it is part of a set's identity.

    `context_size` 2 to 131072 tokens, `batch_size` 1 to 1024 sequences a forward pass, `storage_dtype` a float dtype,
    or INT8 or FLOAT8_E4M3 with a float32 scale a row.
    `long_documents` is by default SPLIT where documents are packed and TRUNCATE where they are not; `window` may be
    given as `(start, end)`.
    """

    context_size: int = 256
    packing: Packing = Packing.PACKED
    attend_across_documents: bool = False
    bos: TokenPolicy = TokenPolicy.DOCUMENT
    eos: TokenPolicy = TokenPolicy.NONE
    drop_special_tokens: bool = False
    drop_first_positions: int = 0
    batch_size: int = 4
    storage_dtype: Dtype = Dtype.FLOAT32
    long_documents: LongDocuments | None = None
    window: TokenWindow | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        # Plain strings are taken too: Recipe(packing="one_document").
        for name, kind in (("packing", Packing), ("bos", TokenPolicy), ("eos", TokenPolicy), ("storage_dtype", Dtype)):
            object.__setattr__(self, name, choice(kind, getattr(self, name), name))
        default = LongDocuments.SPLIT if self.packing == Packing.PACKED else LongDocuments.TRUNCATE
        long_documents = choice(LongDocuments, self.long_documents or default, "long_documents")
        object.__setattr__(self, "long_documents", long_documents)
        if isinstance(self.window, tuple):
            object.__setattr__(self, "window", TokenWindow(*self.window))
