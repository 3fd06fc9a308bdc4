"""What the client takes and gives: frozen values, without gRPC and without torch."""

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
from headrace_client.values.models import Architecture, Model, ModelEvent, ModelSource, ModelState, Quantization
from headrace_client.values.recipes import Corpus, Packing, Recipe, TokenPolicy
from headrace_client.values.residencies import Device, Node, NodeState, Pin, Residency, ResidencyEvent, ResidencyState
from headrace_client.values.sets import ActivationSet, SetPin
from headrace_client.values.streams import (
    PROVENANCE_COLUMNS,
    Column,
    ColumnStatistics,
    Progress,
    StreamHeader,
    StreamState,
)

__all__ = [
    "PROVENANCE_COLUMNS",
    "ActivationSet",
    "Architecture",
    "Column",
    "ColumnStatistics",
    "Corpus",
    "Device",
    "Dtype",
    "Estimate",
    "Extraction",
    "ExtractionEvent",
    "ExtractionState",
    "Failure",
    "Hookpoint",
    "Model",
    "ModelEvent",
    "ModelSource",
    "ModelState",
    "Node",
    "NodeState",
    "Packing",
    "Pin",
    "Progress",
    "Quantization",
    "ReaderStatus",
    "Recipe",
    "Residency",
    "ResidencyEvent",
    "ResidencyState",
    "Retain",
    "Retention",
    "SetPin",
    "StreamHeader",
    "StreamState",
    "TokenPolicy",
    "Transfer",
    "Window",
    "choice",
]
