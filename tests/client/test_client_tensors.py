"""Batches are fresh tensors, cut exactly, in the dtype asked for."""

import json
import time

import pytest
import torch

from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT, PROVENANCE, SECOND, Fault
from headrace.extractor.v1 import extraction_pb2 as ex_pb
from headrace_client import NormLimit, Reading, StreamTuning, errors
from headrace_client.integrations.sae_lens import data_provider
from headrace_client.reading import tensors


def expected(extractor, name=HOOKPOINT):
    return torch.from_numpy(extractor.column(name).copy())


def test_batches_hold_all_rows_in_order_across_chunks(client, scripted_extractor):
    with client.activations(EXTRACTION_ID, batch_size=100) as stream:
        batches = list(stream)

    assert [tuple(batch.shape) for batch in batches] == [(100, 8)] * 10
    assert torch.equal(torch.cat(batches), expected(scripted_extractor))


@pytest.mark.parametrize("batch_size", [32, 50, 64, 100])
@pytest.mark.parametrize("columns", [HOOKPOINT, [HOOKPOINT, SECOND, *PROVENANCE]])
def test_batches_that_are_no_copies_are_the_same(client, scripted_extractor, batch_size, columns):
    """Chunks have 64 rows here: some batches lie in one, some don't."""
    options = {"batch_size": batch_size, "columns": columns, "tuning": StreamTuning(copy=False)}
    with client.activations(EXTRACTION_ID, **options) as stream:
        first = [next(stream) for _ in range(3)]
        state = stream.state_dict()
    with client.activations(EXTRACTION_ID, **options) as stream:
        stream.load_state_dict(state)
        batches = [*first, *stream]

    for name in [columns] if isinstance(columns, str) else columns:
        of_name = [batch if isinstance(batch, torch.Tensor) else batch[name] for batch in batches]
        assert {len(batch) for batch in of_name[:-1]} == {batch_size}
        assert torch.equal(torch.cat(of_name), expected(scripted_extractor, name))


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"), [(300, False, [300, 300, 300, 100]), (300, True, [300] * 3)]
)
def test_the_last_batch_is_short_or_left_out(client, batch_size, drop_last, sizes):
    with client.activations(EXTRACTION_ID, batch_size=batch_size, drop_last=drop_last) as stream:
        assert [len(batch) for batch in stream] == sizes


def test_changing_a_batch_in_place_does_not_touch_the_next(client, scripted_extractor):
    with client.activations(EXTRACTION_ID, batch_size=50) as stream:
        first = next(stream)
        kept = first.clone()
        first.fill_(-1)
        rest = list(stream)

    assert torch.equal(torch.cat([kept, *rest]), expected(scripted_extractor))
    assert torch.all(first == -1)


def test_several_columns_come_as_a_dict_with_provenance(client, scripted_extractor):
    columns = [HOOKPOINT, SECOND, *PROVENANCE]

    with client.activations(EXTRACTION_ID, batch_size=128, columns=columns) as stream:
        batches = list(stream)

    assert list(batches[0]) == columns
    for name in columns:
        assert torch.equal(torch.cat([batch[name] for batch in batches]), expected(scripted_extractor, name))
    assert batches[0]["token_id"].shape == (128,)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.float64])
def test_stored_dtypes_are_kept_or_converted_while_copying(client, scripted_extractor, stored, asked):
    scripted_extractor.dtype = stored
    bits = expected(scripted_extractor)
    whole = bits.view(torch.bfloat16) if stored == "bfloat16" else bits

    with client.activations(EXTRACTION_ID, batch_size=90, dtype=asked, columns=[HOOKPOINT]) as stream:
        got = torch.cat(list(stream))

    assert got.dtype == (asked or getattr(torch, stored))
    assert torch.equal(got, whole.to(got.dtype))


def test_a_cut_in_the_middle_of_a_batch_loses_nothing(client, scripted_extractor):
    scripted_extractor.faults.extend([Fault("cut", after=1), Fault("cut", after=2)])

    with client.activations(EXTRACTION_ID, batch_size=333) as stream:
        got = torch.cat(list(stream))

    assert torch.equal(got, expected(scripted_extractor))


def test_a_checkpoint_resumes_behind_the_last_batch(client, scripted_extractor):
    with client.activations(EXTRACTION_ID, batch_size=70) as stream:
        got = [next(stream) for _ in range(4)]
        state = json.loads(json.dumps(stream.state_dict()))

    with client.activations(EXTRACTION_ID, batch_size=70) as again:
        again.load_state_dict(state)
        got += list(again)

    assert state["next_row"] == 280
    assert torch.equal(torch.cat(got), expected(scripted_extractor))


def test_a_checkpoint_of_another_set_is_refused(client):
    with client.activations(EXTRACTION_ID) as stream, pytest.raises(errors.InvalidArgument):
        stream.load_state_dict({"next_row": 1, "epoch": 0, "set_id": "other"})


def test_epochs_repeat_the_rows(client, scripted_extractor):
    with client.activations(EXTRACTION_ID, batch_size=400, epochs=2, start_row=200) as stream:
        got = list(stream)
        progress = stream.progress()

    part = expected(scripted_extractor)[200:]
    assert [len(batch) for batch in got] == [400, 400, 400, 400]
    assert torch.equal(torch.cat(got), torch.cat([part, part]))
    assert progress.rows == 1600


def test_endless_epochs_go_on(client):
    with client.activations(EXTRACTION_ID, batch_size=1000, epochs=None) as stream:
        for _ in range(5):
            next(stream)

        assert stream.epoch == 4


