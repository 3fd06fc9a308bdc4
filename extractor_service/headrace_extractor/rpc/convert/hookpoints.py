"""Converts hookpoints."""

from __future__ import annotations

from headrace.extractor.v1 import extraction_service_pb2
from headrace_extractor.hookpoints.catalogue import Hookpoint


def hookpoint_to_pb(point: Hookpoint) -> extraction_service_pb2.Hookpoint:
    """Returns the message for a hookpoint."""
    return extraction_service_pb2.Hookpoint(
        name=point.name,
        width=point.width,
        unavailable=point.unavailable,
        shape=point.shape,
        module=point.module,
    )
