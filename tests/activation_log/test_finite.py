"""Counts of NaN and infinity, exact for any number of rows."""

import numpy as np
import pytest

from headrace_log.finite import non_finite
from headrace_log.index import SegmentIndex
from headrace_log.layout import PROVENANCE, ColumnSpec, Dtype, scale_column, segment_path
from headrace_log.manifest import Manifest
from headrace_log.writer import SetWriter

WIDTH = 3
SEGMENT_ROWS = 10
N_ROWS = 25
NAME = "blocks.0.hook_resid_post"
BAD = {4: [np.nan, 1, np.inf], 12: [0, -np.inf, 0], 17: [np.nan] * 3}


def stored(dtype):
    """The rows in the storage dtype, as bytes, with the rows of `BAD` among them."""
    rows = np.linspace(-60000, 60000, N_ROWS * WIDTH, dtype=np.float32).reshape(N_ROWS, WIDTH)
    for row, values in BAD.items():
        rows[row] = values
    if dtype is Dtype.BFLOAT16:
        return (rows.view("<u4") >> 16).astype("<u2")
    return rows.astype({Dtype.FLOAT32: "<f4", Dtype.FLOAT16: "<f2"}[dtype])


def write(folder, columns, values):
    columns = (*PROVENANCE, *columns)
    Manifest(set_id="s", identity={}, columns=columns, segment_rows=SEGMENT_ROWS).save(folder)
    with SetWriter.open(folder) as writer:
        while writer.next_row < N_ROWS:
            reservation = writer.reserve(min(5, N_ROWS - writer.next_row))
            part = slice(writer.next_row, writer.next_row + reservation.n_rows)
            for column in columns[len(PROVENANCE) :]:
                reservation.columns[column.name][:] = values[column.name][part].tobytes()
            n_bad = WIDTH * sum(part.start <= row < part.stop for row in BAD)
            writer.commit(reservation.n_rows, {}, {NAME: n_bad} if n_bad else None)
        writer.finish()
    return SegmentIndex.load(folder)


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.FLOAT16, Dtype.BFLOAT16])
def test_part_of_a_segment_is_counted_value_by_value(tmp_path, dtype):
    values = stored(dtype)
    index = write(tmp_path, [ColumnSpec(name=NAME, dtype=dtype, width=WIDTH)], {NAME: values})

    counted = [non_finite(tmp_path, index, ["token_id", NAME], end_row).get(NAME, 0) for end_row in (4, 5, 12, 13, 18)]

    recorded_first = 3  # Whole segments count as recorded: here a whole row for each bad row.
    assert counted == [0, 2, recorded_first, recorded_first + 1, recorded_first + 4]
    assert non_finite(tmp_path, index, [NAME], N_ROWS) == {NAME: 9}
    assert non_finite(tmp_path, index, ["token_id"], N_ROWS) == {}


def test_8_bit_rows_are_as_finite_as_their_scale(tmp_path):
    scale = ColumnSpec(name=scale_column(NAME), dtype=Dtype.FLOAT32, width=1)
    column = ColumnSpec(name=NAME, dtype=Dtype.INT8, width=WIDTH, scale_column=scale.name)
    scales = np.ones(N_ROWS, "<f4")
    scales[list(BAD)] = np.nan
    values = {NAME: np.ones((N_ROWS, WIDTH), np.int8), scale.name: scales}
    index = write(tmp_path, [column, scale], values)

    assert non_finite(tmp_path, index, [NAME], 4) == {}
    assert non_finite(tmp_path, index, [NAME], 13) == {NAME: 6}


def test_rows_that_were_let_go_count_as_recorded(tmp_path):
    column = ColumnSpec(name=NAME, dtype=Dtype.FLOAT32, width=WIDTH)
    index = write(tmp_path, [column], {NAME: stored(Dtype.FLOAT32)})
    segment_path(tmp_path, column, 0).unlink()

    assert non_finite(tmp_path, index, [NAME], 4) == {NAME: 3}
