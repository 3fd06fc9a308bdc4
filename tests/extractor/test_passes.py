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


def test_a_hole_is_filled_alone_and_ends_where_the_column_goes_on():
    there = index((10, "pab"), (7, "pb"), (5, "pab"), (5, "pb"))

    assert plan(there, "pab", 0) == Pass(columns=("a",), max_rows=17)
    filled = index((10, "pab"), (7, "pab"), (5, "pab"), (5, "pb"))
    assert plan(filled, "pab", 0) == Pass(columns=("a",), max_rows=27)


def test_columns_with_holes_at_one_place_are_filled_together_up_to_the_shorter_one():
    there = index((10, "pab"), (7, "p"), (5, "pb"), (5, "pab"))

    assert plan(there, "pab", 27) == Pass(columns=("a", "b"), max_rows=17)


def test_rows_behind_a_hole_are_not_computed_again():
    there = index((10, "pa"), (7, "p"), (5, "pa"))

    assert plan(there, "pa", 22) == Pass(columns=("a",), max_rows=17)
    assert plan(index((10, "pa"), (7, "pa"), (5, "pa")), "pa", 22) is None
