"""An interrupted run writes the same rows as an uninterrupted one."""

from __future__ import annotations

import signal
import threading
import time

import numpy as np
import pytest

from fix_runner import digests, documents, load, read_rows, run_command
from headrace_extractor.corpora.recipe import TokenWindow
from headrace_extractor.errors import StateConflict
from headrace_extractor.node.runner_protocol import Blocked, Committed, Extract, Finished, Grant, Load, Loaded, Stop
from headrace_extractor.runner.gate import Gate
from headrace_extractor.runner.passes import extract
from headrace_extractor.runner.process import failure_of
from headrace_log.errors import DigestMismatch

SITES = ["blocks.1.hook_resid_post", "blocks.2.hook_attn_out"]


def command(folder, corpus, **fields):
    return Extract(set_id="x", set_path=str(folder), corpus_path=str(corpus), **fields)


def assert_same_rows(ours, theirs, n_rows):
    ours, theirs = read_rows(ours, n_rows), read_rows(theirs, n_rows)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert np.array_equal(values, theirs[name]), name


@pytest.mark.parametrize("packing", ["packed", "one_document"])
@pytest.mark.parametrize(
    "drop",
    [{}, {"drop_special_tokens": True, "drop_first_positions": 2}, {"window": TokenWindow(start=2, end=-3)}],
    ids=["all", "dropped", "window"],
)
def test_rows_do_not_depend_on_where_runs_ended(tiny_model, make_set, make_corpus, packing, drop):
    corpus, model = make_corpus(documents(25)), load(tiny_model)
    whole, parts = (make_set(SITES, packing=packing, **drop) for _ in range(2))
    end = run_command(command(whole, corpus), model)[-1]
    for max_rows in [1, 2, 60, 64, 65, 150, 300, 0]:
        last = run_command(command(parts, corpus, max_rows=max_rows), model)[-1]
        assert last.n_rows == (max_rows or end.n_rows)

    assert last == end
    assert last.complete
    assert_same_rows(parts, whole, end.n_rows)


def test_a_column_is_added_only_to_rows_of_the_same_tokens_documents_and_positions(tiny_llama, make_set, make_corpus):
    """A library may cut the same text into other tokens when it is newer: the corpus is the same then."""
    kept = documents(25)
    other = [each.copy() for each in kept]
    other[17][0] += 1 if other[17][0] == 3 else -1
    folder, model = make_set(SITES), load(tiny_llama)
    first = ["token_id", "document", "position", SITES[0]]
    end = run_command(command(folder, make_corpus(kept), columns=first), model)[-1]

    with pytest.raises(StateConflict, match="its documents become other tokens") as caught:
        run_command(command(folder, make_corpus(other), columns=[SITES[1]]), model)
    assert run_command(command(folder, make_corpus(kept), columns=[SITES[1]]), model)[-1] == end
    rows, row = read_rows(folder, end.n_rows), int(caught.value.metadata["row"])
    assert [rows[name][row] for name in first[:3]] == [kept[17][0], 17, 1]
    assert caught.value.metadata["column"] == "token_id"


def test_a_damaged_file_is_told_as_such_where_a_column_is_added(tiny_llama, make_set, make_corpus):
    """The remedy for other tokens is to delete the set, which would be wrong here."""
    folder, model, corpus = make_set(SITES), load(tiny_llama), make_corpus(documents(25))
    run_command(command(folder, corpus, columns=["token_id", "document", "position", SITES[0]]), model)
    file = min((folder / "token_id").glob("*"))
    damaged = bytearray(file.read_bytes())
    damaged[-4] ^= 1
    file.write_bytes(damaged)

    with pytest.raises(DigestMismatch) as caught:
        run_command(command(folder, corpus, columns=[SITES[1]]), model)
    failed = failure_of(caught.value)
    assert (failed.reason, "headrace sets verify" in failed.message) == ("DIGEST_MISMATCH", True)


def test_stop_seals_what_there_is_and_the_next_run_goes_on(tiny_llama, make_set, make_corpus):
    corpus, model = make_corpus(documents(40)), load(tiny_llama)
    whole, parts = make_set(SITES), make_set(SITES)
    end = run_command(command(whole, corpus), model)[-1]
    gate = Gate(None)

    def stop_early(event):
        if isinstance(event, Committed) and event.n_rows:
            gate.stop()

    stopped = run_command(command(parts, corpus), model, gate, stop_early)[-1]
    assert 0 < stopped.n_rows < end.n_rows
    assert not stopped.complete
    assert_same_rows(parts, whole, stopped.n_rows)

    assert run_command(command(parts, corpus), model)[-1] == end
    assert_same_rows(parts, whole, end.n_rows)


