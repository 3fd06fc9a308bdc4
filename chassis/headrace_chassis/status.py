"""From an exception to a `google.rpc.Status`: one table gives each error one canonical code and one reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from headrace.common.v1 import error_reason_pb2
from headrace_chassis import errors
from headrace_chassis.errors import ServiceError

DOMAIN = "headrace.dev"
INTERNAL = "INTERNAL"

# The whole status travels in trailing metadata, which peers cut at 8 KiB. The message appears twice (percent-encoded,
# which at worst triples it, and in base64), details appear in base64. These bounds keep the worst case under 6.5 KiB.
MAX_MESSAGE_BYTES = 640
MAX_DESCRIPTION_BYTES = 160
MAX_METADATA_BYTES = 1280
MAX_METADATA_KEYS = 16
MAX_KEY_BYTES = 64

Row = tuple[grpc.StatusCode, str]

CHASSIS_ROWS: Mapping[type[ServiceError], Row] = {
    errors.ShuttingDown: (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"),
    errors.TokenInvalid: (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"),
    errors.TooManyStreams: (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS"),
    errors.Overloaded: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    errors.ParsersBusy: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    errors.MessageTooLarge: (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE"),
    errors.RequestMalformed: (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID"),
    errors.RequestMissing: (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID"),
    errors.MethodUnknown: (grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED"),
}


_REASONS = frozenset(error_reason_pb2.ErrorReason.DESCRIPTOR.values_by_name)


class StatusTable:
    """Code and reason of each error class on the wire.

    A class without a row takes its nearest ancestor's row. The errors of this package have rows already; a service may
    override them. Raises ValueError for a reason that `error_reason.proto` does not have.
    """

    def __init__(self, rows: Mapping[type[ServiceError], Row]) -> None:
        self._rows = {**CHASSIS_ROWS, **rows}
        for kind, (code, reason) in self._rows.items():
            if code is grpc.StatusCode.OK or f"ERROR_REASON_{reason}" not in _REASONS:
                raise ValueError(f"{kind.__name__} can't have the row {code.name} {reason}")

    def row(self, exc: BaseException) -> Row | None:
        """Returns code and reason of an expected error, None for any other exception."""
        return self._row_of(type(exc))

    def missing(self, root: type[ServiceError]) -> list[type[ServiceError]]:
        """Returns the leaf classes below `root` that would leave as INTERNAL, for the test that walks a tree."""
        return [kind for kind in _leaves(root) if self._row_of(kind) is None]

    def rich_status(self, exc: BaseException, *, request_id: str = "") -> status_pb2.Status:
        """Returns the status of `exc`; an error without a row becomes INTERNAL, which tells only the `request_id`."""
        error = expected_error(exc)
        row = self.row(error) if error is not None else None
        if error is None or row is None:
            hint = f" The server's log has its cause under request id {request_id}." if request_id else ""
            status = status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], message=f"Internal error: a bug.{hint}")
            metadata = {"request_id": request_id} if request_id else {}
            status.details.add().Pack(error_details_pb2.ErrorInfo(reason=INTERNAL, domain=DOMAIN, metadata=metadata))
            return status
        code, reason = row
        status = status_pb2.Status(code=code.value[0], message=shorten(error.message, MAX_MESSAGE_BYTES))
        for detail in _details(error, code, reason):
            status.details.add().Pack(detail)
        return status

    def _row_of(self, kind: type[BaseException]) -> Row | None:
        for ancestor in kind.__mro__:
            if ancestor in self._rows:
                return self._rows[ancestor]
        return None


def expected_error(exc: BaseException) -> ServiceError | None:
    """Returns the ServiceError in `exc`, or None.

    A handler's TaskGroup wraps the exceptions of its tasks; a group that holds only ServiceErrors counts as its first.
    """
    if isinstance(exc, ServiceError):
        return exc
    if isinstance(exc, BaseExceptionGroup):
        inner = [expected_error(each) for each in exc.exceptions]
        return inner[0] if None not in inner else None
    return None


def reason_of(status: status_pb2.Status) -> str:
    """Returns the ErrorInfo reason of a status, or an empty string."""
    info = error_details_pb2.ErrorInfo()
    return next((info.reason for detail in status.details if detail.Unpack(info)), "")


def shorten(text: str, max_bytes: int) -> str:
    """Cuts out the middle of a long message, which names the situation at its start and the remedy at its end."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= max_bytes:
        return raw.decode("utf-8")
    gap = " … "
    half = (max_bytes - len(gap.encode())) // 2
    return raw[:half].decode("utf-8", "ignore") + gap + raw[-half:].decode("utf-8", "ignore")


def _leaves(root: type[ServiceError]) -> Iterator[type[ServiceError]]:
    below = root.__subclasses__()
    if not below:
        yield root
    for kind in below:
        yield from _leaves(kind)


def _details(error: ServiceError, code: grpc.StatusCode, reason: str) -> Iterator[Message]:
    kept = [(shorten(key, MAX_KEY_BYTES), value) for key, value in list(error.metadata.items())[:MAX_METADATA_KEYS]]
    room = MAX_METADATA_BYTES - sum(len(key) for key, _ in kept)
    fitted: dict[str, str] = {}
    # From the shortest value to the longest: each gets an equal share of the bytes that are left.
    by_size = sorted(kept, key=lambda item: len(item[1].encode("utf-8", "replace")))
    for index, (key, value) in enumerate(by_size):
        fitted[key] = shorten(value, max(room // (len(by_size) - index), 16))
        room -= len(fitted[key].encode())
    metadata = {key: fitted[key] for key, _ in kept}
    yield error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)
    description = shorten(error.message, MAX_DESCRIPTION_BYTES)
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(max(error.retry_after_s, 0.0) * 1e9))
        yield error_details_pb2.RetryInfo(retry_delay=delay)
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=shorten(error.field, MAX_DESCRIPTION_BYTES), description=description
        )
        yield error_details_pb2.BadRequest(field_violations=[violation])
    kind, name = (shorten(part, MAX_DESCRIPTION_BYTES) for part in error.resource or ("", ""))
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        unmet = error_details_pb2.PreconditionFailure.Violation(type=reason, subject=name, description=description)
        yield error_details_pb2.PreconditionFailure(violations=[unmet])
    if error.resource is not None:
        yield error_details_pb2.ResourceInfo(resource_type=kind, resource_name=name, description=description)
