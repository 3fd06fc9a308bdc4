"""The whole job with grpc, numpy and the generated stubs alone, as a client in any language does it.

stub_client.py REGISTRY TOKEN MODEL_FOLDER MODEL_ID CORPUS_ID OUTPUT: registers and prepares a model, uploads a corpus,
extracts, follows the progress, streams all rows, and writes them to OUTPUT as an .npz file.
"""

import sys
import uuid

import grpc
import numpy as np

from headrace.common.v1 import dtype_pb2
from headrace.extractor.v1 import (
    corpus_service_pb2,
    corpus_service_pb2_grpc,
    extraction_pb2,
    extraction_service_pb2,
    extraction_service_pb2_grpc,
)
from headrace.registry.v1 import (
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    residency_pb2,
    residency_service_pb2,
    residency_service_pb2_grpc,
)

HOOKPOINT = "blocks.2.hook_resid_post"
NUMPY = {dtype_pb2.DTYPE_FLOAT32: "<f4", dtype_pb2.DTYPE_INT32: "<i4"}
STATES = extraction_pb2.ExtractionState


def main(registry, token, folder, model_id, corpus_id, output):
    metadata = [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(registry) as channel:
        prepare(channel, metadata, folder, model_id)
        extractor = find_extractor(channel, metadata)
    with grpc.insecure_channel(extractor) as channel:
        upload(channel, metadata, corpus_id)
        extraction = extract(channel, metadata, model_id, corpus_id)
        rows = stream(channel, metadata, extraction)
    np.savez(output, **rows)


def prepare(channel, metadata, folder, model_id):
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    source = model_pb2.ModelSource(folder=model_pb2.FolderSource(path=folder))
    model = model_pb2.Model(id=model_id, source=source)
    register = model_service_pb2.RegisterModelRequest(request_id=str(uuid.uuid4()), model=model)
    stub.RegisterModel(register, metadata=metadata, timeout=30)
    prepare = model_service_pb2.PrepareModelRequest(request_id=str(uuid.uuid4()), model_id=model_id)
    stub.PrepareModel(prepare, metadata=metadata, timeout=30)
    watch = model_service_pb2.WatchModelRequest(model_id=model_id)
    for event in stub.WatchModel(watch, metadata=metadata, timeout=90):
        assert event.model.state != model_pb2.MODEL_STATE_FAILED, event.model.failure
        if event.model.state == model_pb2.MODEL_STATE_READY:
            return


def find_extractor(channel, metadata):
    stub = residency_service_pb2_grpc.ResidencyServiceStub(channel)
    nodes = stub.ListNodes(residency_service_pb2.ListNodesRequest(), metadata=metadata, timeout=30).nodes
    return next(node.address for node in nodes if node.state == residency_pb2.NODE_STATE_ALIVE)


def upload(channel, metadata, corpus_id):
    def parts():
        spec = corpus_service_pb2.CorpusSpec(id=corpus_id, file_name="lines.txt", text_split=LINES)
        yield corpus_service_pb2.UploadCorpusRequest(spec=spec)
        for number in range(200):
            line = f"Line {number} of a corpus that came through generated stubs.\n"
            yield corpus_service_pb2.UploadCorpusRequest(content=line.encode())

    stub = corpus_service_pb2_grpc.CorpusServiceStub(channel)
    corpus = stub.UploadCorpus(parts(), metadata=metadata, timeout=60).corpus
    assert corpus.n_documents == 200


LINES = corpus_service_pb2.TEXT_SPLIT_LINES


def extract(channel, metadata, model_id, corpus_id):
    stub = extraction_service_pb2_grpc.ExtractionServiceStub(channel)
    spec = extraction_pb2.ExtractionSpec(model_id=model_id, corpus_id=corpus_id, hookpoints=[HOOKPOINT])
    start = extraction_service_pb2.StartExtractionRequest(request_id=str(uuid.uuid4()), spec=spec)
    extraction = stub.StartExtraction(start, metadata=metadata, timeout=30).extraction
    watch = extraction_service_pb2.WatchExtractionRequest(extraction_id=extraction.id)
    last, seen = 0, []
    for event in stub.WatchExtraction(watch, metadata=metadata, timeout=90):
        assert event.seq > last or event.heartbeat
        last = event.seq
        extraction = event.extraction
        seen.append(STATES.Name(extraction.state))
    assert extraction.state == extraction_pb2.EXTRACTION_STATE_DONE, extraction
    assert len(set(seen)) > 1, seen
    return extraction


def stream(channel, metadata, extraction):
    """Streams all rows; returns them by column. The messages themselves describe the layout."""
    stub = extraction_service_pb2_grpc.ExtractionServiceStub(channel)
    request = extraction_service_pb2.StreamActivationsRequest(extraction_id=extraction.id, chunk_bytes=100_000)
    columns, parts, next_row = [], {}, 0
    for message in stub.StreamActivations(request, metadata=metadata, timeout=90):
        kind = message.WhichOneof("event")
        if kind == "header":
            columns = message.header.columns
            parts = {column.name: [] for column in columns}
        elif kind == "chunk":
            chunk = message.chunk
            assert chunk.first_row == next_row
            next_row += chunk.n_rows
            for column, offset in zip(columns, chunk.column_offsets, strict=True):
                count = chunk.n_rows * column.width
                values = np.frombuffer(chunk.payload, NUMPY[column.dtype], count, offset)
                parts[column.name].append(values.reshape(chunk.n_rows, column.width))
        elif kind == "end":
            assert message.end.next_row == next_row == extraction.n_rows
            return {name: np.concatenate(values) for name, values in parts.items()}
    raise AssertionError("the stream ended without its end message")


if __name__ == "__main__":
    main(*sys.argv[1:])
    ours = {"headrace_client", "headrace_log", "headrace_chassis", "headrace_extractor", "headrace_registry"} & set(
        sys.modules
    )
    assert not ours, ours
