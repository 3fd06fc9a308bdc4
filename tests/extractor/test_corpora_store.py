from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.extractor.v1.corpus_service_pb2 import TokenDocument
from headrace_chassis.errors import ShuttingDown
from headrace_extractor.corpora.ingest.upload import CorpusUpload
from headrace_extractor.corpora.quota import Quota, Share
from headrace_extractor.corpora.reader import DocumentReader
from headrace_extractor.corpora.spec import CorpusFormat, CorpusSpec
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.errors import (
    AlreadyExists,
    CorpusEmpty,
    CorpusMalformed,
    CorpusNotFound,
    DigestMismatch,
    DiskFull,
    FieldInvalid,
    PathNotAllowed,
)


@pytest.fixture
def store(tmp_path):
    return CorpusStore(tmp_path / "corpora", allowed_roots=[tmp_path / "data"], now=lambda: 12.5)


def spec(corpus_id="c", format_="txt", **fields) -> CorpusSpec:
    return CorpusSpec(id=corpus_id, format=CorpusFormat(format_), **fields)


def ingest(store, text="one\n\ntwo", corpus_id="c"):
    return store.ingest(spec(corpus_id), io.BytesIO(text.encode()), origin="notes.txt")


def names(store) -> list[str]:
    return sorted(entry.name for entry in store._root.iterdir())


def test_a_text_corpus_is_read_back(store):
    corpus = ingest(store, "one\n\nzwei äöü")

    assert (corpus.n_documents, corpus.size_bytes, corpus.tokenized) == (2, 14, False)
    assert (corpus.origin, corpus.create_time) == ("notes.txt", 12.5)
    with store.open("c") as reader:
        assert [reader.text(i) for i in range(len(reader))] == ["one", "zwei äöü"]
        assert reader.corpus == corpus == store.get("c")
        reader.verify()
        with pytest.raises(IndexError):
            reader.text(2)
        with pytest.raises(TypeError):
            reader.token_ids(0)


def test_a_token_corpus_is_read_back_as_views(store):
    corpus = store.ingest_tokens("c", [[5, 6], [], [2**31 - 1]])

    assert (corpus.n_documents, corpus.size_bytes, corpus.tokenized) == (3, 12, True)
    reader = store.open("c")
    ids = [reader.token_ids(i) for i in range(len(reader))]
    reader.verify()
    reader.close()
    store.delete("c")
    assert [part.tolist() for part in ids] == [[5, 6], [], [2**31 - 1]]
    assert ids[0].dtype == np.int32
    assert not ids[0].flags.writeable


def test_the_files_are_what_the_format_says(store):
    ingest(store)
    folder = store.path("c")

    assert (folder / "documents.bin").read_bytes() == b"onetwo"
    assert np.load(folder / "offsets.npy").tolist() == [0, 3, 6]
    assert json.loads((folder / "corpus.json").read_text())["format"] == 1


def test_the_digest_is_over_length_prefixed_documents(store):
    content = b"".join(struct.pack("<Q", len(text)) + text for text in (b"one", b"two"))

    assert ingest(store).digest == hashlib.sha256(b"headrace corpus 1 text\n" + content).hexdigest()


def test_the_digest_does_not_depend_on_the_format(store):
    parquet = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two"]}), parquet)

    digests = {
        ingest(store, corpus_id="a").digest,
        store.ingest(spec("b", "jsonl"), io.BytesIO(b'{"text":"one"}\n{"text":"two"}\n')).digest,
        store.ingest(spec("d", "csv"), io.BytesIO(b"text\none\ntwo\n")).digest,
        store.ingest(spec("e", "parquet"), parquet).digest,
    }
    assert len(digests) == 1


def test_the_digest_tells_text_from_tokens_and_boundaries_apart(store):
    digests = {
        ingest(store, "ab\n\nc", "a").digest,
        ingest(store, "a\n\nbc", "b").digest,
        ingest(store, "\x01\x00\x00\x00", "d").digest,
        store.ingest_tokens("e", [[1]]).digest,
    }
    assert len(digests) == 4


