"""Rows arrive once, in order, over as many connections as it takes; or a typed error does."""

import gc
import json
import threading
import time
from dataclasses import replace

import grpc
import numpy as np
import pytest

from fix_scripted import unavailable
from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT, PROVENANCE, Fault
from fix_system import eventually
from headrace.extractor.v1 import extraction_pb2 as ex_pb
from headrace_client import Backoff, HeadraceClient, StreamTuning, errors
from headrace_client.reading import chunk_queue
from headrace_client.reading.outage import Outage
from headrace_client.reading.source import RELEASE_DEADLINE_S
from headrace_client.rpc.http2 import SocketCall
from headrace_client.values import StreamState

FAST = StreamTuning(backoff=Backoff(first_s=0.01, most_s=0.05))


def rows_of(stream, name=HOOKPOINT):
    return np.concatenate([chunk.array(name) for chunk in stream])


def stream_threads():
    return [t for t in threading.enumerate() if t.name.startswith("headrace-")]


def test_streams_all_rows_in_order(client, scripted_extractor):
    columns = [HOOKPOINT, *PROVENANCE]

    with client.chunks(EXTRACTION_ID, columns) as stream:
        chunks = list(stream)

    for name in columns:
        got = np.concatenate([chunk.array(name) for chunk in chunks])
        np.testing.assert_array_equal(got, scripted_extractor.column(name))
    assert stream.next_row == scripted_extractor.n_rows
    assert stream.ended


def test_row_range_is_asked_of_the_server(client, scripted_extractor):
    with client.chunks(EXTRACTION_ID, start_row=100, end_row=300) as stream:
        got = rows_of(stream)

    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT)[100:300])


@pytest.mark.parametrize("reason", ["RUNNER_LOST", "SHUTTING_DOWN", "NODE_LOST", ""])
def test_resumes_exactly_after_a_cut(client, scripted_extractor, reason):
    scripted_extractor.faults.extend(Fault("cut", after=n, status=unavailable(reason)) for n in (3, 0, 5))

    with client.chunks(EXTRACTION_ID, tuning=FAST) as stream:
        got = rows_of(stream)

    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT))
    starts = [request.start_row for request in scripted_extractor.calls["StreamActivations"]]
    assert starts == [0, 192, 192, 512]
    assert stream.progress().n_reconnects == 3


def test_resumes_exactly_after_the_server_was_replaced(client, extractor_host, scripted_extractor):
    scripted_extractor.rows_per_chunk = 1
    scripted_extractor.faults.append(Fault("hang", after=500))

    with client.chunks(EXTRACTION_ID, tuning=FAST) as stream:
        got = [next(stream).array(HOOKPOINT) for _ in range(100)]
        extractor_host.stop()
        time.sleep(0.1)
        extractor_host.start()
        got += [chunk.array(HOOKPOINT) for chunk in stream]

    np.testing.assert_array_equal(np.concatenate(got), scripted_extractor.column(HOOKPOINT))


def test_a_stream_of_a_given_extractor_waits_for_it(client, extractor_host, scripted_extractor):
    extraction = client.extractions.get(EXTRACTION_ID)
    extractor_host.stop()

    with (
        HeadraceClient.connect(extractor=extractor_host.address) as other,
        other.chunks(extraction, tuning=FAST) as stream,
    ):
        time.sleep(0.1)
        extractor_host.start()
        got = rows_of(stream)

    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT))


def test_goes_on_at_the_node_s_new_address(client, hosts, extractor_host, scripted_extractor, scripted_registry):
    scripted_extractor.faults.append(Fault("hang", after=4))
    stream = client.chunks(EXTRACTION_ID, tuning=FAST)
    first = next(stream)
    new = hosts(scripted_extractor)
    scripted_registry.nodes[0].address = new.address
    extractor_host.stop()

    with stream:
        got = np.concatenate([first.array(HOOKPOINT), rows_of(stream)])

    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT))


def test_resumes_while_the_registry_is_away(client, registry_host, scripted_extractor):
    scripted_extractor.faults.append(Fault("cut", after=4))
    stream = client.chunks(EXTRACTION_ID, tuning=replace(FAST, queue_bytes=1))
    first = next(stream)
    registry_host.stop()

    with stream:
        got = np.concatenate([first.array(HOOKPOINT), rows_of(stream)])

    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT))


