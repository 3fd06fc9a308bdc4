"""Reads token ids and conversations from files, and columns within columns."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_extractor.corpora.files import arrays, contents
from headrace_extractor.corpora.files.parsers import parse
from headrace_extractor.corpora.ingest import steps
from headrace_extractor.corpora.spec import CorpusFormat, CorpusSpec
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.errors import CorpusEmpty, CorpusMalformed, CorpusNotFound, FieldInvalid

TALK = [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "Hi"}]


@pytest.fixture
def store(tmp_path):
    return CorpusStore(tmp_path / "corpora", allowed_roots=[tmp_path])


def found(content: bytes, name: str = "", **spec) -> list[bytes]:
    return list(parse(io.BytesIO(content), CorpusSpec(id="c", file_name=name, **spec)))


def tokens(content: bytes, name: str = "", **spec) -> list[list[int]]:
    return [np.frombuffer(document, "<i4").tolist() for document in found(content, name, **spec)]


def malformed(content: bytes, name: str = "", **spec) -> CorpusMalformed:
    with pytest.raises(CorpusMalformed) as caught:
        found(content, name, **spec)
    return caught.value


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def jsonl(*values, key="text") -> bytes:
    return b"".join(json.dumps({key: value}).encode() + b"\n" for value in values)


def parquet(values, type_=None, key="text") -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({key: pa.array(values, type_)}), file, row_group_size=3)
    return file.getvalue()


# Arrays


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 5),
    st.integers(1, 5),
    st.sampled_from(["<i4", ">i4", "u1", "<u2", "<i8", "<u8"]),
    st.booleans(),
)
def test_rows_of_an_array_are_documents_whatever_its_dtype(n_rows, length, dtype, long_blocks):
    array = (np.arange(n_rows * length).reshape(n_rows, length) % 200).astype(dtype)
    before = arrays._BLOCK_BYTES
    try:
        arrays._BLOCK_BYTES = before if long_blocks else 1
        assert tokens(npy(array), "ids.npy") == array.tolist()
    finally:
        arrays._BLOCK_BYTES = before


def test_an_array_of_one_dimension_is_one_document():
    assert tokens(npy(np.array([3, 1, 2])), "a.npy") == [[3, 1, 2]]
    assert tokens(npy(np.asfortranarray([[3, 1, 2]])), "a.npy") == [[3, 1, 2]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2)), "float64"),
        (np.array([[1, None]], dtype=object), "object"),
        (np.zeros((1, 2, 3), np.int32), "3 dimensions"),
        (np.array(3), "0 dimensions"),
        (np.asfortranarray(np.zeros((2, 3), np.int32)), "ascontiguousarray"),
        (np.array([[1, 2], [3, -1]]), "Row 1"),
        (np.array([[2**31, 2]]), "Row 0"),
    ],
)
def test_an_array_that_holds_no_token_ids_says_why(array, message):
    assert message in malformed(npy(array), "a.npy").message


def test_a_cut_or_broken_array_is_malformed():
    whole = npy(np.ones((4, 100), np.int32))

    assert "within row 3 of 4" in malformed(whole[:-1], "a.npy").message
    assert "npy" in malformed(whole[:20], "a.npy").message
    assert "npy" in malformed(arrays.NPY_MAGIC + b"\x09\x00" + bytes(100), "a.npy").message


def test_a_row_beyond_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(contents, "MAX_DOCUMENT_BYTES", 8)

    assert tokens(npy(np.ones((1, 2), np.int64)), "a.npy") == [[1, 1]]
    assert malformed(npy(np.ones((1, 3), np.int8)), "a.npy").metadata["limit_bytes"] == "8"
    assert malformed(jsonl([1, 2, 3]), "a.jsonl", format=CorpusFormat.TOKEN_IDS).metadata["line"] == "1"
    assert malformed(parquet([[1, 2, 3]]), "a.parquet", format=CorpusFormat.TOKEN_IDS).metadata["row"] == "0"


# Token ids in other files


def test_token_ids_come_from_json_lines_and_parquet_alike(store):
    documents = [[5, 6], [], [2**31 - 1], [7]]
    kinds = [pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_(pa.uint32())]
    files = [jsonl(*documents), *(parquet(documents, kind) for kind in kinds)]

    made = [
        store.ingest(CorpusSpec(id=f"c{i}", format=CorpusFormat.TOKEN_IDS), io.BytesIO(file))
        for i, file in enumerate(files)
    ]

    assert len({corpus.digest for corpus in made} | {store.ingest_tokens("d", documents).digest}) == 1
    assert all(corpus.tokenized for corpus in made)


def test_a_fixed_size_list_holds_token_ids_too():
    content = parquet([[1, 2], [3, 4]], pa.list_(pa.int16(), 2), key="ids")

    assert tokens(content, format=CorpusFormat.TOKEN_IDS, text_column="ids") == [[1, 2], [3, 4]]


@pytest.mark.parametrize("value", ["1 2", 5, None, [1, "2"], [1.0], [True], [[1]], {"a": 1}])
def test_what_is_no_list_of_integers_is_named_by_its_line(value):
    error = malformed(jsonl([1], value), format=CorpusFormat.TOKEN_IDS)

    assert error.metadata == {"line": "2"}
    assert "list of integers" in error.message


@pytest.mark.parametrize("value", [[-1], [2**31]])
def test_token_ids_beyond_int32_are_named_by_their_place(value):
    assert malformed(jsonl([1], value), format=CorpusFormat.TOKEN_IDS).metadata == {"line": "2"}
    content = parquet([[1], value], pa.list_(pa.int64()))
    assert malformed(content, format=CorpusFormat.TOKEN_IDS).metadata == {"row": "1"}


def test_nulls_among_token_ids_are_named_by_their_row():
    for values in ([[1], [2], [3], [4], None], [[1], [2], [3], [4], [None]]):
        assert malformed(parquet(values), format=CorpusFormat.TOKEN_IDS).metadata == {"row": "4"}


def test_a_column_of_text_holds_no_token_ids_and_the_other_way_round():
    assert "string" in malformed(parquet(["a"]), format=CorpusFormat.TOKEN_IDS).message
    assert "list" in malformed(parquet([[1]]), format=CorpusFormat.PARQUET).message


# Conversations


def test_conversations_of_json_lines_and_parquet_are_the_same_corpus(store):
    talks = [TALK, [], [{"content": "x", "role": "user", "name": "Ada"}]]
    spec = {"chat": True, "text_column": "messages"}
    lines = store.ingest(
        CorpusSpec(id="a", format=CorpusFormat.JSONL, **spec), io.BytesIO(jsonl(*talks, key="messages"))
    )
    table = store.ingest(
        CorpusSpec(id="b", format=CorpusFormat.PARQUET, **spec), io.BytesIO(parquet(talks, key="messages"))
    )

    assert lines.digest == table.digest
    assert (lines.chat, lines.tokenized, lines.n_documents) == (True, False, 3)
    with store.open("b") as reader:
        assert [reader.messages(i) for i in range(3)] == talks
        reader.verify()
        with pytest.raises(TypeError):
            reader.text(0)
        with pytest.raises(TypeError):
            reader.token_ids(0)
    assert CorpusStore(store._root).get("a") == lines


def test_a_corpus_of_conversations_differs_from_the_same_bytes_as_text(store):
    talk = CorpusSpec(id="a", format=CorpusFormat.JSONL, chat=True)
    chat = store.ingest(talk, io.BytesIO(jsonl(TALK)))
    with store.open("a") as reader:
        text = reader.content(0).decode()

    assert store.ingest(CorpusSpec(id="b", format=CorpusFormat.JSONL), io.BytesIO(jsonl(text))).digest != chat.digest


@pytest.mark.parametrize(
    "value", ["hello", None, 3, {"role": "user"}, ["hello"], [{"role": "user"}], [{"role": "user", "content": 3}]]
)
def test_what_is_no_conversation_is_named_by_its_line(value):
    error = malformed(jsonl(TALK, value), "a.jsonl", chat=True)

    assert error.metadata == {"line": "2"}
    assert "`role`" in error.message or "`content`" in error.message


def test_a_null_conversation_is_named_by_its_row():
    assert malformed(parquet([TALK, None]), "a.parquet", chat=True).metadata == {"row": "1"}
    assert "list of structs" in malformed(parquet(["a"]), "a.parquet", chat=True).message


def test_what_json_can_not_hold_is_refused():
    assert (
        "what JSON can't"
        in malformed(b'{"text": [{"role": "a", "content": "b", "n": NaN}]}', "a.jsonl", chat=True).message
    )
    assert "surrogate" in malformed(b'{"text": [{"role": "a", "content": "\\ud800"}]}', "a.jsonl", chat=True).message


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.npy"])
def test_only_files_with_lists_hold_conversations(name):
    with pytest.raises(FieldInvalid, match="JSON lines or Parquet") as caught:
        CorpusSpec(id="c", file_name=name, chat=True).file_format()
    assert caught.value.field == "spec.chat"


def test_empty_conversations_alone_make_no_corpus(store):
    with pytest.raises(CorpusEmpty):
        store.ingest(CorpusSpec(id="c", format=CorpusFormat.JSONL, chat=True), io.BytesIO(jsonl([], [])))


# Columns within columns


def test_dots_lead_into_objects_and_structs_unless_a_name_has_them():
    nested, flat = {"a": {"b": "inner"}}, {"a.b": "outer", "a": {"b": "inner"}}
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([nested, nested]), file)

    assert found(json.dumps(nested).encode(), "x.jsonl", text_column="a.b") == [b"inner"]
    assert found(json.dumps(flat).encode(), "x.jsonl", text_column="a.b") == [b"outer"]
    assert found(file.getvalue(), "x.parquet", text_column="a.b") == [b"inner", b"inner"]


def test_a_path_that_leads_nowhere_names_the_columns():
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"a": {"b": "inner"}}, {"a": None}]), file)

    for path in ("a.c", "a.b.c", "x.y"):
        assert malformed(b'{"a": {"b": "c"}}', "x.jsonl", text_column=path).metadata["columns"] == "a"
        assert malformed(file.getvalue(), "x.parquet", text_column=path).metadata == {"columns": "a"}
    assert malformed(file.getvalue(), "x.parquet", text_column="a.b").metadata == {"row": "1"}


def test_contents_may_be_parts_or_null_in_either_format(store):
    call = {"function": {"name": "look"}, "id": "1", "type": "function"}
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    spec = {"chat": True, "text_column": "messages"}
    lines = store.ingest(CorpusSpec(id="a", format=CorpusFormat.JSONL, **spec), io.BytesIO(jsonl(talk, key="messages")))
    parts = [talk[0], {"role": "user", "content": [{"type": "text", "text": "and"}]}]
    table = CorpusSpec(id="b", format=CorpusFormat.PARQUET, **spec)
    store.ingest(table, io.BytesIO(parquet([parts], key="messages")))

    with store.open("a") as reader, store.open("b") as other:
        assert reader.messages(0) == talk
        assert other.messages(0) == parts
    assert lines.chat


def test_documents_of_a_thousand_times_their_file_are_refused(store, monkeypatch):
    monkeypatch.setattr(steps, "_FREE_EXPANSION_BYTES", 0)
    monkeypatch.setattr(steps, "MAX_EXPANSION", 10)
    fits, bomb = parquet(["a" * 1000]), parquet(["a" * 100_000] * 30)

    assert store.ingest(CorpusSpec(id="a", format=CorpusFormat.PARQUET), io.BytesIO(fits)).n_documents == 1
    with pytest.raises(CorpusMalformed, match="more than 10 times"):
        store.ingest(CorpusSpec(id="b", format=CorpusFormat.PARQUET), io.BytesIO(bomb))
    with pytest.raises(CorpusNotFound):
        store.get("b")