def test_nothing_is_written_beyond_the_grant(tiny_llama, make_set, make_corpus):
    corpus, model = make_corpus(documents(40)), load(tiny_llama)
    whole, folder, gate = make_set(SITES), make_set(SITES), Gate(10)
    end = run_command(command(whole, corpus), model)[-1]
    passes, blocked_at = [], []

    def count(_module, args):
        if len(args[0]) == 2:  # Two sequences: the documents of the receipt go through the model one by one.
            passes.append(None)

    model.model.layers[0].register_forward_pre_hook(count)

    def grant_later(event):
        if isinstance(event, Blocked):
            blocked_at.append((event.n_rows, len(passes)))
            threading.Timer(0.05, gate.grant, [300 if len(blocked_at) == 1 else 10_000]).start()

    events = run_command(command(folder, corpus, grant_row=10), model, gate, grant_later)

    # Batches of 2 x 64 rows: the pass stops at the batch that holds the first row not granted.
    assert blocked_at == [(10, 1), (300, 3)]
    committed_first = [event for event in events if not isinstance(event, Finished)]
    before_blocked = committed_first[committed_first.index(Blocked(set_id="x", n_rows=10)) - 1]
    assert before_blocked.n_rows == 10
    assert events[-1] == end
    assert_same_rows(folder, whole, end.n_rows)


def test_a_sealing_that_failed_ends_the_run_instead_of_a_wait_for_its_rows_to_go(
    tiny_llama, make_set, make_corpus, monkeypatch
):
    def fail(column, rows, scales):
        raise OSError("the disk is gone")

    monkeypatch.setattr(extract, "summarize", fail)
    gate, events = Gate(100), []
    giving_up = threading.Timer(20, gate.stop)
    giving_up.start()

    with pytest.raises(OSError, match="the disk is gone"):
        run_command(command(make_set(SITES), make_corpus(documents(40))), load(tiny_llama), gate, events.append)
    giving_up.cancel()

    assert not any(isinstance(event, Blocked) for event in events)


def test_stop_wakes_a_run_that_waits_for_a_grant(tiny_llama, make_set, make_corpus):
    gate = Gate(5)

    def stop(event):
        if isinstance(event, Blocked):
            threading.Timer(0.05, gate.stop).start()

    events = run_command(command(make_set(SITES), make_corpus(documents(9))), load(tiny_llama), gate, stop)
    assert events[-1] == Finished(set_id="x", n_rows=5, complete=False)


@pytest.mark.fault
def test_kill_in_mid_run_leaves_the_same_segments_after_a_restart(tiny_llama, make_set, make_corpus, start_runner):
    corpus = make_corpus(documents(600, longest=120))
    whole, killed = make_set(SITES, segment_rows=500), make_set(SITES, segment_rows=500)
    first = start_runner()
    first.send(Load(files_path=str(tiny_llama), device="cpu", dtype="float32"))
    first.until(Loaded)
    first.send(command(killed, corpus))
    while first.until(Committed).n_rows < 3_000:
        pass
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    sealed_at_death = digests(killed)
    assert len(sealed_at_death) >= 5

    second = start_runner()
    second.send(Load(files_path=str(tiny_llama), device="cpu", dtype="float32"))
    second.send(command(whole, corpus))
    end = second.until(Finished)
    assert end.complete
    assert end.n_rows > 30_000  # with fewer rows the kill would have come too late to prove anything
    second.send(command(killed, corpus))
    assert second.until(Finished) == end
    assert digests(killed) == digests(whole)
    assert digests(killed)[: len(sealed_at_death)] == sealed_at_death


def test_grant_and_stop_reach_a_run_over_the_pipe(tiny_llama, make_set, make_corpus, start_runner):
    folder, corpus = make_set(SITES), make_corpus(documents(40))
    runner = start_runner()
    runner.send(Load(files_path=str(tiny_llama), device="cpu", dtype="float32"))
    runner.until(Loaded)
    runner.send(command(folder, corpus, grant_row=100))
    assert runner.until(Blocked).n_rows == 100
    runner.send(Grant(set_id="x", row=250))
    assert runner.until(Blocked).n_rows == 250
    time.sleep(0.1)
    runner.send(Stop(set_id="x"))

    assert runner.until(Finished) == Finished(set_id="x", n_rows=250, complete=False)