def test_a_silent_server_is_left_and_connected_again(client, scripted_extractor):
    scripted_extractor.faults.append(Fault("hang", after=2))

    with client.chunks(EXTRACTION_ID, tuning=replace(FAST, silence_s=0.3)) as stream:
        got = rows_of(stream)

    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT))
    assert len(scripted_extractor.calls["StreamActivations"]) == 2


def test_a_slow_consumer_is_not_taken_for_a_silent_server(client, scripted_extractor):
    with client.chunks(EXTRACTION_ID, tuning=StreamTuning(silence_s=0.2, queue_bytes=1)) as stream:
        first = next(stream)
        time.sleep(0.8)
        got = np.concatenate([first.array(HOOKPOINT), rows_of(stream)])

    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT))
    assert len(scripted_extractor.calls["StreamActivations"]) == 1


def test_no_row_within_the_reconnect_deadline_is_a_typed_error(client, scripted_extractor):
    scripted_extractor.faults.append(Fault("cut", after=2))
    scripted_extractor.faults.extend(Fault("cut") for _ in range(1000))

    with client.chunks(EXTRACTION_ID, tuning=replace(FAST, reconnect_deadline_s=0.3)) as stream:
        got = [next(stream), next(stream)]
        with pytest.raises(errors.StreamLost) as caught:
            next(stream)

    assert caught.value.metadata == {"next_row": "128", "last_reason": "RUNNER_LOST"}
    assert caught.value.remedy
    assert [chunk.first_row for chunk in got] == [0, 64]


def test_a_server_that_never_speaks_is_a_typed_error(client, scripted_extractor):
    scripted_extractor.hang.add("StreamActivations")

    tuning = replace(FAST, silence_s=0.1, reconnect_deadline_s=0.3)
    stream = client.chunks(EXTRACTION_ID, tuning=tuning)
    with stream, pytest.raises(errors.StreamLost) as caught:
        next(stream)

    assert caught.value.metadata["last_reason"] == "STREAM_SILENT"


def test_progress_keeps_a_stream_without_rows_alive():
    now = [0.0]
    outage = Outage(deadline_s=10, backoff=FAST.backoff, clock=lambda: now[0])
    gone = errors.RunnerLost("gone")

    for _ in range(5):
        now[0] += 60  # The server waits for a model, says so, and is cut off then.
        outage.alive()
        outage.pause_s(gone, 0)
        now[0] += 1
        outage.alive()
    outage.pause_s(gone, 0)
    now[0] += 6

    with pytest.raises(errors.StreamLost):
        outage.pause_s(gone, 0)


@pytest.mark.parametrize("kind", ["gap", "overlap"])
def test_a_gap_or_an_overlap_is_data_loss(client, scripted_extractor, kind):
    scripted_extractor.faults.append(Fault(kind, after=3))

    with client.chunks(EXTRACTION_ID, tuning=FAST) as stream:
        got = [next(stream) for _ in range(3)]
        with pytest.raises(errors.DataLoss) as caught:
            next(stream)

    assert caught.value.reason == "ROWS_NOT_CONTIGUOUS"
    assert got[-1].end_row == 192
    assert len(scripted_extractor.calls["StreamActivations"]) == 1


def test_another_set_after_a_reconnect_is_data_loss(client, scripted_extractor):
    scripted_extractor.faults.extend([Fault("cut", after=1), Fault("other_set")])

    with client.chunks(EXTRACTION_ID, tuning=FAST) as stream:
        next(stream)
        with pytest.raises(errors.RowsNotContiguous):
            next(stream)


def test_an_end_without_its_message_is_no_end(client, scripted_extractor):
    scripted_extractor.faults.append(Fault("no_end", after=2))

    with client.chunks(EXTRACTION_ID, tuning=FAST) as stream:
        got = rows_of(stream)

    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT))


def test_a_refusal_arrives_at_once(client):
    stream = client.chunks(EXTRACTION_ID, "blocks.1.hook_resid_pots")
    with stream, pytest.raises(errors.HookpointNotFound) as caught:
        next(stream)

    assert caught.value.nearest == (HOOKPOINT,)


