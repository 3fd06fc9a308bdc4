"""The clients of the wire benchmark: `python -m bench.wire_clients KIND ADDRESS N_BYTES CHUNK_BYTES`.

Each answers every question with the bytes it received, the seconds from opening the stream to its last byte, and a
checksum over one byte of each page: the same work in all of them, and proof that they received the same.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator

from bench.processes import answer, questions
from bench.replay import CHUNK_BYTES, EXTRACTION_ID, HOOKPOINT, touch


def headrace(address: str, n_bytes: int, chunk_bytes: int) -> Iterator[memoryview]:
    """The Python client, as on another machine: rows in messages."""
    del n_bytes, chunk_bytes
    from headrace_client import HeadraceClient, StreamTuning  # noqa: PLC0415 -- each process imports what it measures

    tuning = StreamTuning(chunk_bytes=CHUNK_BYTES, transport="inline")
    with (
        HeadraceClient.connect(extractor=address) as client,
        client.chunks(EXTRACTION_ID, HOOKPOINT, tuning=tuning) as stream,
    ):
        for chunk in stream:
            yield chunk.buffers[0]


def generated(address: str, n_bytes: int, chunk_bytes: int) -> Iterator[memoryview]:
    """The stub of the generated classes."""
    del n_bytes, chunk_bytes
    import grpc  # noqa: PLC0415

    from headrace.extractor.v1 import extraction_service_pb2 as pb  # noqa: PLC0415
    from headrace.extractor.v1 import extraction_service_pb2_grpc as pb_grpc  # noqa: PLC0415

    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.ExtractionServiceStub(channel)
        request = pb.StreamActivationsRequest(extraction_id=EXTRACTION_ID, columns=[HOOKPOINT], chunk_bytes=CHUNK_BYTES)
        for message in stub.StreamActivations(request):
            if message.HasField("chunk"):
                yield memoryview(message.chunk.payload)


def flight(address: str, n_bytes: int, chunk_bytes: int) -> Iterator[memoryview]:
    """Arrow Flight."""
    del n_bytes, chunk_bytes
    from pyarrow import flight as arrow_flight  # noqa: PLC0415

    with arrow_flight.connect(f"grpc://{address}") as client:
        for chunk in client.do_get(arrow_flight.Ticket(b"")):
            yield memoryview(chunk.data.column(0).buffers()[1])


def tcp(address: str, n_bytes: int, chunk_bytes: int) -> Iterator[memoryview]:
    """A bare socket into one buffer."""
    host, _, port = address.rpartition(":")
    buffer = memoryview(bytearray(chunk_bytes))
    with socket.create_connection((host, int(port))) as connection:
        while n_bytes:
            n_read = connection.recv_into(buffer, min(chunk_bytes, n_bytes), socket.MSG_WAITALL)
            if not n_read:
                return
            n_bytes -= n_read
            yield buffer[:n_read]


def main() -> None:
    """Answers questions until standard input ends."""
    kind, address, n_bytes, chunk_bytes = sys.argv[1:]
    chunks = {"headrace": headrace, "generated": generated, "flight": flight, "tcp": tcp}[kind]
    for _ in questions():
        received = checksum = 0
        began = time.perf_counter()
        for view in chunks(address, int(n_bytes), int(chunk_bytes)):
            checksum += touch(view)
            received += len(view)
        answer({"n_bytes": received, "seconds": time.perf_counter() - began, "checksum": checksum})


if __name__ == "__main__":
    main()
