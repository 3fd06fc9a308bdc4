"""Headers of safetensors files: ours is the reading of the library, and a hostile header is an error of ours."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from fix_registry import write_safetensors
from headrace_models.errors import HeaderInvalid, TooManyTensors
from headrace_models.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, Header, TensorEntry, entries_from, read_header

GOOD = {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}


def written(path, header, *, data=b"", length=None):
    """Writes a file with this header, as JSON unless it is bytes, whatever it holds."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def test_our_reading_of_a_header_is_that_of_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": ("F32", (3, 5)), "b": ("F16", (2, 2)), "c": ("BF16", ())})
    with safe_open(path, framework="numpy") as theirs:
        shapes = {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()}  # noqa: SIM118 - no dict.
    header = read_header(path)

    assert {name: tensor.shape for name, tensor in header.tensors.items()} == shapes
    assert {name: (tensor.dtype, tensor.n_elements, tensor.n_bytes) for name, tensor in header.tensors.items()} == {
        "a": ("F32", 15, 60),
        "b": ("F16", 4, 8),
        "c": ("BF16", 1, 2),
    }
    assert header.file_bytes == path.stat().st_size


@given(
    shapes=st.dictionaries(st.text(max_size=8), st.lists(st.integers(0, 4), max_size=4), max_size=5),
    dtype=st.sampled_from(["float32", "float16", "int8", "bool", "uint64"]),
)
def test_every_file_that_safetensors_writes_is_read(shapes, dtype, tmp_path_factory):
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    tensors = {name: np.zeros(shape, dtype) for name, shape in shapes.items() if name != "__metadata__"}
    path.write_bytes(save(tensors))
    header = read_header(path)

    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        name: array.shape for name, array in tensors.items()
    }
    assert {name: tensor.n_bytes for name, tensor in header.tensors.items()} == {
        name: array.nbytes for name, array in tensors.items()
    }
    assert header.file_bytes == path.stat().st_size


def test_metadata_is_no_tensor(tmp_path):
    path = written(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}, "a": GOOD}, data=bytes(60))

    assert read_header(path).tensors == {"a": TensorEntry(dtype="F32", shape=(3, 5), start=0, end=60)}


def test_a_cut_file_is_shorter_than_its_header_says(tmp_path):
    path = written(tmp_path / "x.safetensors", {"a": GOOD}, data=bytes(59))

    assert read_header(path).file_bytes == path.stat().st_size + 1


@pytest.mark.parametrize("content", [b"", b"\x01", b"\0" * 7, b"\xff" * 16, b"\x09" + b"\0" * 7 + b"{}      "])
def test_a_length_beyond_the_file_is_refused_before_anything_is_read(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)

    with pytest.raises(HeaderInvalid, match=r"x\.safetensors is cut or no safetensors file"):
        read_header(path)


@pytest.mark.parametrize(
    ("size", "kind", "what"),
    [
        (100_000_001, HeaderInvalid, "cut or no safetensors"),
        (MAX_HEADER_BYTES + 1, TooManyTensors, "and Headrace reads"),
    ],
)
def test_a_header_beyond_the_formats_limit_or_ours_is_refused(tmp_path, size, kind, what):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(size.to_bytes(8, "little"))
        file.truncate(2 * size)  # Sparse: it takes no disk.

    with pytest.raises(kind, match=what):
        read_header(path)


def test_a_header_of_too_many_tensors_is_refused():
    document = {str(i): {"dtype": "F32", "shape": [], "data_offsets": [0, 4]} for i in range(MAX_TENSORS + 1)}

    with pytest.raises(TooManyTensors, match="200001 tensors"):
        entries_from(document, source="x")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        [],
        None,
        "a",
        {"a": None},
        {"a": [0, 1]},
        {"a": {}},
        {"a": GOOD | {"dtype": 4}},
        {"a": GOOD | {"shape": "35"}},
        {"a": GOOD | {"shape": {"3": 5}}},
        {"a": GOOD | {"shape": [3, -5]}},
        {"a": GOOD | {"shape": [3, 5.0]}},
        {"a": GOOD | {"shape": [True, 5]}},
        {"a": GOOD | {"shape": [3, "5"]}},
        {"a": GOOD | {"shape": [2**63]}},
        {"a": GOOD | {"shape": [2**62, 2**62]}},
        {"a": GOOD | {"shape": [1] * 65}},
        {"a": GOOD | {"data_offsets": [0]}},
        {"a": GOOD | {"data_offsets": [0, 60, 60]}},
        {"a": GOOD | {"data_offsets": [-60, 0]}},
        {"a": GOOD | {"data_offsets": [60, 0]}},
        {"a": GOOD | {"data_offsets": [0, 60.0]}},
        {"a": GOOD | {"data_offsets": [False, 60]}},
        {"a": GOOD | {"data_offsets": [0, 2**70]}},
        {"a": GOOD | {"data_offsets": [0, 1]}},
    ],
    ids=lambda header: repr(header)[:60],
)
def test_a_header_that_the_format_does_not_allow_is_refused(tmp_path, header):
    path = written(tmp_path / "x.safetensors", header, data=bytes(60))

    with pytest.raises(HeaderInvalid, match=r"x\.safetensors has a header that is no safetensors header"):
        read_header(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "F4"]) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4"]) | JSON,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 999), min_size=2, max_size=2) | JSON,
        "more": JSON,
    },
)


@given(document=JSON | st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=3))
@example(document={"a": GOOD})
@example(document={"a": GOOD | {"shape": [0, 2**62], "data_offsets": [0, 0]}})
def test_any_json_is_a_header_with_counts_in_range_or_refused(document):
    with contextlib.suppress(HeaderInvalid):
        for tensor in entries_from(document, source="x").values():
            assert isinstance(tensor.dtype, str)
            assert 0 <= tensor.start <= tensor.end < 2**63
            assert all(type(n) is int and n >= 0 for n in tensor.shape)
            assert 0 <= tensor.n_elements <= 8 * tensor.n_bytes


@given(
    length=st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 200),
    header=st.binary(max_size=64) | JSON | st.dictionaries(st.text(max_size=4), ENTRY, max_size=2),
    data=st.binary(max_size=16),
)
def test_any_file_has_a_header_or_is_refused(length, header, data, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("x") / "x.safetensors", header, data=data, length=length)
    with contextlib.suppress(HeaderInvalid):
        found = read_header(path)  # Any other error fails the test.

        assert isinstance(found, Header)
        assert 8 <= found.size_bytes <= path.stat().st_size
        assert found.file_bytes >= found.size_bytes


@given(position=st.integers(0, 199), byte=st.integers(0, 255))
def test_a_damaged_byte_never_is_another_error(position, byte, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("x") / "x.safetensors", {"a": GOOD, "b": GOOD}, data=bytes(120))
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(content)
    with contextlib.suppress(HeaderInvalid):
        read_header(path)
