"""A failed call as the error of its reason, or of its code where the server gave none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from headrace_client import errors
from headrace_client.rpc.http2 import STATUS_DETAILS_KEY, CallFailed


def client_closed() -> errors.Cancelled:
    """What calls of a closed client raise."""
    return errors.Cancelled("the client is closed", reason="CLIENT_CLOSED", remedy="connect a new one")


def error_from_rpc(exc: grpc.RpcError | CallFailed, address: str, *, streaming: bool = False) -> errors.HeadraceError:
    """Turns a failed call into the error class of its reason, or of its code where the server gave none.

    A stream that breaks in the transport shows as one of several codes, without a reason: all are UNAVAILABLE here.
    """
    failed = exc if isinstance(exc, CallFailed) else _failure(exc)
    code, text = failed.code, failed.text
    facts = _facts(failed.details)
    reason = facts.pop("reason", "")
    if not reason and code == "RESOURCE_EXHAUSTED" and "larger than max" in text:
        reason = "MESSAGE_TOO_LARGE"
    if not reason and streaming and (code in ("INTERNAL", "CANCELLED") or "Stream removed" in text):
        code, text = "UNAVAILABLE", f"the connection broke: {text}"
    if not reason and code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        text = f"{address}: {text}"
    return errors.error_class(code, reason)(text, reason=reason or ("" if code in errors.BY_CODE else code), **facts)


def _failure(exc: grpc.RpcError) -> CallFailed:
    if not isinstance(exc, grpc.Call):
        return CallFailed("UNKNOWN", str(exc))
    code = exc.code().name if exc.code() else "UNKNOWN"
    trailing: Any = exc.trailing_metadata() or ()
    details = next((value for key, value in trailing if key == STATUS_DETAILS_KEY), b"")
    return CallFailed(code, exc.details() or str(exc), details)


def _facts(details: bytes) -> dict[str, Any]:
    """Reason, metadata, fields and retry delay from a google.rpc.Status."""
    facts: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    try:
        status = status_pb2.Status.FromString(details)
    except DecodeError:
        status = status_pb2.Status()
    for detail in status.details:
        for kind, read in _READERS.items():
            message = GetMessageClass(kind.DESCRIPTOR)()
            if detail.Is(kind.DESCRIPTOR) and detail.Unpack(message):
                read(message, facts, metadata)
    return {**facts, "metadata": metadata}


def _read_info(info: Any, facts: dict[str, Any], metadata: dict[str, str]) -> None:
    facts["reason"] = info.reason
    metadata.update(info.metadata)


def _read_retry(retry: Any, facts: dict[str, Any], metadata: dict[str, str]) -> None:
    del metadata
    facts["retry_after_s"] = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9


def _read_fields(bad: Any, facts: dict[str, Any], metadata: dict[str, str]) -> None:
    del metadata
    facts["fields"] = {violation.field: violation.description for violation in bad.field_violations}


def _read_precondition(failure: Any, facts: dict[str, Any], metadata: dict[str, str]) -> None:
    del facts
    for violation in failure.violations:
        metadata.setdefault("precondition", violation.description)


def _read_resource(info: Any, facts: dict[str, Any], metadata: dict[str, str]) -> None:
    del facts
    metadata.setdefault("resource", f"{info.resource_type}/{info.resource_name}")


_READERS: dict[Any, Callable[[Any, dict[str, Any], dict[str, str]], None]] = {
    error_details_pb2.ErrorInfo: _read_info,
    error_details_pb2.RetryInfo: _read_retry,
    error_details_pb2.BadRequest: _read_fields,
    error_details_pb2.PreconditionFailure: _read_precondition,
    error_details_pb2.ResourceInfo: _read_resource,
}
