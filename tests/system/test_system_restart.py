"""SIGTERM with open streams, and a stop and start of everything."""

from __future__ import annotations

import threading
import time

import grpc
import pytest
from grpc import StatusCode

from fix_postgres import refusal_of
from fix_system import FAST, HOOKPOINT, MODEL, PATIENCE_S, At, Digest, columns_of, eventually, read, texts
from headrace.extractor.v1 import extraction_service_pb2 as service_pb
from headrace.extractor.v1 import extraction_service_pb2_grpc as service_grpc
from headrace_client import StreamTuning, errors
from headrace_client.values import ExtractionState, Retain, Window

pytestmark = pytest.mark.timeout(240)

DOCUMENTS = texts(1500, seed=9)
WINDOW = Window(window_bytes=1024 * 1024, reader_grace_s=PATIENCE_S)
NARROW = {"queue_bytes": 64 * 1024, "chunk_bytes": 8 * 1024}
GRACE_S = 5.0  # The grace with which fix_system starts the servers.


@pytest.fixture(scope="module")
def quiet(fragile):
    return read(fragile.client, start(fragile, Retain()))


def start(system, retention):
    return system.client.extractions.start(
        MODEL, system.variant(DOCUMENTS), HOOKPOINT, recipe=FAST, retention=retention
    )


def test_sigterm_ends_streams_and_watches_in_the_grace_and_they_go_on_after_the_restart(fragile, quiet, supervisor):
    extraction = start(fragile, WINDOW)
    raw, stopped, watched = [], [], []
    watching = threading.Thread(target=lambda: watched.extend(watch_to_the_end(fragile, extraction)))
    watching.start()

    def act():
        reading = threading.Thread(target=lambda: raw.append(refusal_of_stream(fragile, extraction.id)))
        reading.start()
        eventually(lambda: len(fragile.client.extractions.get(extraction.id).readers) == 2, "two readers are there")
        began = time.monotonic()
        stopped.append((fragile.extractor.terminate(), time.monotonic() - began))
        reading.join(PATIENCE_S)
        supervisor.later(1.0, fragile.extractor.start)

    stop = At(int(quiet["n_rows"]) // 4, act)

    assert read(fragile.client, extraction, on_rows=stop, **NARROW) == quiet
    watching.join(PATIENCE_S)
    assert watched[-1] is ExtractionState.DONE
    assert stopped[0][0] == 0
    assert stopped[0][1] < GRACE_S + 2.0
    assert (raw[0].code, raw[0].reason) == (StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert raw[0].retry_after_s > 0
    lines = fragile.extractor.log_lines()
    assert not [line for line in lines if line["level"] == "error"]


def refusal_of_stream(system, extraction_id):
    """Opens a stream with a bare stub, reads it to its end and says how it ended."""
    with grpc.insecure_channel(system.extractor.address) as channel:
        request = service_pb.StreamActivationsRequest(
            extraction_id=extraction_id, start_row=1_000_000, end_row=1_000_001
        )
        try:
            for _ in service_grpc.ExtractionServiceStub(channel).StreamActivations(request, timeout=PATIENCE_S):
                pass
        except grpc.RpcError as exc:
            return refusal_of(exc)
    raise AssertionError("the stream ended well")


def watch_to_the_end(system, extraction):
    return [event.extraction.state for event in system.client.extractions.watch(extraction.id, deadline_s=PATIENCE_S)]


def test_everything_is_still_there_after_a_stop_and_start_of_all(fragile, quiet):
    client = fragile.client
    extraction = start(fragile, Retain())
    assert read(client, extraction) == quiet
    unfinished = start(fragile, WINDOW)
    half = Digest()
    with client.chunks(unfinished, columns_of(unfinished), tuning=StreamTuning(**NARROW)) as stream:
        while half.n_rows < int(quiet["n_rows"]) // 3:
            half.add(next(stream))
    eventually(lambda: extraction.set_id in {each.id for each in client.sets.list()}, "the set is reported")
    before = everything(client)
    assert all(size_bytes > 0 for _, _, size_bytes in before["sets"])

    assert fragile.extractor.terminate() == 0
    assert fragile.registry.terminate() == 0
    eventually(lambda: fragile.postmaster() is None, "Postgres stops with its registry")
    with pytest.raises(errors.Unavailable):
        fragile.connect(deadline_s=2.0).models.get(MODEL)
    fragile.registry.start()
    fragile.extractor.start()

    eventually(lambda: {node.state for node in client.nodes()} == {"ALIVE"}, "the node is back")
    assert everything(client) == before
    assert read(client, extraction) == quiet
    again = client.extractions.start(MODEL, extraction.corpus_id, HOOKPOINT, recipe=FAST)
    assert client.extractions.wait(again.id, deadline_s=PATIENCE_S).cached
    assert again.set_id == extraction.set_id
    assert read(client, again) == quiet
    narrow = StreamTuning(**NARROW)
    with client.chunks(unfinished, columns_of(unfinished), start_row=half.n_rows, tuning=narrow) as stream:
        for chunk in stream:
            half.add(chunk)
    assert half.value == quiet


def everything(client):
    return {
        "models": [(model.id, model.state, model.commit_sha) for model in client.models.list()],
        "corpora": [(corpus.id, corpus.digest) for corpus in client.corpora.list()],
        "sets": sorted((each.id, each.n_rows, each.size_bytes) for each in client.sets.list() if each.complete),
        "extractions": sorted(
            (each.id, each.set_id, each.state, each.n_rows) for each in client.extractions.list() if each.ended
        ),
        "unfinished": sorted(each.id for each in client.extractions.list() if not each.ended),
    }
