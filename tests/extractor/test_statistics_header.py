"""The header of a stream brings statistics of what is sealed in the columns asked for."""

import numpy as np
import pytest

from headrace.extractor.v1 import extraction_service_pb2 as pb
from headrace_client.rpc.convert.streams import header_from_pb
from headrace_extractor.rpc.convert.statistics import MAX_VECTOR_BYTES, statistics_to_pb
from headrace_log.layout import PROVENANCE, ColumnSpec, Dtype
from headrace_log.manifest import Manifest
from headrace_log.statistics import ColumnStatistics
from headrace_log.writer import SetWriter

GRPC_MESSAGE_BYTES = 4 * 1024 * 1024


def summarize(column, rows, scales):
    values = np.frombuffer(rows, np.float32).reshape(-1, column.width).astype(float)
    squares = (values**2).sum(1)
    return ColumnStatistics(
        count=len(values),
        mean=values.mean(0),
        m2=((values - values.mean(0)) ** 2).sum(0),
        mean_norm=np.sqrt(squares).mean(),
        mean_squared_norm=squares.mean(),
    )


@pytest.fixture
def make_set(tmp_path):
    def make(widths, n_rows=12):
        columns = [
            ColumnSpec(name=f"blocks.{layer}.hook_resid_post", dtype=Dtype.FLOAT32, width=width)
            for layer, width in enumerate(widths)
        ]
        manifest = Manifest(set_id="s", identity={}, columns=(*PROVENANCE, *columns), segment_rows=10)
        manifest.save(tmp_path)
        with SetWriter.open(tmp_path, summarize=summarize) as writer:
            while writer.next_row < n_rows:
                reservation = writer.reserve(n_rows - writer.next_row)
                for number, column in enumerate(columns):
                    rows = np.full((reservation.n_rows, column.width), number + 2, np.float32)
                    reservation.columns[column.name][:] = rows.tobytes()
                writer.commit(reservation.n_rows, {})
        return tmp_path, manifest.columns

    return make


def through_the_wire(statistics):
    sent = pb.StreamHeader(set_id="s", statistics=statistics).SerializeToString()
    assert len(sent) < GRPC_MESSAGE_BYTES
    return header_from_pb(pb.StreamHeader.FromString(sent)).statistics


def test_the_columns_asked_for_have_statistics_of_the_sealed_rows(make_set):
    folder, columns = make_set([4, 9, 2])

    (found,) = through_the_wire(statistics_to_pb(folder, [columns[0], columns[4]]))

    assert (found.name, found.count) == ("blocks.1.hook_resid_post", 10)
    assert found.mean == (3.0,) * 9
    assert found.m2 == (0.0,) * 9
    assert found.mean_norm == pytest.approx(9.0)
    assert found.mean_squared_norm == pytest.approx(81.0)


def test_there_are_none_before_a_segment_is_sealed(make_set):
    folder, columns = make_set([4], n_rows=9)

    assert statistics_to_pb(folder, columns) == []


def test_vectors_that_no_message_could_take_are_left_out(make_set):
    widths = [MAX_VECTOR_BYTES // 64] * 6
    folder, columns = make_set(widths, n_rows=10)

    found = through_the_wire(statistics_to_pb(folder, columns))

    assert [len(each.mean) for each in found] == [widths[0]] * 4 + [0] * 2
    assert [len(each.m2) for each in found] == [widths[0]] * 4 + [0] * 2
    assert found[5].mean_norm == pytest.approx(7 * widths[0] ** 0.5)
