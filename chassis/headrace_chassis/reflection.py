"""Server reflection, in both versions: clients ask for v1, and older ones for v1alpha. Their messages are the same."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2

_ALPHA = "grpc.reflection.v1alpha"
_V1 = "grpc.reflection.v1"
_V1_FILE = "grpc/reflection/v1/reflection.proto"
_V1_SERVICE = f"{_V1}.ServerReflection"


def add_reflection(service_names: Sequence[str], server: grpc.aio.Server) -> None:
    """Lets clients ask the server for its services, `service_names` and reflection itself, and their messages."""
    pool = descriptor_pool.Default()
    try:
        pool.FindFileByName(_V1_FILE)
    except KeyError:  # The package describes v1alpha only.
        alpha = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
        renamed = text_format.MessageToString(alpha).replace(_ALPHA, _V1)
        v1 = text_format.Parse(renamed, descriptor_pb2.FileDescriptorProto())
        v1.name = _V1_FILE
        pool.AddSerializedFile(v1.SerializeToString())
    names = (*service_names, reflection.SERVICE_NAME, _V1_SERVICE)
    reflection.enable_server_reflection(names, server)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_registered_method_handlers(_V1_SERVICE, {"ServerReflectionInfo": handler})
