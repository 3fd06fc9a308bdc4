"""Base of scripted servers: calls are noted, and refusals have the form of the real servers'."""

import time
from collections import defaultdict, deque

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status


def abort(context, code, reason="", message="no", *, metadata=None, retry_after_s=None, fields=None):
    """Ends a call as the servers do: a google.rpc.Status with details; without a reason, as gRPC itself does."""
    if not reason:
        context.abort(code, message)
    details = [error_details_pb2.ErrorInfo(reason=reason, domain="headrace.dev", metadata=metadata or {})]
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(retry_after_s * 1e9))
        details.append(retry)
    if fields:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=name, description=text) for name, text in fields.items()
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    packed = []
    for detail in details:
        one = AnyMessage()
        one.Pack(detail)
        packed.append(one)
    status = status_pb2.Status(code=code.value[0], message=message, details=packed)
    answer = rpc_status.to_status(status)
    kept = tuple(context.trailing_metadata() or ())
    context.abort_with_status(answer._replace(trailing_metadata=(*answer.trailing_metadata, *kept)))


class Scripted:
    """Base of the scripted servicers: remembers requests and fails where told.

    `fail["Method"]` holds keyword arguments of `abort`, one for each call to fail; `calls["Method"]` the requests seen.
    """

    def __init__(self):
        self.calls = defaultdict(list)
        self.fail = defaultdict(deque)
        self.metadata = defaultdict(list)
        self.hang = set()
        self.trailing = ()

    def note(self, method, request, context):
        self.calls[method].append(request)
        self.metadata[method].append(dict(context.invocation_metadata()))
        if self.trailing:
            context.set_trailing_metadata(self.trailing)
        while method in self.hang and context.is_active():
            time.sleep(0.01)
        if self.fail[method]:
            abort(context, **self.fail[method].popleft())


def unavailable(reason="RUNNER_LOST"):
    return {"code": grpc.StatusCode.UNAVAILABLE, "reason": reason, "message": "gone", "retry_after_s": 0.01}
