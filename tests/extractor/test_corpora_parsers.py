from __future__ import annotations

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_extractor.corpora.files import contents, json_arrays, lines, parsers
from headrace_extractor.corpora.files import parquet as room
from headrace_extractor.corpora.files.parsers import parse
from headrace_extractor.corpora.spec import CorpusFormat, CorpusSpec, TextSplit
from headrace_extractor.errors import CorpusMalformed, FieldInvalid


def documents(content: bytes, format_: str = "txt", **spec) -> list[str]:
    found = parse(io.BytesIO(content), CorpusSpec(id="c", format=CorpusFormat(format_), **spec))
    return [document.decode() for document in found]


def malformed(content: bytes, format_: str, **spec) -> CorpusMalformed:
    with pytest.raises(CorpusMalformed) as caught:
        documents(content, format_, **spec)
    return caught.value


def parquet(table: pa.Table, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


# Text


def test_paragraphs_end_at_blank_lines():
    text = "\n\nfirst\nstill first\n \t\n\nsecond\r\ngoes on\r\n\r\nthird"

    assert documents(text.encode()) == ["first\nstill first", "second\r\ngoes on", "third"]


def test_every_line_that_is_not_blank_is_a_document():
    assert documents(b"a\n\n  \nb c\r\nd", text_split=TextSplit.LINES) == ["a", "b c", "d"]


def test_unicode_line_separators_cut_nothing():
    assert documents("a\x0bb\x85c\u2028d\n".encode(), text_split=TextSplit.LINES) == ["a\x0bb\x85c\u2028d"]


def test_a_whole_file_is_one_document_unaltered():
    assert documents(b"\n a\n\n\fb\r\n", text_split=TextSplit.NONE) == ["\n a\n\n\fb\r\n"]


def test_form_feeds_cut_within_and_between_lines():
    assert documents(b"page 1\n\f\npage 2\n\nmore\fpage 3\f\f", text_split=TextSplit.FORM_FEEDS) == [
        "page 1",
        "page 2\n\nmore",
        "page 3",
    ]


@pytest.mark.parametrize("split", list(TextSplit))
def test_a_blank_text_holds_no_document(split):
    assert documents(b"\xef\xbb\xbf \n\n", text_split=split) == []


def test_a_byte_order_mark_is_no_text():
    assert documents(b"\xef\xbb\xbfa") == ["a"]
    assert documents(b'\xef\xbb\xbf{"text": "a"}', "jsonl") == ["a"]
    assert documents(b"\xef\xbb\xbftext\na\n", "csv") == ["a"]


@pytest.mark.parametrize(("format_", "head"), [("txt", b"a\n"), ("jsonl", b'{"text": "a"}\n'), ("csv", b"text\n")])
def test_broken_utf8_is_named_by_line_and_byte(format_, head):
    error = malformed(head + b"ab\xffc\n", format_)

    assert error.metadata == {"line": "2", "byte": str(len(head) + 2)}


def test_a_document_beyond_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(contents, "MAX_DOCUMENT_BYTES", 8)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 32)

    assert documents(b"12345678\n", text_split=TextSplit.LINES, format_="txt") != []
    assert malformed(b"1234\n56789\n", "txt").metadata["line"] == "2"
    assert malformed(b"ok\n123456789", "txt", text_split=TextSplit.LINES).metadata["line"] == "2"
    assert malformed(b"x" * 40, "txt", text_split=TextSplit.NONE).metadata["line"] == "1"
    assert malformed(b'{"text": "123456789"}', "jsonl").metadata["limit_bytes"] == "8"
    assert malformed(b"text\n123456789\n", "csv").metadata["line"] == "2"


# JSON lines


def test_json_lines_give_the_text_under_the_key():
    content = b'{"text": "a\\nb", "n": 1}\r\n\n{"n": [{}], "text": ""}\n{"text": "\xc3\xa4\\ud83d\\ude00"}'

    assert documents(content, "jsonl") == ["a\nb", "", "ä😀"]
    assert documents(b'{"body": "x"}', "jsonl", text_column="body") == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", "no JSON"),
        (b'{"text": "a"', "no JSON"),
        (b'["a"]', "array"),
        (b'"a"', "string"),
        (b'{"text": null}', "null"),
        (b'{"text": 1.5}', "number"),
        (b'{"text": true}', "boolean"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": ' + b"9" * 5000 + b"}", "can't be read"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_a_malformed_json_line_is_named_by_its_number(line, message):
    error = malformed(b'{"text": "fine"}\n\n' + line + b"\n", "jsonl")

    assert error.metadata["line"] == "3"
    assert "3" in error.message
    assert message in error.message


def test_a_missing_key_lists_those_there_are():
    error = malformed(b'{"title": "a", "body": "b"}', "jsonl")

    assert error.metadata == {"line": "1", "columns": "title, body"}
    assert "text_column" in error.message


# CSV


