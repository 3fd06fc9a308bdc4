"""Registers a servicer method by method, so that single methods may answer with bytes they framed themselves."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass


def add_service(
    server: grpc.aio.Server, descriptor: ServiceDescriptor, servicer: object, *, framed: Collection[str] = ()
) -> None:
    """Adds all methods of a service; the methods in `framed` yield `bytes` instead of messages."""
    handlers = {method.name: _handler(method, servicer, method.name in framed) for method in descriptor.methods}
    server.add_registered_method_handlers(descriptor.full_name, handlers)


def _handler(method: MethodDescriptor, servicer: object, framed: bool) -> grpc.RpcMethodHandler[Any, Any]:
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[method.client_streaming, method.server_streaming]
    answer = GetMessageClass(method.output_type)
    return make(
        getattr(servicer, method.name),
        request_deserializer=GetMessageClass(method.input_type).FromString,
        response_serializer=None if framed else answer.SerializeToString,
    )