def test_too_many_streams_is_waited_out_only_after_a_cut(client, scripted_extractor):
    busy = {"code": grpc.StatusCode.RESOURCE_EXHAUSTED, "reason": "TOO_MANY_STREAMS"}
    scripted_extractor.faults.append(Fault("cut", after=0, status=busy))
    with client.chunks(EXTRACTION_ID, tuning=FAST) as stream, pytest.raises(errors.TooManyStreams):
        next(stream)

    scripted_extractor.faults.extend([Fault("cut", after=1), Fault("cut", after=0, status=busy)])
    with client.chunks(EXTRACTION_ID, tuning=FAST) as stream:
        got = rows_of(stream)

    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT))


def test_a_closed_client_has_no_open_streams(client, scripted_extractor):
    scripted_extractor.faults.append(Fault("hang", after=1))
    stream = client.chunks(EXTRACTION_ID)
    next(stream)

    client.close()

    assert not stream_threads()
    with pytest.raises(errors.Cancelled):
        next(stream)


def test_close_ends_a_hanging_stream_at_once(client, scripted_extractor):
    scripted_extractor.faults.append(Fault("hang"))
    stream = client.chunks(EXTRACTION_ID)
    assert stream.header.set_id == "set-1"

    began = time.monotonic()
    stream.close()

    assert time.monotonic() - began < 3
    assert not stream_threads()
    with pytest.raises(errors.Cancelled):
        next(stream)


def test_iteration_stops_and_goes_on(client, scripted_extractor):
    with client.chunks(EXTRACTION_ID) as stream:
        for chunk in stream:
            first = chunk
            break
        got = np.concatenate([first.array(HOOKPOINT), rows_of(stream)])

    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT))


def test_a_dropped_stream_ends_its_threads(client, scripted_extractor):
    scripted_extractor.faults.append(Fault("hang", after=1))
    stream = client.chunks(EXTRACTION_ID)
    next(stream)

    del stream
    gc.collect()

    assert not stream_threads()


def test_the_queue_is_bounded_in_bytes(client, scripted_extractor):
    with client.chunks(EXTRACTION_ID, tuning=StreamTuning(queue_bytes=10_000)) as stream:
        next(stream)
        time.sleep(0.2)
        queued = stream.progress().queued_bytes

    assert 0 < queued <= 10_000


def test_a_full_queue_keeps_the_connection_alive(client, scripted_extractor, monkeypatch):
    tended = threading.Semaphore(0)
    tend = SocketCall.tend
    monkeypatch.setattr(SocketCall, "tend", lambda call: (tend(call), tended.release()))
    monkeypatch.setattr(chunk_queue, "_PAUSE_S", 0.01)

    with client.chunks(EXTRACTION_ID, tuning=StreamTuning(queue_bytes=1)) as stream:
        for _ in range(3):
            assert tended.acquire(timeout=5)
        got = rows_of(stream)

    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT))


def test_rows_of_a_window_are_released_as_they_are_taken(client, scripted_extractor):
    scripted_extractor.extraction.spec.retention.kind = ex_pb.RETENTION_KIND_WINDOW
    scripted_extractor.window_rows = 128

    with client.chunks(EXTRACTION_ID, reader="me") as stream:
        got = rows_of(stream)
        assert 128 <= scripted_extractor.released <= scripted_extractor.n_rows

    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT))
    request = scripted_extractor.calls["StreamActivations"][0]
    assert (request.explicit_release, request.reader) == (True, "me")
    assert {call.reader for call in scripted_extractor.calls["ReleaseRows"]} == {"me"}


def test_releases_carry_the_name_that_the_server_gave(client, scripted_extractor):
    """A connection that broke may still hold the name asked for."""
    scripted_extractor.extraction.spec.retention.kind = ex_pb.RETENTION_KIND_WINDOW
    scripted_extractor.window_rows = 128
    scripted_extractor.named = "me#2"

    with client.chunks(EXTRACTION_ID, reader="me") as stream:
        rows_of(stream)

    assert {call.reader for call in scripted_extractor.calls["ReleaseRows"]} == {"me#2"}


