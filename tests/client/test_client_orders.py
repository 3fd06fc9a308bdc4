"""Rows shuffled, sharded and mixed: every row once, columns aligned, resumed exactly from a small state."""

import json
import time
from dataclasses import replace

import grpc
import numpy as np
import pytest
import torch

from fix_scripted import unavailable
from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT, SECOND, Fault
from fix_system import eventually
from headrace.extractor.v1 import extraction_pb2 as ex_pb
from headrace.extractor.v1 import extraction_service_pb2 as service_pb
from headrace_client import Backoff, Reading, StreamTuning, errors
from headrace_client.reading import stream as stream_module
from headrace_client.reading.waits import Waited, shared_out
from headrace_client.values import Bottleneck, NormLimit

BLOCK = 32
SHUFFLED = Reading(order="shuffled", seed=9, block_rows=BLOCK)
MIXED = replace(SHUFFLED, mix_blocks=3)
MIXED_IN_SEQUENCE = Reading(seed=9, block_rows=BLOCK, mix_blocks=3)
COLUMNS = ["token_id", HOOKPOINT, SECOND]


DAMAGED = {"code": grpc.StatusCode.DATA_LOSS, "reason": "DIGEST_MISMATCH"}  # No new connection is tried.


def read(client, columns="token_id", **options):
    with client.activations(EXTRACTION_ID, columns=columns, **{"batch_size": 50, **options}) as stream:
        return list(stream)


def ids(batches):
    """Row numbers: the scripted extractor's token ids."""
    return [int(row) for batch in batches for row in (batch["token_id"] if isinstance(batch, dict) else batch)]


@pytest.mark.parametrize("reading", [SHUFFLED, MIXED, MIXED_IN_SEQUENCE])
def test_every_row_comes_once_in_another_order(client, scripted_extractor, reading):
    rows = ids(read(client, reading=reading))

    assert rows != sorted(rows)
    assert sorted(rows) == list(range(scripted_extractor.n_rows))
    assert rows == ids(read(client, reading=reading)), "the same seed, the same order"
    assert rows != ids(read(client, reading=replace(reading, seed=10)))


def test_columns_stay_aligned(client, scripted_extractor):
    for batch in read(client, COLUMNS, reading=MIXED):
        rows = batch["token_id"].numpy()
        for name in (HOOKPOINT, SECOND):
            np.testing.assert_array_equal(batch[name].numpy(), scripted_extractor.column(name)[rows])


def test_rows_are_mixed_within_windows_of_blocks(client, scripted_extractor):
    plain, mixed = ids(read(client, reading=SHUFFLED)), ids(read(client, reading=MIXED))

    window = 3 * BLOCK
    for start in range(0, scripted_extractor.n_rows, window):
        assert set(mixed[start : start + window]) == set(plain[start : start + window])
    assert sum(a == b for a, b in zip(plain, mixed, strict=True)) < 50


def test_epochs_follow_each_other_in_orders_of_their_own(client, scripted_extractor):
    rows = ids(read(client, reading=MIXED, epochs=3))

    n_rows = scripted_extractor.n_rows
    epochs = [rows[at : at + n_rows] for at in range(0, 3 * n_rows, n_rows)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(n_rows))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert [request.epoch for request in scripted_extractor.calls["StreamActivations"]] == [0, 1, 2]


