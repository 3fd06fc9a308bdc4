"""The Headrace client: models, corpora and extractions, and activations as a stream.

Importing it needs neither torch nor a server; only tensors need torch. Beside the names here, `errors`, `values`,
`reading.scaling` and `integrations` are public.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace_client.client import HeadraceClient
from headrace_client.errors import HeadraceError
from headrace_client.reading.chunk import ActivationChunk
from headrace_client.reading.stream import ChunkStream
from headrace_client.values import (
    ActivationSet,
    Backoff,
    Corpus,
    Device,
    Dtype,
    Estimate,
    Extraction,
    ExtractionState,
    Hookpoint,
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
    "Backoff",
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
    from headrace_client.reading.tensors import ActivationStream  # noqa: PLC0415 - needs torch.

    return ActivationStream
