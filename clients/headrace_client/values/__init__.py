"""Arguments and results of the client: frozen values, without gRPC and without torch."""

from headrace_client.values.choices import choice
from headrace_client.values.common import Dtype, Failure, Transfer
from headrace_client.values.extractions import (
    Estimate,
    Extraction,
    ExtractionEvent,
    ExtractionState,
    Hookpoint,
    ReaderStatus,
    Retain,
    Retention,
    Window,
)
from headrace_client.values.memory import (
    CatalogBatch,
    CatalogEntry,
    CatalogMemory,
    Fit,
    MemoryAdvice,
    MemoryEstimate,
    Placement,
)
from headrace_client.values.models import (
    Architecture,
    Fidelity,
    LayerFidelity,
    Model,
    ModelEvent,
    ModelSource,
    ModelState,
    Quantization,
)
from headrace_client.values.outliers import NormLimit
from headrace_client.values.reading import PLAIN, Reading, ReadOrder
from headrace_client.values.receipts import ColumnParity, ParityReceipt
from headrace_client.values.recipes import Corpus, LongDocuments, Packing, Recipe, TokenPolicy, TokenWindow
from headrace_client.values.residencies import Device, Node, NodeState, Pin, Residency, ResidencyEvent, ResidencyState
from headrace_client.values.sets import ActivationSet, SetPin
from headrace_client.values.streams import (
    PROVENANCE_COLUMNS,
    Bottleneck,
    Column,
    ColumnStatistics,
    Progress,
    StreamHeader,
    StreamState,
)
from headrace_client.values.tuning import DEFAULT_TUNING, SILENCE_S, Backoff, StreamTuning, Transport
from headrace_client.values.validations import StepState, ValidationAttempt, ValidationStep

__all__ = [
    "DEFAULT_TUNING",
    "PLAIN",
    "PROVENANCE_COLUMNS",
    "SILENCE_S",
    "ActivationSet",
    "Architecture",
    "Backoff",
    "Bottleneck",
    "CatalogBatch",
    "CatalogEntry",
    "CatalogMemory",
    "Column",
    "ColumnParity",
    "ColumnStatistics",
    "Corpus",
    "Device",
    "Dtype",
    "Estimate",
    "Extraction",
    "ExtractionEvent",
    "ExtractionState",
    "Failure",
    "Fidelity",
    "Fit",
    "Hookpoint",
    "LayerFidelity",
    "LongDocuments",
    "MemoryAdvice",
    "MemoryEstimate",
    "Model",
    "ModelEvent",
    "ModelSource",
    "ModelState",
    "Node",
    "NodeState",
    "NormLimit",
    "Packing",
    "ParityReceipt",
    "Pin",
    "Placement",
    "Progress",
    "Quantization",
    "ReadOrder",
    "ReaderStatus",
    "Reading",
    "Recipe",
    "Residency",
    "ResidencyEvent",
    "ResidencyState",
    "Retain",
    "Retention",
    "SetPin",
    "StepState",
    "StreamHeader",
    "StreamState",
    "StreamTuning",
    "TokenPolicy",
    "TokenWindow",
    "Transfer",
    "Transport",
    "ValidationAttempt",
    "ValidationStep",
    "Window",
    "choice",
]
