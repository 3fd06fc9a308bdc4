"""Failed calls as the client's errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from headrace_client import errors
from headrace_client.rpc.http2 import REQUEST_ID_KEY, STATUS_DETAILS_KEY, CallFailed

# gRPC's words for the answer of a proxy, to the request for a way and to the call itself.
_HTTP_STATUS = re.compile(r"(?:HTTP proxy returned response code|http2 header with status:?|:status) (\d{3})")
_PASSING = ("408", "425", "429")
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


def error_from_rpc(
    exc: grpc.RpcError | CallFailed,
    address: str,
    *,
    streaming: bool = False,
    hint: Callable[[str], str] = lambda _text: "",
) -> errors.HeadraceError:
    """Turns a failed call into the error class of its reason, or of its code where the server gave none.

    A stream that breaks in the transport shows as one of several codes, without a reason: all are UNAVAILABLE here.
    `hint` finds a remedy for the text of a connection's failure.
    """
    if isinstance(exc, CallFailed):
        code, text, details, request_id = exc.code, exc.text, exc.details, exc.request_id
    elif isinstance(exc, grpc.Call):
        code = exc.code().name if exc.code() else "UNKNOWN"
        text = exc.details() or str(exc)
        trailing = dict[str, Any](exc.trailing_metadata() or ())
        details, request_id = trailing.get(STATUS_DETAILS_KEY, b""), trailing.get(REQUEST_ID_KEY, "")
    else:
        code, text, details, request_id = "UNKNOWN", str(exc), b"", ""
    facts = _facts(details)
    reason = facts.pop("reason", "")
    http_status = exc.http_status if isinstance(exc, CallFailed) else "".join(_HTTP_STATUS.findall(text)[:1])
    if not reason and http_status:
        kind = errors.Unavailable if http_status in _PASSING or http_status.startswith("5") else errors.ProxyRefused
        facts["metadata"]["http_status"] = http_status
        return kind(f"{address}: {text}; it comes from a proxy or web server", **facts)
    if not reason and code == "RESOURCE_EXHAUSTED" and "larger than max" in text:
        reason = "MESSAGE_TOO_LARGE"
    if not reason and streaming and (code in ("INTERNAL", "CANCELLED") or "Stream removed" in text):
        code, text = "UNAVAILABLE", f"the connection broke: {text}"
    if not reason and code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        facts["remedy"] = hint(text) if code == "UNAVAILABLE" else ""
        text = f"{address}: {text}"
    named = reason or ("" if code in errors.BY_CODE else code)
    return errors.error_class(code, reason)(text, reason=named, request_id=request_id, **facts)


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
