"""Files of a set that change under the servers: no damaged row is served, no process dies, and rows come back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fix_system import FAST, HOOKPOINT, MODEL, PATIENCE_S, At, columns_of, eventually, read, texts
from headrace_client import errors
from headrace_client.values import ExtractionState

pytestmark = pytest.mark.timeout(300)

DOCUMENTS = texts(400, seed=11)
STEP_ROWS = 3000
DATA_OFFSET = 4096


def extract(client, corpus, max_rows=0):
    started = client.extractions.start(MODEL, corpus, HOOKPOINT, recipe=FAST, max_rows=max_rows)
    return client.extractions.wait(started.id, deadline_s=PATIENCE_S)


def make(system):
    """A finished set of several segments, each sealed by an extraction of its own; its corpus and all its rows."""
    corpus = system.variant(DOCUMENTS)
    for max_rows in (STEP_ROWS, 2 * STEP_ROWS, 0):
        done = extract(system.client, corpus, max_rows)
    assert len(list(column_of(done).glob("*.safetensors"))) == 3
    return corpus, done, read(system.client, done, transport="inline")


def column_of(extraction):
    return Path(extraction.path) / HOOKPOINT / "float32"


def segment_of(extraction, number=1):
    return column_of(extraction) / f"{number:08d}.safetensors"


def flip(extraction):
    with segment_of(extraction).open("r+b") as file:
        file.seek(DATA_OFFSET + 1000)
        byte = file.read(1)[0]
        file.seek(DATA_OFFSET + 1000)
        file.write(bytes([byte ^ 4]))


def flip_in_secret(extraction):
    """The time of the last write as before, as after a copy of the disk."""
    stat = segment_of(extraction).stat()
    flip(extraction)
    os.utime(segment_of(extraction), ns=(stat.st_atime_ns, stat.st_mtime_ns))


def truncate(extraction):
    os.truncate(segment_of(extraction), DATA_OFFSET + 1000)


def empty(extraction):
    segment_of(extraction).write_bytes(b"")


def remove(extraction):
    segment_of(extraction).unlink()


def other_column(extraction):
    shutil.copyfile(Path(extraction.path) / "position" / "00000001.safetensors", segment_of(extraction))


def other_segment(extraction):
    shutil.copyfile(segment_of(extraction, 0), segment_of(extraction))


def index_lines(extraction):
    path = Path(extraction.path) / "segments.jsonl"
    return path, path.read_bytes().splitlines(keepends=True)


def garbage_in_the_index(extraction):
    path, lines = index_lines(extraction)
    path.write_bytes(lines[0] + b"\x00garbage\n" + lines[2])


def other_row_count(extraction):
    path, lines = index_lines(extraction)
    last = json.loads(lines[2])
    path.write_bytes(lines[0] + lines[1] + json.dumps(last | {"rows": last["rows"] - 7}).encode() + b"\n")


def no_index(extraction):
    (Path(extraction.path) / "segments.jsonl").unlink()


OF_A_SEGMENT = [flip, flip_in_secret, truncate, empty, remove, other_column, other_segment]
OF_THE_INDEX = [garbage_in_the_index, other_row_count, no_index]


@pytest.fixture(scope="module")
def made(system):
    return make(system)


@pytest.fixture
def server(system):
    """The extractor, which must be the same process afterwards."""
    pid = system.extractor.pid
    yield system
    assert system.extractor.running
    assert system.extractor.pid == pid


@pytest.mark.parametrize("damage", OF_A_SEGMENT)
def test_an_extraction_of_a_damaged_set_computes_the_damaged_rows_alone_and_they_are_the_same(server, made, damage):
    corpus, done, rows = made
    damage(done)

    again = extract(server.client, corpus)

    assert (again.state, again.set_id, again.n_rows) == (ExtractionState.DONE, done.set_id, done.n_rows)
    assert (again.cached, again.n_rows_computed) == (False, STEP_ROWS)
    assert read(server.client, again, transport="inline") == rows
    assert extract(server.client, corpus).cached


@pytest.mark.parametrize("damage", OF_THE_INDEX)
def test_an_extraction_of_a_set_with_a_damaged_index_is_not_cached_and_has_the_same_rows(server, damage):
    corpus, done, rows = make(server)
    damage(done)

    again = extract(server.client, corpus)

    assert (again.state, again.set_id, again.n_rows) == (ExtractionState.DONE, done.set_id, done.n_rows)
    assert not again.cached
    assert read(server.client, again, transport="inline") == rows
    assert read(server.client, again, transport="mapped") == rows
    assert extract(server.client, corpus).cached


@pytest.mark.parametrize("transport", ["inline", "mapped"])
@pytest.mark.parametrize("damage", OF_A_SEGMENT)
def test_damaged_rows_are_an_error_that_names_them_and_no_row_of_them_is_served(server, made, damage, transport):
    corpus, done, rows = made
    damage(done)
    served = []

    with pytest.raises(errors.DataLoss) as caught:
        read(server.client, done, transport=transport, on_rows=served.append)

    assert caught.value.reason == "DIGEST_MISMATCH"
    assert caught.value.metadata["column"] == HOOKPOINT
    assert caught.value.metadata["file"] == str(segment_of(done))
    assert caught.value.metadata["first_row"] == str(STEP_ROWS)
    assert caught.value.metadata["end_row"] == str(2 * STEP_ROWS)
    assert max(served) == STEP_ROWS
    assert extract(server.client, corpus).n_rows_computed == STEP_ROWS
    assert read(server.client, done, transport=transport) == rows


def test_a_segment_cut_short_under_an_inline_reader_is_an_error_and_the_server_lives(server, made):
    corpus, done, rows = made
    cut = At(STEP_ROWS + 500, lambda: truncate(done))

    with pytest.raises(errors.DataLoss) as caught:
        read(server.client, done, transport="inline", on_rows=cut, chunk_bytes=8 * 1024, queue_bytes=16 * 1024)

    assert caught.value.reason == "DIGEST_MISMATCH"
    assert cut.done
    extract(server.client, corpus)
    assert read(server.client, done, transport="inline") == rows


MAPPED_READER = """
import os, sys
from headrace_client import HeadraceClient, StreamTuning, errors
registry, token, extraction, column, path = sys.argv[1:]
with HeadraceClient.connect(registry, token=token) as client:
    tuning = StreamTuning(transport="mapped", chunk_bytes=8192, queue_bytes=16384)
    with client.chunks(extraction, column, tuning=tuning) as stream:
        total = 0
        try:
            for chunk in stream:
                if chunk.end_row > 3500:
                    os.truncate(path, 5000)
                total += int(chunk.array(column).view("u1").sum())
        except errors.HeadraceError as exc:
            print(chunk.end_row, exc.reason)