@pytest.mark.parametrize(
    "reading", [SHUFFLED, MIXED, Reading(mix_blocks=3, block_rows=BLOCK), replace(MIXED, shard=(1, 3))]
)
@pytest.mark.parametrize("norm_limit", [None, NormLimit(absolute=20_000.0)])
def test_resumes_exactly_from_any_batch(client, reading, norm_limit):
    reading = replace(reading, norm_limit=norm_limit)
    options = {"reading": reading, "epochs": 2, "batch_size": 70, "columns": ["token_id", HOOKPOINT]}
    whole, states = [], []
    with client.activations(EXTRACTION_ID, **options) as stream:
        for batch in stream:
            whole.append(batch)
            states.append(json.loads(json.dumps(stream.state_dict())))
        final = stream.state_dict()
    assert len(whole) > 6

    for after in {0, 1, len(whole) // 2 - 1, len(whole) // 2, len(whole) - 2, len(whole) - 1}:
        with client.activations(EXTRACTION_ID, **options) as stream:
            stream.load_state_dict(states[after])
            rest = list(stream)
            assert stream.state_dict() == final
        assert ids(rest) == ids(whole[after + 1 :])


def test_a_state_is_that_of_the_last_batch_whenever_it_is_taken(client, scripted_extractor):
    scripted_extractor.faults.append(Fault("hang", after=4))
    states, told = [], []
    options = {"reading": MIXED, "columns": "token_id", "batch_size": 70, "tuning": StreamTuning(silence_s=0.7)}

    def tell(_):
        told.append((len(states), stream.state_dict()))

    with client.activations(EXTRACTION_ID, **options, on_progress=tell) as stream:
        states.append(stream.state_dict())
        for _ in range(3):
            next(stream)
            states.append(stream.state_dict())

    assert len([n_states for n_states, _ in told if n_states == 2]) >= 2, "it was asked while a batch was awaited"
    assert all(state == states[n_states - 1] for n_states, state in told)
    assert stream.state_dict() == states[-1], "closed"


@pytest.mark.parametrize("n_chunks", range(1, 9))
def test_resumes_exactly_behind_an_error(client, scripted_extractor, n_chunks):
    options = {"reading": MIXED, "columns": "token_id", "batch_size": 70}
    whole = ids(read(client, **options))
    scripted_extractor.faults.append(Fault("cut", after=n_chunks, status=DAMAGED))

    with client.activations(EXTRACTION_ID, **options) as stream:
        got = []
        with pytest.raises(errors.DataLoss):
            got.extend(iter(stream))
        state = stream.state_dict()
    with client.activations(EXTRACTION_ID, **options) as stream:
        stream.load_state_dict(state)
        got += list(stream)

    assert ids(got) == whole


def test_a_batch_that_is_whole_is_handed_out_before_an_error(client, scripted_extractor):
    whole = read(client, reading=MIXED, batch_size=40)
    scripted_extractor.faults.append(Fault("cut", after=3, status=DAMAGED))

    with client.activations(EXTRACTION_ID, columns="token_id", batch_size=40, reading=MIXED) as stream:
        got = [next(stream)]
        time.sleep(0.2)  # By now the stream has failed; the window of 96 rows is here.
        got.append(next(stream))
        for _ in range(2):
            with pytest.raises(errors.DataLoss):
                next(stream)

    assert ids(got) == ids(whole[:2])
    assert (stream.state_dict()["next_row"], stream.state_dict()["offset"]) == (0, 80)


def test_resumes_in_a_window_whose_rest_is_no_whole_batch(client, scripted_extractor):
    reading = replace(SHUFFLED, mix_blocks=32)
    options = {"reading": reading, "columns": "token_id", "batch_size": 400, "drop_last": True}
    whole = ids(read(client, **options, epochs=2))
    with client.activations(EXTRACTION_ID, **options, epochs=None) as stream:
        next(stream), next(stream)
        state = stream.state_dict()

    with client.activations(EXTRACTION_ID, **options, epochs=None) as stream:
        stream.load_state_dict(state)

        assert ids([next(stream), next(stream)]) == whole[800:]


@pytest.mark.parametrize("reading", [SHUFFLED, MIXED])
def test_a_shuffled_state_of_another_number_of_rows_is_refused(client, scripted_extractor, reading):
    """An extraction of more rows of the same set permutes other blocks."""
    with client.activations(EXTRACTION_ID, reading=reading) as stream:
        state = json.loads(json.dumps(stream.state_dict()))
    older = {name: value for name, value in state.items() if name != "max_rows"}

    scripted_extractor.extraction.spec.max_rows = 500

    with client.activations(EXTRACTION_ID, reading=reading) as stream:
        with pytest.raises(errors.InvalidArgument, match="max_rows"):
            stream.load_state_dict(state)
        stream.load_state_dict(older)


def test_a_state_in_sequence_goes_with_any_number_of_rows(client, scripted_extractor):
    with client.activations(EXTRACTION_ID, batch_size=70) as stream:
        next(stream)
        state = stream.state_dict()
    scripted_extractor.extraction.spec.max_rows = 1000

    with client.activations(EXTRACTION_ID, batch_size=70) as stream:
        stream.load_state_dict(state)

        assert stream.next_row == 70


def test_rows_of_a_window_are_not_mixed(client, scripted_extractor):
    """Mixing takes rows, and so releases them, long before they are handed out."""
    scripted_extractor.extraction.spec.retention.kind = ex_pb.RETENTION_KIND_WINDOW

    with pytest.raises(errors.InvalidArgument, match="mix_blocks=0"):
        client.activations(EXTRACTION_ID, reading=Reading(block_rows=BLOCK, mix_blocks=3))


def test_a_state_of_another_order_is_refused(client):
    with client.activations(EXTRACTION_ID, reading=MIXED) as stream:
        state = stream.state_dict()

    for change in ({"seed": 1}, {"mix_blocks": 2}, {"order": "sequential"}, {"shard": (0, 2)}, {"block_rows": 8}):
        stream = client.activations(EXTRACTION_ID, reading=replace(MIXED, **change))
        with stream, pytest.raises(errors.InvalidArgument):
            stream.load_state_dict(state)


def test_shards_have_equal_numbers_of_batches_and_no_row_in_common(client, scripted_extractor):
    shards = [read(client, reading=replace(MIXED, shard=(index, 3)), epochs=2) for index in range(3)]

    assert len({len(batches) for batches in shards}) == 1
    per_epoch = scripted_extractor.n_rows // BLOCK // 3 * BLOCK
    firsts = [ids(batches)[:per_epoch] for batches in shards]
    assert len({row for rows in firsts for row in rows}) == 3 * per_epoch


def test_a_shuffled_stream_survives_cuts(client, scripted_extractor):
    undisturbed = ids(read(client, reading=MIXED))
    scripted_extractor.faults.extend(Fault("cut", after=n, status=unavailable()) for n in (3, 0, 5))

    tuning = StreamTuning(backoff=Backoff(first_s=0.01, most_s=0.02))
    with client.chunks(EXTRACTION_ID, "token_id", reading=SHUFFLED, tuning=tuning) as stream:
        chunks = list(stream)

    assert stream.progress().n_reconnects == 3
    rows = np.concatenate([chunk.array("token_id") for chunk in chunks])
    assert sorted(rows) == sorted(undisturbed)
    assert [chunk.place for chunk in chunks] == sorted({chunk.place for chunk in chunks})
    assert all(chunk.n_rows <= BLOCK for chunk in chunks)


def test_batches_can_be_skipped_without_reading_them(client, scripted_extractor):
    options = {"reading": MIXED, "epochs": 3, "drop_last": True}
    whole = read(client, **options)
    with client.activations(EXTRACTION_ID, columns="token_id", batch_size=50, **options) as stream:
        for n_batches in (0, 1, 19, 20, 21, 45, len(whole) - 1):
            stream.skip_batches(n_batches)

            torch.testing.assert_close(next(stream), whole[n_batches])


def test_a_server_that_knows_no_orders_is_not_believed(client, scripted_extractor, monkeypatch):
    header = type(scripted_extractor)._header

    def without_blocks(self, *args):
        answer = header(self, *args)
        answer.header.block_rows = 0
        return answer

    monkeypatch.setattr(type(scripted_extractor), "_header", without_blocks)

    with client.chunks(EXTRACTION_ID, reading=SHUFFLED) as stream, pytest.raises(errors.Unimplemented, match="update"):
        next(stream)


@pytest.mark.parametrize(
    "options", [{"order": "random"}, {"shard": (2, 2)}, {"seed": -1}, {"block_rows": -1}, {"mix_blocks": -1}]
)
def test_orders_out_of_range_are_refused_here(options):
    with pytest.raises(errors.InvalidArgument):
        Reading(**options)


@pytest.mark.parametrize("reading", [MIXED, Reading(norm_limit=NormLimit(absolute=1.0))])
def test_chunks_are_neither_mixed_nor_filtered(client, reading):
    with pytest.raises(errors.InvalidArgument, match="activations"):
        client.chunks(EXTRACTION_ID, reading=reading)


def test_a_shard_of_a_window_releases_the_blocks_of_the_others_too(client, scripted_extractor):
    scripted_extractor.extraction.spec.retention.kind = ex_pb.RETENTION_KIND_WINDOW

    reading = Reading(shard=(1, 2), block_rows=BLOCK)
    with client.chunks(EXTRACTION_ID, "token_id", reading=reading, tuning=StreamTuning(queue_bytes=64)) as stream:
        rows = [int(row) for chunk in stream for row in chunk.array("token_id")]
        eventually(lambda: scripted_extractor.calls["ReleaseRows"], "a release")
        released = [call.row for call in scripted_extractor.calls["ReleaseRows"]]

    assert rows[:BLOCK] == list(range(BLOCK, 2 * BLOCK))
    assert set(released) <= {row for row in range(1001) if row // BLOCK % 2 == 1}, "always the next row of this shard"


# -- rows that are too long --------------------------------------------------------------------------------------------


def norms(scripted_extractor, name=HOOKPOINT):
    return np.linalg.norm(scripted_extractor.column(name).astype(np.float64), axis=1)


@pytest.mark.parametrize("reading", [Reading(), MIXED])
def test_long_rows_are_left_out_of_all_columns_and_counted(client, scripted_extractor, reading):
    limit = float(np.sort(norms(scripted_extractor))[100]) + 0.01

    reading = replace(reading, norm_limit=NormLimit(absolute=limit, columns=(HOOKPOINT,)))

    with client.activations(EXTRACTION_ID, columns=COLUMNS, batch_size=50, reading=reading) as stream:
        batches = list(stream)
        progress = stream.progress()

    assert sorted(ids(batches)) == [row for row in range(1000) if norms(scripted_extractor)[row] <= limit]
    assert stream.n_dropped == progress.n_dropped == 899
    assert {len(batch["token_id"]) for batch in batches[:-1]} == {50}
    for batch in batches:
        expected = scripted_extractor.column(SECOND)[batch["token_id"].numpy()]
        np.testing.assert_array_equal(batch[SECOND].numpy(), expected)


def test_a_multiple_is_of_the_mean_norm_in_the_header(client, scripted_extractor):
    mean = float(norms(scripted_extractor).mean())
    scripted_extractor.statistics = [service_pb.ColumnStatistics(name=HOOKPOINT, count=10, mean_norm=mean)]

    rows = ids(read(client, ["token_id", HOOKPOINT], reading=Reading(norm_limit=NormLimit(multiple=1.5))))

    assert rows == [row for row in range(1000) if norms(scripted_extractor)[row] <= 1.5 * mean]


def test_a_multiple_of_an_unknown_mean_is_a_typed_error(client):
    with pytest.raises(errors.FailedPrecondition) as caught:
        read(client, ["token_id", HOOKPOINT], reading=Reading(norm_limit=NormLimit(multiple=10.0)))

    assert caught.value.reason == "STATISTICS_MISSING"
    assert "absolute" in caught.value.remedy


@pytest.mark.parametrize("limit", [{}, {"absolute": 0}, {"multiple": float("nan")}])
def test_norm_limits_make_sense(limit):
    with pytest.raises(errors.InvalidArgument):
        NormLimit(**limit)


# -- waits and bottlenecks ---------------------------------------------------------------------------------------------


def test_a_slow_step_is_told_from_slow_rows(client, scripted_extractor):
    with client.activations(EXTRACTION_ID, batch_size=50) as stream:
        for _ in stream:
            time.sleep(0.02)
        progress = stream.progress()

    assert progress.step_s >= 20 * 0.02
    assert progress.step_s > 2 * progress.wait_s
    assert progress.bottleneck is Bottleneck.CONSUMER


@pytest.mark.parametrize("told", [True, False])
def test_a_slow_extractor_is_told_from_a_slow_network(client, scripted_extractor, monkeypatch, told):
    rows = type(scripted_extractor)._rows

    def slow_rows(self, *args):
        for message in rows(self, *args):
            if told:
                progress = service_pb.StreamProgress(n_rows=0, state=ex_pb.EXTRACTION_STATE_RUNNING)
                yield service_pb.StreamActivationsResponse(progress=progress)
            time.sleep(0.03)
            yield message

    monkeypatch.setattr(type(scripted_extractor), "_rows", slow_rows)
    with client.activations(EXTRACTION_ID, batch_size=64) as stream:
        next(stream)
        for _ in range(10):
            next(stream)
            progress = stream.progress()

    assert progress.wait_s > 2 * progress.step_s
    assert progress.bottleneck is (Bottleneck.EXTRACTOR if told else Bottleneck.NETWORK)


@pytest.mark.parametrize("told", [True, False])
def test_a_long_wait_is_judged_by_the_servers_last_word(client, scripted_extractor, monkeypatch, told):
    monkeypatch.setattr(stream_module, "_RATE_WINDOW_S", 0.2)  # Shorter than the pause between a server's messages.
    scripted_extractor.progress_first = int(told)
    scripted_extractor.faults.append(Fault("hang"))

    with client.chunks(EXTRACTION_ID) as stream:
        bottlenecks = []
        for _ in range(10):
            assert stream.take(0.1) is None
            bottlenecks.append(stream.progress().bottleneck)

    assert set(bottlenecks[-5:]) == {Bottleneck.EXTRACTOR if told else Bottleneck.NETWORK}


def test_a_wait_belongs_to_whom_the_server_names_when_it_is_over():
    silent = Waited(since=0.0)

    assert silent.by(4.0) == (0.0, 4.0)
    told = silent.over(5.0, no_rows=True).begun(5.0)
    assert told.by(9.0) == (9.0, 0.0)
    come = told.over(10.0)
    assert come.by(99.0) == (10.0, 0.0), "busy with rows"
    assert come.begun(99.0).by(100.0) == (10.0, 1.0)


def test_blame_that_is_taken_back_is_no_share():
    assert shared_out(0.9, 5.0, -4.0) == (0.9, 0.0)
