import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.extractor.v1 import extraction_service_pb2 as pb
from headrace_log.frames import ALIGNMENT, FrameError, decode_chunk, encode_chunk
from headrace_log.layout import Dtype

ROW_NUMBERS = st.integers(min_value=0, max_value=2**62)
DTYPES = st.sampled_from(list(Dtype))
COLUMNS = st.lists(st.tuples(DTYPES, st.integers(min_value=1, max_value=70)), max_size=6)


def columns_of(shapes: list[tuple[Dtype, int]], n_rows: int, seed: int) -> list[memoryview]:
    random = np.random.default_rng(seed)
    return [memoryview(random.bytes(n_rows * width * dtype.itemsize)) for dtype, width in shapes]


@given(first_row=ROW_NUMBERS, n_rows=st.integers(1, 60), shapes=COLUMNS, seed=st.integers(0, 9))
def test_generated_stub_reads_what_frames_writes(first_row, n_rows, shapes, seed):
    columns = columns_of(shapes, n_rows, seed)

    chunk = pb.StreamActivationsResponse.FromString(encode_chunk(first_row, n_rows, columns)).chunk

    assert (chunk.first_row, chunk.n_rows) == (first_row, n_rows)
    assert all(offset % ALIGNMENT == 0 for offset in chunk.column_offsets)
    read = [chunk.payload[at : at + len(c)] for at, c in zip(chunk.column_offsets, columns, strict=True)]
    assert read == [bytes(c) for c in columns]


@given(first_row=ROW_NUMBERS, n_rows=st.integers(1, 60), shapes=COLUMNS, seed=st.integers(0, 9), position=ROW_NUMBERS)
def test_frames_writes_the_very_bytes_a_generated_stub_writes(first_row, n_rows, shapes, seed, position):
    message = encode_chunk(first_row, n_rows, columns_of(shapes, n_rows, seed), position)

    assert pb.StreamActivationsResponse.FromString(message).SerializeToString(deterministic=True) == message


@given(
    first_row=ROW_NUMBERS,
    n_rows=st.integers(0, 2**31 - 1),
    offsets=st.lists(st.integers(0, 2**31 - 1), max_size=5),
    padding=st.binary(max_size=200),
    position=ROW_NUMBERS,
    payload=st.binary(max_size=500),
)
def test_frames_reads_what_a_generated_stub_writes(first_row, n_rows, offsets, padding, position, payload):
    chunk = pb.ActivationChunk(
        first_row=first_row,
        n_rows=n_rows,
        column_offsets=offsets,
        padding=padding,
        position=position,
        payload=payload,
    )

    parsed = decode_chunk(pb.StreamActivationsResponse(chunk=chunk).SerializeToString())

    assert parsed is not None
    assert (parsed.first_row, parsed.n_rows, parsed.column_offsets) == (first_row, n_rows, tuple(offsets))
    assert parsed.payload == payload
    assert parsed.position == position


@given(first_row=ROW_NUMBERS, n_rows=st.integers(1, 60), shapes=COLUMNS.filter(bool), seed=st.integers(0, 9))
def test_columns_are_aligned_views_of_the_message(first_row, n_rows, shapes, seed):
    columns = columns_of(shapes, n_rows, seed)
    message = encode_chunk(first_row, n_rows, columns)

    chunk = decode_chunk(message)

    base = np.frombuffer(message, np.uint8).__array_interface__["data"][0]
    for at, column in enumerate(columns):
        view = np.frombuffer(chunk.column(at, len(column) // n_rows), np.uint8)
        assert (view.__array_interface__["data"][0] - base) % ALIGNMENT == 0
        assert bytes(view) == bytes(column)


@pytest.mark.parametrize("boundary", [1 << 7, 1 << 14, 1 << 21])
def test_the_payload_is_aligned_where_the_length_of_the_message_takes_a_byte_more(boundary):
    content = memoryview(bytes(boundary))
    for n_bytes in range(max(1, boundary - 200), boundary):
        message = encode_chunk(2**40, 1, [content[:n_bytes]])

        chunk = decode_chunk(message)

        assert len(chunk.payload) == n_bytes
        assert (len(message) - n_bytes) % ALIGNMENT == 0


@pytest.mark.parametrize(
    "message",
    [
        pb.StreamActivationsResponse(header=pb.StreamHeader(set_id="a")),
        pb.StreamActivationsResponse(progress=pb.StreamProgress(n_rows=3)),
        pb.StreamActivationsResponse(end=pb.StreamEnd(next_row=3)),
        pb.StreamActivationsResponse(),
    ],
)
def test_other_messages_are_left_to_the_stub(message):
    assert decode_chunk(message.SerializeToString()) is None


@given(cut=st.integers(min_value=3, max_value=200))
def test_a_damaged_chunk_is_refused_or_left_to_the_stub(cut):
    message = encode_chunk(7, 4, [memoryview(bytes(64)), memoryview(bytes(16))])
    damaged = message[: min(cut, len(message) - 1)]

    assert decode_chunk(damaged) is None


def test_a_field_that_runs_past_the_chunk_is_a_frame_error():
    inner = bytes([(15 << 3) | 2, 100]) + b"abc"

    with pytest.raises(FrameError, match="middle of a field"):
        decode_chunk(bytes([(15 << 3) | 2, len(inner)]) + inner)


def test_column_beyond_the_payload_is_a_frame_error():
    chunk = decode_chunk(encode_chunk(0, 2, [memoryview(bytes(8))]))

    with pytest.raises(FrameError, match="cut short"):
        chunk.column(0, 8)


def test_unpacked_offsets_and_unknown_fields_are_read():
    inner = bytes([0x10, 2, 0x18, 0, 0x18, 0x40, (9 << 3) | 2, 1, 0x55, (15 << 3) | 2, 1, 0x7F])

    chunk = decode_chunk(bytes([0x7A, len(inner)]) + inner)

    assert (chunk.n_rows, chunk.column_offsets, bytes(chunk.payload)) == (2, (0, 64), b"\x7f")


def test_golden_bytes():
    token_ids = np.array([1, 258], "<i4")
    activations = np.array([[1.0, -2.0], [0.5, 3.0]], "<f4")

    message = encode_chunk(300, 2, [memoryview(token_ids).cast("B"), memoryview(activations).cast("B")])

    assert message.hex() == GOLDEN


# Pins the wire format: a change needs a decision record and a new field, never a new meaning.
GOLDEN = (
    "7a8d0108ac0210021a0200402230" + "00" * 48 + "7a500100000002010000" + "00" * 56 + "0000803f000000c00000003f00004040"
)