def test_the_same_content_again_is_the_same_corpus(store):
    first = ingest(store)
    store._now = lambda: 99.0

    assert ingest(store) == first
    assert names(store) == ["c"]


def test_other_content_under_the_id_is_refused_and_changes_nothing(store):
    first = ingest(store)

    with pytest.raises(AlreadyExists) as caught:
        ingest(store, "else")

    assert caught.value.resource == ("corpus", "c")
    assert store.get("c") == first
    assert names(store) == ["c"]


@pytest.mark.parametrize("text", ["", " \n\n "])
def test_a_corpus_without_documents_is_empty(store, text):
    with pytest.raises(CorpusEmpty):
        ingest(store, text)

    assert names(store) == []


def test_a_corpus_of_empty_documents_is_empty(store):
    with pytest.raises(CorpusEmpty):
        store.ingest(spec(format_="jsonl"), io.BytesIO(b'{"text": ""}\n'))
    with pytest.raises(CorpusEmpty):
        store.ingest_tokens("c", [[], []])


def test_a_malformed_file_leaves_nothing(store):
    with pytest.raises(CorpusMalformed):
        store.ingest(spec(format_="jsonl"), io.BytesIO(b'{"text": "a"}\n' * 100_000 + b"{"))

    assert names(store) == []
    assert store._quota.used_bytes == 0


def test_token_ids_may_come_as_any_sequence(store):
    wire = [TokenDocument(token_ids=[1, 2]).token_ids, range(3, 5), (5, 6), np.array([7, 8])]

    store.ingest_tokens("c", wire)

    with store.open("c") as reader:
        assert [reader.token_ids(i).tolist() for i in range(4)] == [[1, 2], [3, 4], [5, 6], [7, 8]]


@pytest.mark.parametrize("tokens", [[-1], [2**31], [1, -5]])
def test_token_ids_must_be_int32_and_not_negative(store, tokens):
    with pytest.raises(CorpusMalformed) as caught:
        store.ingest_tokens("c", [[1], tokens])

    assert caught.value.metadata == {"document": "1"}


def test_corpora_survive_reopening_and_leftovers_do_not(store):
    corpus = ingest(store)
    (store._root / ".ingest-7").mkdir()
    (store._root / ".ingest-7" / "documents.bin").write_bytes(b"half")
    (store._root / ".upload-3").write_bytes(b"half")

    again = CorpusStore(store._root)

    assert again.get("c") == corpus
    assert names(again) == ["c"]
    assert again._quota.used_bytes == store._quota.used_bytes == 6 + 8 * 3


def test_folders_that_are_no_corpora_are_left_alone(store):
    (store._root / "lost+found").mkdir()

    again = CorpusStore(store._root)

    assert again.list() == ([], "")
    assert names(again) == ["lost+found"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: shutil.copy(folder.parent / "other" / "corpus.json", folder),
        lambda folder: (folder / "corpus.json").write_text("{"),
        lambda folder: (folder / "corpus.json").write_text('{"format": 2}'),
        lambda folder: (folder / "corpus.json").unlink(),
        lambda folder: (folder / "documents.bin").write_bytes(b"onetw"),
        lambda folder: (folder / "documents.bin").write_bytes(b""),
        lambda folder: (folder / "offsets.npy").unlink(),
        lambda folder: (folder / "offsets.npy").write_bytes(b"nonsense"),
        lambda folder: np.save(folder / "offsets.npy", np.array([0, 3])),
        lambda folder: np.save(folder / "offsets.npy", np.array([0, 3, 7])),
    ],
)
def test_a_damaged_corpus_says_so_until_it_is_deleted(store, damage):
    ingest(store)
    ingest(store, corpus_id="other")
    damage(store._root / "c")

    with pytest.raises(DigestMismatch, match="upload it again"):
        store.open("c")
    again = CorpusStore(store._root)
    with pytest.raises(DigestMismatch, match="delete it"):
        again.get("c")
    with pytest.raises(AlreadyExists):
        ingest(again)
    assert [corpus.id for corpus in again.list()[0]] == ["other"]
    again.delete("c")
    assert ingest(again).n_documents == 2