def test_csv_fields_may_hold_commas_quotes_and_line_ends():
    content = b'id,text\r\n1,"a, ""b""\r\nc"\r\n\r\n2,\r\n3,plain\r\n'

    assert documents(content, "csv") == ['a, "b"\r\nc', "", "plain"]


def test_csv_without_the_column_lists_those_there_are():
    assert malformed(b"id,body\n1,a\n", "csv").metadata == {"line": "1", "columns": "id, body"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"2,b,c\n", "3 fields"),
        (b"2\n", "1 fields"),
        (b'2,"b" c\n', "no CSV"),
        (b'2,"never closed\n\n', "no CSV"),
    ],
)
def test_a_malformed_record_is_named_by_its_first_line(record, message):
    error = malformed(b'id,text\n1,"a\nb"\n' + record, "csv")

    assert error.metadata["line"] == "4"
    assert message in error.message


def test_a_column_named_twice_is_refused():
    assert "more than once" in malformed(b"text,text\na,b\n", "csv").message


def test_an_empty_csv_holds_no_document():
    assert documents(b"", "csv") == []
    assert documents(b"text\n", "csv") == []


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)))
def test_the_same_documents_come_out_of_every_format(texts):
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerows([["n", "text"], *enumerate(texts)])
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    arrow = pa.table({"text": pa.array(texts, pa.string())})

    assert documents(table.getvalue().encode(), "csv") == texts
    assert documents(lines.encode(), "jsonl") == texts
    assert documents(parquet(arrow), "parquet") == texts


# Parquet


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_is_read_over_all_row_groups(kind):
    texts = [f"document {i % 7}" for i in range(1000)]
    content = parquet(pa.table({"n": range(1000), "text": pa.array(texts).cast(kind)}), row_group_size=300)

    assert documents(content, "parquet") == texts


def test_parquet_rows_are_read_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(room, "_BATCH_BYTES", 1)
    texts = [str(i) for i in range(100)]

    assert documents(parquet(pa.table({"text": texts})), "parquet") == texts


def test_parquet_without_the_column_lists_those_there_are():
    assert malformed(parquet(pa.table({"a": ["x"], "b": [1]})), "parquet").metadata == {"columns": "a, b"}


def test_parquet_of_another_type_is_refused():
    assert "int64" in malformed(parquet(pa.table({"text": [1]})), "parquet").message


def test_a_null_is_named_by_its_row():
    content = parquet(pa.table({"text": ["a", "b", None]}), row_group_size=2)

    assert malformed(content, "parquet").metadata == {"row": "2"}


def test_broken_utf8_in_parquet_is_named_by_its_row():
    raw = pa.array([b"fine", b"a\xff"]).cast(pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 2, raw.buffers())

    assert malformed(parquet(pa.table({"text": broken})), "parquet").metadata == {"row": "1", "byte": "1"}


def test_truncated_and_damaged_parquet_is_malformed():
    content = parquet(pa.table({"text": ["some text " * 50] * 100}), compression="snappy")
    damaged = bytearray(content)
    damaged[4:200] = b"\xff" * 196

    assert "Parquet" in malformed(content[:-5], "parquet").message
    assert "Parquet" in malformed(b"", "parquet").message
    assert "Parquet" in malformed(bytes(damaged), "parquet").message


# Format and spec


@pytest.mark.parametrize(
    ("name", "format_"),
    [("a.TXT", "txt"), ("b.x.jsonl", "jsonl"), ("c.ndjson", "jsonl"), ("d.csv", "csv"), ("e.parquet", "parquet")],
)
def test_the_ending_of_the_file_name_decides_the_format(name, format_):
    assert CorpusSpec(id="c", file_name=name).file_format() == format_


@pytest.mark.parametrize("name", ["", "a.jsonl.gz", "text", "a.pdf"])
def test_an_unknown_ending_asks_for_a_format(name):
    with pytest.raises(FieldInvalid, match=r"set spec\.format") as caught:
        CorpusSpec(id="c", file_name=name).file_format()

    assert caught.value.field == "spec.format"


@pytest.mark.parametrize("corpus_id", ["", "A", "1a", "a-", "a" * 64, "a/b", "../x", ".a", "a\n"])
def test_ids_follow_the_rule(corpus_id):
    with pytest.raises(FieldInvalid, match="must match") as caught:
        CorpusSpec(id=corpus_id)

    assert caught.value.field == "spec.id"


@pytest.mark.parametrize("corpus_id", ["a", "a-b", "a" * 63, "a1"])
def test_ids_within_the_rule_pass(corpus_id):
    assert CorpusSpec(id=corpus_id).id == corpus_id


# Arrays, line ends, encodings, bytes


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'[{"text": "one"}, {"text": "two", "n": [[], {}]}]', ["one", "two"]),
        (b' \n[\n  {"text": "one"},\n  "two"\n]\n', ["one", "two"]),
        (b'\xef\xbb\xbf["\xc3\xa4", "\\ud83d\\ude00"]', ["ä", "😀"]),
        (b"[]", []),
    ],
)
def test_a_file_that_is_one_array_gives_its_elements(content, found):
    assert documents(content, "jsonl") == found