def test_endless_epochs_without_a_batch_are_an_error(client):
    stream = client.activations(EXTRACTION_ID, batch_size=2000, epochs=None, drop_last=True)
    with stream, pytest.raises(errors.InvalidArgument):
        next(stream)


def test_a_window_is_read_once_only(client, scripted_extractor):
    scripted_extractor.extraction.spec.retention.kind = ex_pb.RETENTION_KIND_WINDOW

    with pytest.raises(errors.InvalidArgument, match="epochs=1"):
        client.activations(EXTRACTION_ID, epochs=None)


def test_progress_is_told_while_rows_come_and_while_they_do_not(client, scripted_extractor):
    scripted_extractor.faults.append(Fault("hang", after=8))
    seen = []

    tuning = StreamTuning(silence_s=0.7)
    with client.activations(EXTRACTION_ID, batch_size=256, on_progress=seen.append, tuning=tuning) as stream:
        total = sum(len(batch) for batch in stream)

    assert total == 1000
    assert {one.rows for one in seen} >= {1000}
    assert len(seen) >= 3  # `on_progress` was called during the hang, five times a second.
    assert all(0 <= one.stream_wait <= 1 and 0 <= one.consumer_wait <= 1 for one in seen)


class Interrupted(Exception):
    """Ctrl-C, or a bug in `on_progress`."""


@pytest.mark.parametrize(
    "options", [{}, {"tuning": StreamTuning(copy=False)}, {"reading": Reading(block_rows=32, mix_blocks=3)}]
)
def test_a_batch_outlives_an_exception_in_on_progress(client, monkeypatch, options):
    monkeypatch.setattr(tensors, "_PROGRESS_EVERY_S", 0.0)
    options = {"batch_size": 32, "columns": "token_id", **options}
    told, got = [], []
    with client.activations(EXTRACTION_ID, **options) as stream:
        whole = [batch.clone() for batch in stream]

    def tell(_):
        told.append(stream.state_dict())
        if len(told) in (2, 5, 6):
            raise Interrupted

    with client.activations(EXTRACTION_ID, **options, on_progress=tell) as stream:
        state = stream.state_dict()
        while len(got) < len(whole):
            try:
                got.append(next(stream))
            except Interrupted:
                assert stream.state_dict() == state
            state = stream.state_dict()

    assert len(told) > 6
    assert torch.equal(torch.cat(got), torch.cat(whole))


def test_an_exception_in_on_progress_at_the_end_changes_nothing(client, scripted_extractor):
    reading = Reading(norm_limit=NormLimit(absolute=20_000.0))

    def tell(progress):
        if progress.rows == scripted_extractor.n_rows:
            raise Interrupted

    options = {"batch_size": 300, "drop_last": True, "reading": reading, "columns": [HOOKPOINT]}
    with client.activations(EXTRACTION_ID, **options) as undisturbed:
        n_batches = len(list(undisturbed))
    with client.activations(EXTRACTION_ID, **options, on_progress=tell) as stream:
        for _ in range(n_batches):
            next(stream)
        with pytest.raises(Interrupted):
            next(stream)

        assert list(stream) == []
        assert stream.state_dict() == undisturbed.state_dict()


def test_on_progress_may_close_the_stream(client):
    stream = client.activations(EXTRACTION_ID, batch_size=300, epochs=None, on_progress=lambda _: stream.close())

    assert len(list(stream)) <= 1


def test_what_a_state_is_behind_is_not_released(client, scripted_extractor):
    """A resume before an unfinished batch needs its rows again: a WINDOW set must still have them."""
    scripted_extractor.extraction.spec.retention.kind = ex_pb.RETENTION_KIND_WINDOW
    scripted_extractor.faults.append(Fault("hang", after=4))

    def tell(progress):
        if progress.rows == 4 * 64:
            raise Interrupted

    with client.activations(EXTRACTION_ID, batch_size=150, on_progress=tell) as stream:
        next(stream)
        with pytest.raises(Interrupted):
            next(stream)
        time.sleep(0.2)

        assert scripted_extractor.released == stream.next_row == 150


def test_a_batch_larger_than_the_window_comes(client, scripted_extractor):
    """While the forward pass waits, rows of the unfinished batch are released: a resume can't begin before it."""
    scripted_extractor.extraction.spec.retention.kind = ex_pb.RETENTION_KIND_WINDOW
    scripted_extractor.window_rows = 128

    with client.activations(EXTRACTION_ID, batch_size=400) as stream:
        got = torch.cat(list(stream))

    assert torch.equal(got, expected(scripted_extractor))


def test_closing_ends_the_iteration(client):
    stream = client.activations(EXTRACTION_ID, batch_size=100)
    next(stream)
    stream.close()

    assert list(stream) == []


def test_config_is_json_that_says_what_the_rows_are(client):
    with client.activations(EXTRACTION_ID, batch_size=64) as stream:
        config = json.loads(json.dumps(stream.config))

    assert config["set_id"] == "set-1"
    assert config["columns"] == [HOOKPOINT]
    assert config["recipe"]["context_size"] == 16


def test_data_provider_is_an_endless_iterator_of_float32(client, scripted_extractor):
    scripted_extractor.dtype = "bfloat16"

    with data_provider(client, EXTRACTION_ID, HOOKPOINT, batch_size=300) as provider:
        batches = [next(provider) for _ in range(7)]

    assert {(tuple(batch.shape), batch.dtype) for batch in batches} == {((300, 8), torch.float32)}
