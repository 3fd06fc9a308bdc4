"""The request to ingest a corpus, and the ingested corpus, as values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from headrace_extractor.errors import FieldInvalid

MAX_COLUMN_NAME = 255
_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


class CorpusFormat(StrEnum):
    """The format of a file, which decides how it is cut into documents."""

    TXT = "txt"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    TOKEN_IDS = "token_ids"  # noqa: S105


class DocumentKind(StrEnum):
    """The kind of a corpus's documents; all documents of a corpus are of one kind."""

    TEXT = "text"
    TOKEN_IDS = "tokens"  # noqa: S105
    CHAT = "chat"

    @classmethod
    def of(cls, *, tokenized: bool, chat: bool) -> DocumentKind:
        """Returns the kind that the two flags describe; `tokenized` wins."""
        if tokenized:
            return cls.TOKEN_IDS
        return cls.CHAT if chat else cls.TEXT


class TextSplit(StrEnum):
    """The places where a text file is cut into documents."""

    BLANK_LINES = "blank_lines"
    LINES = "lines"
    NONE = "none"
    FORM_FEEDS = "form_feeds"


_BY_ENDING: Mapping[str, CorpusFormat] = {
    ".txt": CorpusFormat.TXT,
    ".jsonl": CorpusFormat.JSONL,
    ".json": CorpusFormat.JSONL,
    ".ndjson": CorpusFormat.JSONL,
    ".csv": CorpusFormat.CSV,
    ".parquet": CorpusFormat.PARQUET,
    ".npy": CorpusFormat.TOKEN_IDS,
}
# Only these formats can hold lists of messages.
_CHAT_FORMATS = (CorpusFormat.JSONL, CorpusFormat.PARQUET)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSpec:
    """A checked request; raises FieldInvalid naming `spec.<field>`. Without a `format`, the file's ending decides."""

    id: str
    format: CorpusFormat | None = None
    text_column: str = "text"
    text_split: TextSplit = TextSplit.BLANK_LINES
    file_name: str = ""
    chat: bool = False  # `text_column` holds lists of messages

    def __post_init__(self) -> None:
        check_id(self.id)
        if not 0 < len(self.text_column) <= MAX_COLUMN_NAME:
            raise FieldInvalid(
                f"spec.text_column must have 1 to {MAX_COLUMN_NAME} characters.", field="spec.text_column"
            )

    def file_format(self, file_name: str = "") -> CorpusFormat:
        """Returns the format of the file; raises FieldInvalid if neither `format` nor the file name tells it."""
        name = self.file_name or file_name
        by_ending = (known for ending, known in _BY_ENDING.items() if name.lower().endswith(ending))
        found = self.format or next(by_ending, None)
        if found is None:
            raise FieldInvalid(
                f"The file name {name[:255]!r} ends in none of {', '.join(_BY_ENDING)}; set spec.format (and unpack the"
                " file if it is compressed).",
                field="spec.format",
            )
        if self.chat and found not in _CHAT_FORMATS:
            raise FieldInvalid(
                f"Conversations can't be read from {found} files; write them as JSON lines or Parquet.",
                field="spec.chat",
            )
        return found

    def kind(self, file_name: str = "") -> DocumentKind:
        """Returns the kind of the file's documents; raises the errors of `file_format`."""
        tokenized = self.file_format(file_name) == CorpusFormat.TOKEN_IDS
        return DocumentKind.of(tokenized=tokenized, chat=self.chat)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """An ingested corpus. The digest is over its documents: it does not depend on the format of their file."""

    id: str
    digest: str  # sha256, hex
    n_documents: int
    size_bytes: int  # of text as UTF-8, or 4 per token id
    tokenized: bool
    origin: str
    create_time: float  # seconds since 1970
    chat: bool = False

    @property
    def kind(self) -> DocumentKind:
        """The kind of all its documents."""
        return DocumentKind.of(tokenized=self.tokenized, chat=self.chat)

    def to_json(self) -> dict[str, Any]:
        """Returns the corpus as a JSON object; `chat` only if true, so that versions without it can read all others."""
        value = asdict(self)
        if not self.chat:
            del value["chat"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Corpus:
        """Inverse of `to_json`; raises TypeError on missing and unknown fields."""
        return cls(**value)


def is_id(text: str) -> bool:
    """Returns whether a text has the form of a corpus id."""
    return _ID.fullmatch(text) is not None


def check_id(corpus_id: str) -> None:
    """Raises FieldInvalid unless a corpus id is 1 to 63 lower-case letters, digits and hyphens, a letter first."""
    if not is_id(corpus_id):
        raise FieldInvalid(
            f"The corpus id {corpus_id[:64]!r} must match ^{_ID.pattern}$: lower-case letters, digits and hyphens, a"
            " letter first, at most 63.",
            field="spec.id",
        )
