"""Reading orders: every row once, shards disjoint and equal, the same for the same numbers in every version."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_log.order import Sequential, Shard, Shuffled, mixed_rows, permuted, shuffle_key, slot_of

SEEDS = st.integers(0, 2**64 - 1)


def shuffled(n_rows, block_rows=8, seed=1, epoch=0, shard=(0, 1)):
    return Shuffled(n_rows=n_rows, block_rows=block_rows, seed=seed, epoch=epoch, shard=Shard(*shard))


def rows_of(order, n_places):
    """Rows by place, as a reader gets them that asks for three at a time."""
    rows, place = [], 0
    while place < n_places:
        row, n_rows = order.stretch(place)
        n_rows = min(n_rows, 3, n_places - place)
        rows += range(row, row + n_rows)
        place += n_rows
    return rows


@settings(deadline=None)
@given(
    n_rows=st.integers(1, 400), block_rows=st.integers(1, 40), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 9)
)
def test_shuffled_has_every_row_once_and_blocks_in_one_piece(n_rows, block_rows, seed, epoch):
    order = shuffled(n_rows, block_rows, seed, epoch)

    rows = rows_of(order, order.n_places)

    assert sorted(rows) == list(range(n_rows))
    for before, row in itertools.pairwise(rows):
        assert row == before + 1 or row % block_rows == 0


@settings(deadline=None)
@given(n_rows=st.integers(1, 400), block_rows=st.integers(1, 40), count=st.integers(2, 7), shuffle=st.booleans())
def test_shards_are_disjoint_equal_and_whole_blocks(n_rows, block_rows, count, shuffle):
    got = []
    for index in range(count):
        if shuffle:
            order = shuffled(n_rows, block_rows, shard=(index, count))
            n_places = order.n_places
        else:
            order = Sequential(block_rows=block_rows, shard=Shard(index, count))
            n_places = order.n_places(n_rows)
        got.append(rows_of(order, n_places))

    assert {len(rows) for rows in got} == {n_rows // block_rows // count * block_rows}
    rows = [row for shard in got for row in shard]
    assert len(set(rows)) == len(rows)
    assert Counter(row // block_rows for row in rows) == dict.fromkeys({row // block_rows for row in rows}, block_rows)
    assert n_rows - len(rows) < block_rows * count


@settings(deadline=None)
@given(n_rows=st.integers(1, 300), place=st.integers(0, 299), block_rows=st.integers(1, 40))
def test_a_place_stands_for_the_same_row_wherever_reading_began(n_rows, place, block_rows):
    order = shuffled(n_rows, block_rows)
    place %= n_rows

    assert order.stretch(place).row == rows_of(order, n_rows)[place]


def test_sequential_shards_wait_for_a_round_of_blocks():
    order = Sequential(block_rows=10, shard=Shard(1, 3))

    assert [order.n_places(n_rows) for n_rows in (0, 29, 30, 59, 60)] == [0, 0, 10, 10, 20]
    assert rows_of(order, 20) == [*range(10, 20), *range(40, 50)]


@settings(deadline=None)
@given(n=st.integers(1, 500), key=st.integers(0, 2**64 - 1))
def test_the_permutation_has_an_inverse(n, key):
    numbers = permuted(np.arange(n, dtype=np.uint64), n, key)

    assert [slot_of(int(number), n, key) for number in numbers[:20]] == list(range(min(n, 20)))


def test_small_permutations_are_all_equally_likely():
    n_draws = 6000
    found = Counter(
        tuple(permuted(np.arange(3, dtype=np.uint64), 3, shuffle_key("blocks", seed)).tolist())
        for seed in range(n_draws)
    )

    assert len(found) == 6
    assert sum((n - n_draws / 6) ** 2 / (n_draws / 6) for n in found.values()) < 20.5  # Chi-square, p = 0.001.


def test_seed_epoch_and_extent_each_change_the_order():
    orders = [shuffled(640), shuffled(640, seed=2), shuffled(640, epoch=1), shuffled(639)]

    firsts = [tuple(rows_of(order, 600)) for order in orders]

    assert len(set(firsts)) == 4


def test_orders_are_those_of_every_version():
    """Golden numbers: a checkpoint of today resumes in every version to come."""
    order = shuffled(100, 8, seed=2**63 + 5, epoch=3)

    assert [order.stretch(place).row for place in range(0, 100, 8)] == [
        48,
        8,
        88,
        40,
        80,
        64,
        32,
        16,
        0,
        72,
        24,
        56,
        96,
    ]
    assert mixed_rows(10, 7, 1, 2).tolist() == [7, 8, 5, 6, 9, 4, 0, 1, 3, 2]


@settings(deadline=None)
@given(n=st.integers(0, 300), seed=st.integers(0, 2**64 - 1), window=st.integers(0, 2**40))
def test_mixing_takes_every_row_of_a_window_once(n, seed, window):
    rows = mixed_rows(n, seed, 0, window)

    assert sorted(rows.tolist()) == list(range(n))


@pytest.mark.parametrize("place", [0, 10**12])
def test_orders_of_any_length_cost_no_memory(place):
    order = shuffled(2**50, 1024, shard=(1, 4))

    assert order.stretch(place).n_rows == 1024 - place % 1024