def test_bytes_that_are_no_text_any_more_are_damage(store):
    ingest(store)
    (store._root / "c" / "documents.bin").write_bytes(b"on\xfftwo")

    with store.open("c") as reader, pytest.raises(DigestMismatch, match="document 0"):
        reader.text(0)


def test_verify_finds_a_flipped_bit(store):
    ingest(store)
    (store._root / "c" / "documents.bin").write_bytes(b"onetwp")

    with store.open("c") as reader, pytest.raises(DigestMismatch):
        reader.verify()


def test_files_that_shrink_under_a_reader_are_an_error_and_end_no_process(store):
    ingest(store, "\n\n".join(f"document {number} " + "x" * 500 for number in range(10_000)))
    program = (
        "import os, sys; from headrace_extractor.corpora.reader import DocumentReader; "
        "from headrace_extractor.errors import DigestMismatch; reader = DocumentReader(sys.argv[1]); "
        "reader.text(0); os.truncate(sys.argv[1] + '/' + sys.argv[2], 200)\n"
        "for index in (5, 5000, 9999):\n"
        "    try: reader.text(index)\n"
        "    except DigestMismatch as exc: print(exc.message)"
    )
    for name, n_told in (("documents.bin", 3), ("offsets.npy", 2)):
        folder = shutil.copytree(store._root / "c", store._root.parent / name / "c")
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder), name],
            capture_output=True,
            text=True,
            timeout=50,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.stdout.count(f"{name} is cut short") == n_told


def test_what_is_not_there_is_not_found(store, tmp_path):
    for act in (store.get, store.open, store.path, store.delete):
        with pytest.raises(CorpusNotFound) as caught:
            act("nope")
        assert caught.value.resource == ("corpus", "nope")
    with pytest.raises(CorpusNotFound):
        DocumentReader(tmp_path / "nope")


def test_a_deleted_corpus_goes_and_its_readers_go_on(store):
    ingest(store)
    reader = store.open("c")

    store.delete("c")

    assert reader.text(1) == "two"
    assert names(store) == []
    assert store._quota.used_bytes == 0
    assert ingest(store, "else").n_documents == 1


def test_pages_are_sorted_and_complete(store):
    for corpus_id in ("b", "a", "d", "c", "e"):
        ingest(store, corpus_id=corpus_id)

    pages, token = [], ""
    while True:
        page, token = store.list(2, token)
        pages.append([corpus.id for corpus in page])
        if not token:
            break
    assert pages == [["a", "b"], ["c", "d"], ["e"]]
    assert [corpus.id for corpus in store.list()[0]] == ["a", "b", "c", "d", "e"]


def test_bad_paging_is_refused(store):
    with pytest.raises(FieldInvalid):
        store.list(-1)
    for token in ("x", "%%", "Li4v", "é"):
        with pytest.raises(FieldInvalid) as caught:
            store.list(1, token)
        assert caught.value.field == "page_token"


# Uploads


def test_an_upload_that_is_left_while_a_piece_is_written_takes_no_space(store):
    with store.upload(spec()) as upload:
        upload.write(b"one\n")

    upload.write(b"two\n")

    assert store._quota.used_bytes == 0
    assert names(store) == []


def test_an_upload_that_is_left_while_it_is_read_is_read_to_its_end_and_no_other_file(tmp_path):
    spool, share = tmp_path / "spool", Share(Quota(tmp_path, limit_bytes=99, used_bytes=0), lambda: None)

    def ingest(file):
        upload.__exit__(None, None, None)
        with (tmp_path / "other").open("wb"):  # May get the number of the descriptor that was closed.
            return file.read()

    upload = CorpusUpload(spool, share, ingest)
    upload.write(b"one\n")

    assert upload.finish() == b"one\n"
    assert not spool.exists()