def test_a_closed_reader_of_a_window_has_said_that_it_comes_no_more(registry_host, scripted_extractor, monkeypatch):
    scripted_extractor.extraction.spec.retention.kind = ex_pb.RETENTION_KIND_WINDOW
    note, told = scripted_extractor.note, []

    def slow(method, request, context):
        note(method, request, context)
        if method == "ReleaseRows":
            time.sleep(0.3)  # A closed connection would have ended the call by now.
            told.append(request.row if context.is_active() else "nobody listens")

    monkeypatch.setattr(scripted_extractor, "note", slow)

    with HeadraceClient.connect(registry_host.address) as client, client.chunks(EXTRACTION_ID) as stream:
        next(stream)

    assert told == [(1 << 63) - 1]


def test_a_server_that_does_not_answer_does_not_keep_a_reader_of_a_window(client, scripted_extractor):
    scripted_extractor.extraction.spec.retention.kind = ex_pb.RETENTION_KIND_WINDOW
    scripted_extractor.hang.add("ReleaseRows")
    stream = client.chunks(EXTRACTION_ID)
    next(stream)

    began = time.monotonic()
    stream.close()
    client.close()

    assert time.monotonic() - began < RELEASE_DEADLINE_S
    eventually(lambda: not stream_threads(), "the end of all threads")


def test_rows_that_were_not_taken_are_not_released(client, scripted_extractor):
    scripted_extractor.extraction.spec.retention.kind = ex_pb.RETENTION_KIND_WINDOW

    with client.chunks(EXTRACTION_ID) as stream:
        next(stream)
        next(stream)
        eventually(lambda: scripted_extractor.released, "a release")
        time.sleep(0.2)  # Another release would come in this time.

        assert scripted_extractor.released == 64


def test_rows_of_a_retained_set_are_not_released(client, scripted_extractor):
    with client.chunks(EXTRACTION_ID) as stream:
        rows_of(stream)

    assert not scripted_extractor.calls["ReleaseRows"]
    assert not scripted_extractor.calls["StreamActivations"][0].explicit_release


def test_progress_tells_rows_state_and_who_waits(client, scripted_extractor):
    scripted_extractor.progress_first = 2
    scripted_extractor.faults.append(Fault("hang", after=2))

    with client.chunks(EXTRACTION_ID) as stream:
        next(stream)
        next(stream)
        stream.progress()
        assert stream.take(0.3) is None
        progress = stream.progress()

    assert (progress.rows, progress.next_row, progress.end_row) == (128, 128, 1000)
    assert progress.state is StreamState.STREAMING
    assert progress.extraction_state == "RUNNING"
    assert progress.stream_wait > 0.5
    assert progress.size_bytes >= 128 * 32


def test_bfloat16_comes_as_bits_with_its_name(client, scripted_extractor):
    scripted_extractor.dtype = "bfloat16"

    with client.chunks(EXTRACTION_ID) as stream:
        chunk = next(stream)

    assert chunk.dtypes == {HOOKPOINT: "bfloat16"}
    np.testing.assert_array_equal(chunk.array(HOOKPOINT), scripted_extractor.column(HOOKPOINT)[:64])


def test_messages_beyond_grpcs_default_limit_are_always_accepted(client, scripted_extractor):
    for chunk_bytes in (0, 1 << 20, 8 << 20):
        with client.chunks(EXTRACTION_ID, tuning=StreamTuning(chunk_bytes=chunk_bytes)) as stream:
            next(stream)

    asked = [(one.chunk_bytes, one.allow_large_chunks) for one in scripted_extractor.calls["StreamActivations"]]
    assert asked == [(0, True), (1 << 20, True), (8 << 20, True)]


def test_errors_survive_pickling_and_json(client):
    import pickle  # noqa: PLC0415

    error = errors.StreamLost("x", metadata={"next_row": "1"}, retry_after_s=2.0)
    again = pickle.loads(pickle.dumps(error))

    assert (type(again), str(again), again.metadata, again.remedy) == (
        type(error),
        str(error),
        error.metadata,
        error.remedy,
    )
    json.dumps(again.metadata)


def test_a_stream_opened_while_the_server_is_away_waits_for_it(client, extractor_host, scripted_extractor):
    extraction = client.extractions.get(EXTRACTION_ID)
    extractor_host.stop()
    stream = client.chunks(extraction, tuning=FAST)
    time.sleep(0.2)
    extractor_host.start()

    with stream:
        got = rows_of(stream)

    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT))