"""


def test_a_segment_cut_short_under_a_mapped_reader_is_an_error_and_its_process_lives(server, made):
    corpus, done, rows = made
    arguments = [server.registry.address, server.token, done.id, HOOKPOINT, str(segment_of(done))]

    ended = subprocess.run(
        [sys.executable, "-c", MAPPED_READER, *arguments], capture_output=True, text=True, timeout=60, check=False
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    end_row, reason = ended.stdout.split()
    assert STEP_ROWS < int(end_row) <= 2 * STEP_ROWS
    assert reason in ("DIGEST_MISMATCH", "NOT_MAPPABLE")
    extract(server.client, corpus)
    assert read(server.client, done, transport="mapped") == rows


def test_verification_names_damaged_files_and_finds_none_in_a_set_that_is_whole(server, made):
    corpus, done, rows = made
    eventually(lambda: done.set_id in {one.id for one in server.client.sets.list()}, "the set is listed")

    whole = list(server.client.sets.verify(done.set_id))[-1]
    flip(done)
    damaged = list(server.client.sets.verify(done.set_id))[-1]

    assert (whole.done, whole.n_damaged, whole.n_files, whole.n_files_total) == (True, 0, 12, 12)
    assert whole.size_bytes == whole.total_bytes > done.n_rows * 128
    assert (damaged.done, damaged.n_damaged, damaged.n_files) == (True, 1, 12)
    (rows_lost,) = damaged.damages
    assert (rows_lost.column, rows_lost.first_row, rows_lost.end_row) == (HOOKPOINT, STEP_ROWS, 2 * STEP_ROWS)
    assert extract(server.client, corpus).n_rows_computed == STEP_ROWS
    assert read(server.client, done) == rows
    assert list(server.client.sets.verify(done.set_id))[-1].n_damaged == 0


def test_sets_verify_prints_the_damage_and_fails(server, made):
    corpus, done, _ = made
    eventually(lambda: done.set_id in {one.id for one in server.client.sets.list()}, "the set is listed")
    environment = os.environ | {"HEADRACE_TOKEN": server.token}
    command = [sys.executable, "-m", "headrace_cli", "--registry", server.registry.address, "sets", "verify"]

    def verify():
        return subprocess.run(
            [*command, done.set_id[:12]], capture_output=True, text=True, timeout=60, check=False, env=environment
        )

    whole = verify()
    flip(done)
    damaged = verify()

    assert (whole.returncode, whole.stdout) == (0, "")
    assert "12 files are as they were sealed" in whole.stderr
    assert damaged.returncode == 1
    assert str(segment_of(done)) in damaged.stdout
    assert "DIGEST_MISMATCH" in damaged.stderr
    assert "start the extraction again" in damaged.stderr
    extract(server.client, corpus)


def test_a_set_that_is_not_there_can_not_be_verified(server):
    endpoint = server.client._nodes
    for set_id in ("0" * 32, "../../etc", "", "x" * 100_000):
        with pytest.raises(errors.SetNotFound):
            next(iter(endpoint.endpoint(endpoint.pick()).stream("ExtractionService.VerifySet", set_id=set_id)))


@pytest.mark.parametrize("harm", ["flip", "truncate"])
def test_rows_are_never_computed_from_a_damaged_corpus(server, harm):
    corpus = server.variant(DOCUMENTS)
    documents = server.data_dir / "corpora" / corpus / "documents.bin"
    if harm == "flip":
        documents.write_bytes(documents.read_bytes().replace(b"wheel", b"while", 1))
    else:
        os.truncate(documents, 1000)

    with pytest.raises(errors.DataLoss) as caught:
        extract(server.client, corpus)

    assert caught.value.reason == "DIGEST_MISMATCH"
    assert "delete it and upload it again" in str(caught.value)


@pytest.mark.fault
@pytest.mark.parametrize("damage", [flip, truncate, remove, garbage_in_the_index])
def test_damage_done_while_the_extractor_was_down_is_found_and_mended(fragile, damage):
    corpus, done, rows = make(fragile)
    fragile.kill_extractor()
    damage(done)
    fragile.extractor.start()
    eventually(lambda: any(node.state == "ALIVE" for node in fragile.client.nodes()), "the node is alive")

    with pytest.raises(errors.HeadraceError) as caught:
        read(fragile.client, done, transport="inline")
    again = extract(fragile.client, corpus)

    assert caught.value.reason in ("DIGEST_MISMATCH", "SET_NOT_FOUND")
    assert not again.cached
    assert read(fragile.client, again, transport="inline") == rows
    assert read(fragile.client, again, transport="mapped") == rows


@pytest.mark.fault
def test_a_set_that_nothing_happened_to_is_cached_after_a_restart(fragile):
    corpus, done, rows = make(fragile)
    fragile.kill_extractor()
    fragile.extractor.start()
    eventually(lambda: any(node.state == "ALIVE" for node in fragile.client.nodes()), "the node is alive")

    again = extract(fragile.client, corpus)

    assert again.cached
    assert read(fragile.client, again, transport="inline") == rows
    assert columns_of(again) == columns_of(done)
