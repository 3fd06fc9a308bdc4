"""Rows cut into contexts of one length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_client.integrations.contexts import ContextCutter


def table(lengths):
    """Documents of so many rows; `row` numbers them."""
    documents = np.concatenate([np.full(n, number) for number, n in enumerate(lengths)] or [np.zeros(0)])
    positions = np.concatenate([np.arange(n) for n in lengths] or [np.zeros(0)])
    return {"document": documents, "position": positions, "row": np.arange(len(documents))}


def parts(rows, sizes):
    at = 0
    for size in sizes:
        yield {name: values[at : at + size] for name, values in rows.items()}
        at += size
    yield {name: values[at:] for name, values in rows.items()}


def cut(cutter, tables):
    return [list(context) for contexts in cutter.cut(tables) for context in contexts["row"]]


def test_a_context_has_rows_of_one_document_from_its_beginning_on():
    cutter = ContextCutter(3)

    assert cut(cutter, [table([7, 2, 3])]) == [[0, 1, 2], [3, 4, 5], [9, 10, 11]]
    assert cutter.n_left_out == 3


def test_a_piece_of_a_long_document_begins_a_context():
    rows = table([4, 4])
    rows["document"][:] = 0

    assert cut(ContextCutter(3), [rows]) == [[0, 1, 2], [4, 5, 6]]


def test_joined_documents_leave_out_the_last_rows_only():
    cutter = ContextCutter(3, join=True)

    assert cut(cutter, [table([2, 2, 4])]) == [[0, 1, 2], [3, 4, 5]]
    assert cutter.n_left_out == 2


def test_positions_that_have_no_row_do_not_end_a_document():
    rows = table([4])
    rows["position"][:] = [1, 2, 5, 6]

    assert cut(ContextCutter(4), [rows]) == [[0, 1, 2, 3]]


@given(
    st.lists(st.integers(1, 9), max_size=8), st.lists(st.integers(0, 12), max_size=6), st.integers(1, 5), st.booleans()
)
def test_contexts_do_not_depend_on_how_rows_arrive(lengths, sizes, size, join):
    rows = table(lengths)
    whole, pieces = ContextCutter(size, join=join), ContextCutter(size, join=join)

    expected = cut(whole, [rows])

    assert cut(pieces, parts(rows, sizes)) == expected
    assert pieces.n_left_out == whole.n_left_out == len(rows["row"]) - size * len(expected)


@pytest.mark.parametrize("join", [True, False])
def test_no_rows_are_no_contexts(join):
    assert cut(ContextCutter(3, join=join), [table([])]) == []
