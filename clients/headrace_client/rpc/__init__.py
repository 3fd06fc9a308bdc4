"""The servers over gRPC. Nothing outside of this room knows gRPC, protobuf or the generated stubs.

`endpoint` is one server, `nodes` finds the extractors, `convert` turns messages into values and back.
"""