def test_an_upload_in_pieces_becomes_a_corpus(store):
    with store.upload(spec(file_name="notes.txt")) as upload:
        for piece in (b"on", b"e\n\nt\xc3", b"\xa4"):
            upload.write(piece)
        corpus = upload.finish()

    assert (corpus.n_documents, corpus.origin) == (2, "notes.txt")
    with store.open("c") as reader:
        assert reader.text(1) == "tä"
    assert names(store) == ["c"]


def test_an_upload_that_breaks_off_keeps_nothing(store):
    with store.upload(spec()) as upload:
        upload.write(b"one")
        assert names(store) != []

    assert names(store) == []
    assert store._quota.used_bytes == 0


def test_an_upload_of_unknown_format_is_refused_at_once(store):
    with pytest.raises(FieldInvalid):
        store.upload(CorpusSpec(id="c", file_name="a.pdf"))


def test_uploads_of_the_same_content_at_once_make_one_corpus(store):
    results = []

    def run():
        with store.upload(spec()) as upload:
            upload.write(b"one\n\ntwo")
            results.append(upload.finish())

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert len(results) == 8
    assert len({corpus.digest for corpus in results}) == 1
    assert names(store) == ["c"]
    assert store._quota.used_bytes == 6 + 8 * 3


# Paths


def test_a_path_under_a_root_is_ingested(store, tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "notes.txt"
    path.write_text("one\n\ntwo")

    corpus = store.ingest_path(CorpusSpec(id="c"), str(path))
    path.write_text("changed")

    assert corpus.origin == str(path)
    with store.open("c") as reader:
        assert reader.text(0) == "one"


def test_a_path_outside_the_roots_names_the_flag(store, tmp_path):
    (tmp_path / "data").mkdir()
    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    (tmp_path / "data" / "link.txt").symlink_to(secret)

    for path in (secret, tmp_path / "data" / ".." / "secret.txt", tmp_path / "data" / "link.txt", tmp_path / "no.txt"):
        with pytest.raises(PathNotAllowed, match="--corpus-root"):
            store.ingest_path(CorpusSpec(id="c"), str(path))


def test_a_root_whose_name_is_a_prefix_allows_nothing_beside_it(store, tmp_path):
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2" / "a.txt").write_text("x")

    with pytest.raises(PathNotAllowed):
        store.ingest_path(CorpusSpec(id="c"), str(tmp_path / "data2" / "a.txt"))


def test_paths_that_are_no_readable_file_are_refused(store, tmp_path):
    data = tmp_path / "data"
    (data / "folder.txt").mkdir(parents=True)
    os.mkfifo(data / "pipe.txt")

    for path in (
        "relative.txt",
        "",
        str(data / "nul\0.txt"),
        str(data / "gone.txt"),
        str(data / "folder.txt"),
        str(data / "pipe.txt"),
    ):
        with pytest.raises(FieldInvalid) as caught:
            store.ingest_path(CorpusSpec(id="c", format=CorpusFormat.TXT), path)
        assert caught.value.field == "path.path"


@pytest.mark.parametrize("swapped", ["a/b", "a"])
def test_a_folder_swapped_for_a_link_while_it_is_opened_lets_no_outside_file_in(store, tmp_path, swapped):
    inside, outside = tmp_path / "data" / "a" / "b", tmp_path / "outside"
    for folder, text in ((inside, "inside"), (outside / "b", "outside"), (outside, "outside")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "f.txt").write_text(text)
    place, away, link = tmp_path / "data" / swapped, tmp_path / "away", tmp_path / "link"
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            place.rename(away)
            link.symlink_to(outside)
            link.rename(place)
            place.unlink()
            away.rename(place)

    found = Counter()
    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        for number in range(1000):
            try:
                store.ingest_path(CorpusSpec(id=f"c{number}"), str(inside / "f.txt"))
            except (FieldInvalid, PathNotAllowed):
                found["refused"] += 1
            else:
                with store.open(f"c{number}") as reader:
                    found[reader.text(0)] += 1
    finally:
        stop.set()
        swapping.join()

    assert found["outside"] == 0
    assert found["refused"] > 0


def test_links_within_the_roots_are_followed(store, tmp_path):
    (tmp_path / "data" / "real").mkdir(parents=True)
    (tmp_path / "data" / "real" / "a.txt").write_text("one")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "data" / "real")

    assert store.ingest_path(CorpusSpec(id="c"), str(tmp_path / "data" / "link" / "a.txt")).n_documents == 1


