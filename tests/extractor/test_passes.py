from headrace_extractor.extractions.passes import Pass, Want, next_pass
from headrace_log.index import SegmentIndex, SegmentRecord


def index(*segments):
    """Segments as (rows, columns)."""
    records, first_row = [], 0
    for number, (n_rows, columns) in enumerate(segments):
        records.append(
            SegmentRecord(
                segment=number, first_row=first_row, n_rows=n_rows, digests=dict.fromkeys(columns, "d"), resume={}
            )
        )
        first_row += n_rows
    return SegmentIndex(records=tuple(records))


def plan(index, columns, max_rows):
    return next_pass(index, [Want(columns=tuple(columns), max_rows=max_rows)])


def test_a_new_set_is_written_in_one_pass():
    assert plan(index(), "pa", 0) == Pass(columns=("p", "a"), max_rows=0)
    assert plan(index(), "pa", 30) == Pass(columns=("p", "a"), max_rows=30)


def test_a_column_that_lags_catches_up_alone():
    there = index((10, "pa"), (7, "pa"))

    assert plan(there, "pab", 0) == Pass(columns=("b",), max_rows=17)


def test_columns_go_on_together_once_they_are_level():
    there = index((10, "pab"), (7, "pab"))

    assert plan(there, "pab", 40) == Pass(columns=("p", "a", "b"), max_rows=40)


def test_a_segment_that_exists_is_filled_beyond_the_rows_asked_for():
    there = index((10, "pa"), (7, "pa"))

    assert plan(there, "pb", 12) == Pass(columns=("b",), max_rows=17)


def test_the_one_furthest_behind_goes_first():
    there = index((10, "pab"), (7, "pa"), (5, "pa"))

    assert plan(there, "pabc", 0) == Pass(columns=("c",), max_rows=10)
