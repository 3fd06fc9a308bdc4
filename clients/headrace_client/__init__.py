"""The Headrace client: models, corpora and extractions, and activations as a stream.

Importing it needs neither torch nor a server; only tensors need torch. Beside the names here, `errors`, `values`,
`reading.scaling` and `integrations` are public.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace_client.aio import AsyncHeadraceClient
from headrace_client.client import HeadraceClient
from headrace_client.errors import HeadraceError
from headrace_client.extras import needing
from headrace_client.reading.chunk import ActivationChunk
from headrace_client.reading.stream import ChunkStream
from headrace_client.values import (
    ActivationSet,
    Backoff,
    BosPolicy,
    Corpus,
    Device,
    Dtype,
    Estimate,
    Extraction,
    ExtractionState,
    Hookpoint,
    Listing,
    LongDocuments,
    Model,
    ModelState,
    Node,
    NormLimit,
    Packing,
    Pin,
    Progress,
    Quantization,
    Reading,
    ReadOrder,
    Recipe,
    Residency,
    ResidencyEvent,
    Retain,
    StreamTuning,
    TokenPolicy,
    TokenWindow,
    Transport,
    Window,
)

if TYPE_CHECKING:
    from headrace_client.reading.tensors import ActivationStream

__all__ = [
    "ActivationChunk",
    "ActivationSet",
    "ActivationStream",
    "AsyncHeadraceClient",
    "Backoff",
    "BosPolicy",
    "ChunkStream",
    "Corpus",
    "Device",
    "Dtype",
    "Estimate",
    "Extraction",
    "ExtractionState",
    "HeadraceClient",
    "HeadraceError",
    "Hookpoint",
    "Listing",
    "LongDocuments",
    "Model",
    "ModelState",
    "Node",
    "NormLimit",
    "Packing",
    "Pin",
    "Progress",
    "Quantization",
    "ReadOrder",
    "Reading",
    "Recipe",
    "Residency",
    "ResidencyEvent",
    "Retain",
    "StreamTuning",
    "TokenPolicy",
    "TokenWindow",
    "Transport",
    "Window",
]


def __getattr__(name: str) -> Any:
    if name != "ActivationStream":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needing("headrace[torch]"):
        from headrace_client.reading.tensors import ActivationStream  # noqa: PLC0415

    return ActivationStream
