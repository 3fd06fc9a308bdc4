"""Parts of recipes that have messages and enums of their own."""

from __future__ import annotations

from headrace.extractor.v1 import extraction_pb2 as extraction_pb

from headrace_client.windows import LongDocuments, TokenWindow

_LONG_DOCUMENTS = {
    extraction_pb.LONG_DOCUMENTS_SPLIT: LongDocuments.SPLIT,
    extraction_pb.LONG_DOCUMENTS_TRUNCATE: LongDocuments.TRUNCATE,
}


def long_documents_from_pb(pb: extraction_pb.Recipe) -> LongDocuments | None:
    """Reads what happens to long documents; None: what the packing does by default."""
    return _LONG_DOCUMENTS.get(pb.long_documents)


def long_documents_to_pb(value: LongDocuments | None) -> extraction_pb.LongDocuments.ValueType:
    """Inverse of `long_documents_from_pb`."""
    return next(
        (number for number, known in _LONG_DOCUMENTS.items() if known == value),
        extraction_pb.LONG_DOCUMENTS_UNSPECIFIED,
    )


def window_from_pb(pb: extraction_pb.Recipe) -> TokenWindow | None:
    """Reads the window of a recipe."""
    return TokenWindow(pb.window.start, pb.window.end) if pb.HasField("window") else None


def window_to_pb(window: TokenWindow | None) -> extraction_pb.TokenWindow | None:
    """Builds a window."""
    return None if window is None else extraction_pb.TokenWindow(start=window.start, end=window.end)