def test_only_unfinished_work_of_its_own_is_removed_at_start(tmp_path):
    root = tmp_path / "corpora"
    for name in (".ingest-7", ".deleted-0", ".snapshot"):
        (root / name).mkdir(parents=True)
    for name in (".upload-3", ".nfs0001", ".ingest-notes"):
        (root / name).write_bytes(b"half")

    CorpusStore(root)

    assert sorted(path.name for path in root.iterdir()) == [".ingest-notes", ".nfs0001", ".snapshot"]


# Limits


def test_the_quota_covers_corpora_and_uploads(tmp_path):
    store = CorpusStore(tmp_path, max_bytes=1000)
    ingest(store, "x" * 500, "a")

    with pytest.raises(DiskFull) as caught:
        ingest(store, "y" * 600, "b")
    assert caught.value.metadata["free_bytes"] == str(1000 - 500 - 16)
    with store.upload(spec("b")) as upload, pytest.raises(DiskFull):
        upload.write(b"z" * 600)
    assert names(store) == ["a"]
    store.delete("a")
    assert ingest(store, "y" * 600, "b").size_bytes == 600


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs mount namespaces")
def test_a_full_disk_is_disk_full_and_the_store_goes_on(tmp_path):
    code = """
import io, sys
from headrace_extractor.corpora.spec import CorpusSpec
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.errors import DiskFull
store = CorpusStore(sys.argv[1])
spec = CorpusSpec(id="c", file_name="a.txt")
try:
    store.ingest(spec, io.BytesIO(b"word " * 1_000_000))
except DiskFull as exc:
    print(exc.metadata["free_bytes"].isdigit())
try:
    with store.upload(spec) as upload:
        for _ in range(64):
            upload.write(bytes(65536))
except DiskFull:
    print("upload")
print(sorted(p.name for p in store._root.iterdir()), store._quota.used_bytes)
print(store.ingest(spec, io.BytesIO(b"word")).n_documents)
"""
    mount = f'mount -t tmpfs -o size=1m none "{tmp_path}" && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, env={**os.environ}, check=False)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("may not mount here")

    assert done.stderr == ""
    assert done.stdout.split("\n")[:4] == ["True", "upload", "[] 0", "1"]


def test_closing_the_store_ends_ingests_under_way(store):
    def endless():
        yield [1] * 1000
        store.close()
        while True:
            yield [1] * 1000

    with pytest.raises(ShuttingDown):
        store.ingest_tokens("c", endless())

    assert names(store) == []


def test_memory_stays_bounded_while_a_corpus_is_ingested(store):
    line = b'{"text": "' + b"some words " * 20 + b'"}\n'
    file = io.BytesIO(line * 40_000)
    tracemalloc.start()

    corpus = store.ingest(spec(format_="jsonl"), file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert corpus.size_bytes > 8_000_000
    assert peak < 4_000_000


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=10), max_size=8))
def test_any_documents_are_read_back_as_they_were(tmp_path_factory, texts):
    store = CorpusStore(tmp_path_factory.mktemp("corpora"))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if not any(texts):
        with pytest.raises(CorpusEmpty):
            store.ingest(spec(format_="jsonl"), io.BytesIO(lines))
        return

    store.ingest(spec(format_="jsonl"), io.BytesIO(lines))

    with store.open("c") as reader:
        assert [reader.text(i) for i in range(len(reader))] == texts
        reader.verify()
