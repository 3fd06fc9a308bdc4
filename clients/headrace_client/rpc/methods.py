"""The methods of the contract, by `Service.Method`: paths, messages, and which gRPC may repeat."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.message_factory import GetMessageClass

from headrace.extractor.v1 import corpus_service_pb2, extraction_service_pb2
from headrace.registry.v1 import activation_set_service_pb2, model_service_pb2, residency_service_pb2
from headrace_client import errors

_SERVICES = (
    model_service_pb2,
    residency_service_pb2,
    activation_set_service_pb2,
    extraction_service_pb2,
    corpus_service_pb2,
)


@dataclass(frozen=True, slots=True)
class Method:
    """One method: its path, the classes of its messages, and whether both sides send one message."""

    path: str
    request: type[Any]
    response: type[Any]
    unary: bool


@cache
def methods() -> dict[str, Method]:
    """All methods by `Service.Method`."""
    found = {}
    for module in _SERVICES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                found[f"{service.name}.{method.name}"] = Method(
                    f"/{service.full_name}/{method.name}",
                    GetMessageClass(method.input_type),
                    GetMessageClass(method.output_type),
                    not (method.client_streaming or method.server_streaming),
                )
    return found


@cache
def service_config() -> str:
    """Builds gRPC's service config: unary calls are repeated on UNAVAILABLE."""
    # Streams are not among them: they reconnect by themselves, behind the last row or event.
    names = []
    for method in methods().values():
        if method.unary:
            service, name = method.path[1:].split("/")
            names.append({"service": service, "method": name})
    retry = {
        "maxAttempts": 5,  # gRPC's own upper limit.
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": retry}]})


def request_of(method: Method, fields: dict[str, Any]) -> Any:
    """Builds a request. Raises InvalidArgument for values that its fields can't hold."""
    try:
        return method.request(**fields)
    except (TypeError, ValueError) as exc:
        for name, value in fields.items():
            try:
                method.request(**{name: value})
            except (TypeError, ValueError):
                raise errors.InvalidArgument(
                    f"{name} can't be put on the wire, a value of type {type(value).__name__}: {exc}",
                    fields={name: str(exc)},
                ) from exc
        raise errors.InvalidArgument(f"the request can't be put on the wire: {exc}") from exc
