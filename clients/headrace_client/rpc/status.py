"""Failed calls as the client's errors."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from headrace_client import errors
from headrace_client.rpc.http2 import STATUS_DETAILS_KEY, CallFailed

_DETAILS: dict[str, type[Any]] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.RetryInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.ResourceInfo,
    )
}


def client_closed() -> errors.Cancelled:
    """The error of all calls of a closed client."""
    return errors.Cancelled("the client is closed", reason="CLIENT_CLOSED", remedy="connect a new one")


def error_from_rpc(exc: grpc.RpcError | CallFailed, address: str, *, streaming: bool = False) -> errors.HeadraceError:
    """Turns a failed call into the error class of its reason, or of its code where the server gave none.

    A stream that breaks in the transport shows as one of several codes, without a reason: all are UNAVAILABLE here.
    """
    if isinstance(exc, CallFailed):
        code, text, details = exc.code, exc.text, exc.details
    elif isinstance(exc, grpc.Call):
        code = exc.code().name if exc.code() else "UNKNOWN"
        text = exc.details() or str(exc)
        trailing: Any = exc.trailing_metadata() or ()
        details = next((value for key, value in trailing if key == STATUS_DETAILS_KEY), b"")
    else:
        code, text, details = "UNKNOWN", str(exc), b""
    facts = _facts(details)
    reason = facts.pop("reason", "")
    if not reason and code == "RESOURCE_EXHAUSTED" and "larger than max" in text:
        reason = "MESSAGE_TOO_LARGE"
    if not reason and streaming and (code in ("INTERNAL", "CANCELLED") or "Stream removed" in text):
        code, text = "UNAVAILABLE", f"the connection broke: {text}"
    if not reason and code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        text = f"{address}: {text}"
    return errors.error_class(code, reason)(text, reason=reason or ("" if code in errors.BY_CODE else code), **facts)


def _facts(details: bytes) -> dict[str, Any]:
    """Reason, metadata, fields and retry delay from a google.rpc.Status."""
    facts: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    try:
        status = status_pb2.Status.FromString(details)
    except DecodeError:
        status = status_pb2.Status()
    for packed in status.details:
        kind = _DETAILS.get(packed.TypeName())
        detail = kind() if kind is not None else None
        if detail is None or not packed.Unpack(detail):
            continue
        match detail.DESCRIPTOR.name:
            case "ErrorInfo":
                facts["reason"] = detail.reason
                metadata.update(detail.metadata)
            case "RetryInfo":
                facts["retry_after_s"] = detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9
            case "BadRequest":
                facts["fields"] = {violation.field: violation.description for violation in detail.field_violations}
            case "PreconditionFailure":
                for violation in detail.violations:
                    metadata.setdefault("precondition", violation.description)
            case "ResourceInfo":
                metadata.setdefault("resource", f"{detail.resource_type}/{detail.resource_name}")
    return {**facts, "metadata": metadata}
