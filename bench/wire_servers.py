"""The servers that Headrace is compared with: `python -m bench.wire_servers KIND --folder SET --rows N`.

All of them read the same mapped files with the same reader; they differ in how they send rows.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
from pyarrow import flight

from bench.processes import announce
from bench.replay import CHUNK_BYTES, HOOKPOINT, runs
from headrace.extractor.v1 import extraction_service_pb2 as pb
from headrace.extractor.v1 import extraction_service_pb2_grpc as pb_grpc


class GeneratedService(pb_grpc.ExtractionServiceServicer):
    """StreamActivations with messages of the generated classes, the usual way to write it."""

    def __init__(self, folder: Path, n_rows: int) -> None:
        self._folder = folder
        self._n_rows = n_rows

    async def StreamActivations(  # noqa: N802 -- named in the proto
        self, request: pb.StreamActivationsRequest, context: Any
    ) -> AsyncIterator[pb.StreamActivationsResponse]:
        """Yields one message per run of rows."""
        del request, context
        for run in runs(self._folder, self._n_rows):
            chunk = pb.ActivationChunk(
                first_row=run.first_row, n_rows=run.n_rows, column_offsets=[0], payload=bytes(run.columns[0])
            )
            yield pb.StreamActivationsResponse(chunk=chunk)


async def serve_generated(args: argparse.Namespace) -> None:
    """Serves until it is killed."""
    server = grpc.aio.server(options=[("grpc.max_send_message_length", 16 * CHUNK_BYTES)])
    pb_grpc.add_ExtractionServiceServicer_to_server(GeneratedService(args.folder, args.rows), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    announce(args.ready_file, f"127.0.0.1:{port}")
    await server.wait_for_termination()


class FlightServer(flight.FlightServerBase):
    """DoGet with one record batch per run of rows, over the mapped memory; the table leaves the loop to C++."""

    def __init__(self, folder: Path, n_rows: int) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._folder = folder
        self._n_rows = n_rows
        first = next(runs(folder, n_rows))
        self._schema = pa.schema([(HOOKPOINT, pa.binary(len(first.columns[0]) // first.n_rows))])

    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.FlightDataStream:
        """Streams the whole column."""
        del context, ticket
        batches = (self._batch(run.columns[0], run.n_rows) for run in runs(self._folder, self._n_rows))
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(self._schema, batches))

    def _batch(self, view: memoryview, n_rows: int) -> pa.RecordBatch:
        array = pa.Array.from_buffers(self._schema.field(0).type, n_rows, [None, pa.py_buffer(view)])
        return pa.RecordBatch.from_arrays([array], schema=self._schema)


def serve_flight(args: argparse.Namespace) -> None:
    """Serves until it is killed."""
    server = FlightServer(args.folder, args.rows)
    announce(args.ready_file, f"127.0.0.1:{server.port}")
    server.serve()


def serve_tcp(args: argparse.Namespace) -> None:
    """Sends the bare column over each connection."""
    listening = socket.create_server(("127.0.0.1", 0))
    announce(args.ready_file, f"127.0.0.1:{listening.getsockname()[1]}")
    while True:
        connection, _ = listening.accept()
        with connection:
            for run in runs(args.folder, args.rows):
                connection.sendall(run.columns[0])


def main() -> None:
    """Runs one of the servers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("generated", "flight", "tcp"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--ready-file", type=Path, required=True)
    args = parser.parse_args()
    if args.kind == "generated":
        asyncio.run(serve_generated(args))
    else:
        {"flight": serve_flight, "tcp": serve_tcp}[args.kind](args)


if __name__ == "__main__":
    main()
