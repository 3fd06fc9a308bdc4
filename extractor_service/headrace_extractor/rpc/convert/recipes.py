"""Converts the parts of recipes that have messages and enums of their own."""

from __future__ import annotations

from headrace.extractor.v1 import extraction_pb2
from headrace_extractor.corpora.recipe import SPLIT, TRUNCATE, TokenWindow
from headrace_extractor.errors import FieldInvalid

_LONG_DOCUMENTS = {
    extraction_pb2.LONG_DOCUMENTS_UNSPECIFIED: "",
    extraction_pb2.LONG_DOCUMENTS_SPLIT: SPLIT,
    extraction_pb2.LONG_DOCUMENTS_TRUNCATE: TRUNCATE,
}
_LONG_DOCUMENTS_BACK = {name: number for number, name in _LONG_DOCUMENTS.items()}


def long_documents_from_pb(number: int) -> str:
    """Returns the recipe's value; empty for unspecified, for which the recipe has a default. Raises FieldInvalid."""
    for known, name in _LONG_DOCUMENTS.items():
        if known == number:
            return name
    raise FieldInvalid("spec.recipe.long_documents is unknown.", field="spec.recipe.long_documents")


def long_documents_to_pb(name: str) -> extraction_pb2.LongDocuments.ValueType:
    """Inverse of `long_documents_from_pb`."""
    return _LONG_DOCUMENTS_BACK[name]


def window_from_pb(message: extraction_pb2.Recipe) -> TokenWindow | None:
    """Returns the recipe's window if it has one; raises FieldInvalid."""
    if not message.HasField("window"):
        return None
    return TokenWindow(start=message.window.start, end=message.window.end)


def window_to_pb(window: TokenWindow | None) -> extraction_pb2.TokenWindow | None:
    """Inverse of `window_from_pb`."""
    return None if window is None else extraction_pb2.TokenWindow(start=window.start, end=window.end)
