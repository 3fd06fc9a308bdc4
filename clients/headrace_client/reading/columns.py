"""Which columns of an extraction a reader asks for."""

from __future__ import annotations

from collections.abc import Sequence

from headrace_client.values import PROVENANCE_COLUMNS, Dtype, Extraction


def default_columns(extraction: Extraction, columns: str | Sequence[str] | None) -> tuple[str, ...]:
    """The columns asked for; for None, all hookpoints of the extraction."""
    if columns is None:
        return extraction.hookpoints
    return (columns,) if isinstance(columns, str) else tuple(columns)


def all_columns(extraction: Extraction) -> tuple[str, ...]:
    """Provenance columns and hookpoints."""
    return (*PROVENANCE_COLUMNS, *extraction.hookpoints)


def with_scales(extraction: Extraction, columns: Sequence[str]) -> tuple[str, ...]:
    """Adds the scale columns of 8-bit hookpoints, by which their values are to be multiplied."""
    if extraction.recipe.storage_dtype not in (Dtype.FLOAT8_E4M3, Dtype.INT8):
        return tuple(columns)
    scales = (f"{name}.scale" for name in columns if name in extraction.hookpoints)
    return tuple(dict.fromkeys((*columns, *scales)))