def test_an_array_is_read_in_blocks(monkeypatch):
    monkeypatch.setattr(json_arrays, "_BLOCK_BYTES", 7)
    rows = [{"text": "wörter " * i, "other": [i, "]", '\\"']} for i in range(30)]

    assert documents(json.dumps(rows, ensure_ascii=False, indent=1).encode(), "jsonl") == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("content", "metadata"),
    [
        (b'[{"text": "a"},\n {"text": "b"\n]', {"row": "1", "line": "3"}),
        (b'[{"text": "a"},\n {"txt": "b"}]', {"row": "1", "columns": "txt"}),
        (b'[{"text": "a"}, 3]', {"row": "1"}),
        (b'[{"text": "a"}\n{"text": "b"}]', {"line": "2"}),
        (b'["a", ', {"row": "1", "line": "1"}),
        (b'["a"] "b"', {}),
        (b'["a", "\xff"]', {"byte": "7"}),
        (b"[" * 100_000, {"row": "0"}),
        (b"[" + b"9" * 5000 + b"]", {"row": "0"}),
    ],
)
def test_an_array_that_breaks_is_refused_with_its_place(content, metadata):
    assert malformed(content, "jsonl").metadata == metadata


@pytest.mark.parametrize(
    ("content", "format_", "found"),
    [
        (b"one\rtwo\r\rthree", "txt", ["one\rtwo", "three"]),
        (b'{"text": "a"}\r{"text": "b"}\r', "jsonl", ["a", "b"]),
        (b'id,text\r1,"a"\r2,b\r', "csv", ["a", "b"]),
    ],
)
def test_lines_may_end_at_carriage_returns(content, format_, found):
    assert documents(content, format_) == found


def test_carriage_returns_end_no_line_where_line_feeds_do():
    assert documents(b"a\rb\nc\n", text_split=TextSplit.LINES) == ["a\rb", "c"]


@pytest.mark.parametrize("format_", ["txt", "jsonl", "csv"])
@pytest.mark.parametrize(("encoding", "byte"), [("utf-16-le", "1"), ("utf-16-be", "0")])
def test_utf_16_without_a_mark_is_refused_with_its_place(format_, encoding, byte):
    error = malformed('{"text": "water"}\n'.encode(encoding), format_)

    assert error.metadata == {"byte": byte}
    assert "UTF-16" in error.message


def test_a_line_of_many_strings_is_refused(monkeypatch):
    monkeypatch.setattr(json_arrays, "MAX_PARTS", 10)
    monkeypatch.setattr(json_arrays, "LONG_BYTES", 20)
    monkeypatch.setattr(json_arrays, "_BLOCK_BYTES", 30)
    monkeypatch.setattr(parsers, "LONG_BYTES", 20)
    quoted = json.dumps({"text": '"[{' * 100 + "\\"}).encode() + b"\n"
    keys = json.dumps({f"key {i}": i for i in range(20)}).encode()

    assert documents(quoted, "jsonl") == ['"[{' * 100 + "\\"]
    assert malformed(quoted + keys, "jsonl").metadata == {"line": "2"}
    assert malformed(quoted + b'{"text": [' + b"[]," * 20 + b"[]]}", "jsonl").metadata == {"line": "2"}
    assert malformed(b"[" + quoted + b"," + keys + b"]", "jsonl").metadata == {"row": "1"}


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]
)
def test_texts_of_parquet_may_be_bytes(kind):
    column = pa.array([b"one", "zwölf".encode()], pa.binary()).cast(kind)

    assert documents(parquet(pa.table({"text": column})), "parquet") == ["one", "zwölf"]
    broken = parquet(pa.table({"text": pa.array([b"ok", b"\xff"], pa.binary())}))
    assert malformed(broken, "parquet").metadata == {"row": "1", "byte": "0"}


def test_texts_that_repeat_are_in_memory_once():
    table = pa.table({"text": ["a" * 1_000_000] * 400 + [None]})
    before = pa.total_allocated_bytes()
    found, most = parse(io.BytesIO(parquet(table)), CorpusSpec(id="c", format=CorpusFormat.PARQUET)), 0

    with pytest.raises(CorpusMalformed) as caught:
        for document in found:
            assert len(document) == 1_000_000
            most = max(most, pa.total_allocated_bytes() - before)
    assert caught.value.metadata == {"row": "400"}
    assert most < 50_000_000


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<i4', 'fortran_order': False, 'shape': (-1, 4), }",
        b"{'descr': '<i4', 'fortran_order': False, 'shape': (2, 99999999999999999999), }",
        b"{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1,), }",
        b"{'descr': '<i4', 'fortran_order': False, 'shape': ((((((",
        b"(" * 5000,
        b"{'descr': '<i4', 'shape': (1,), }",
        b"\xff\x00",
    ],
)
def test_a_crooked_npy_header_is_refused(header):
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)

    assert "npy" in malformed(content, "token_ids").message or "array" in malformed(content, "token_ids").message
