"""The provider mixes rows, never ends, and gives each batch its own memory."""

import itertools

import pytest
import torch

from fix_train import blocks_of
from headrace_client.errors import InvalidArgument
from headrace_client.values import Recipe
from headrace_train.rows.blocks import RowFilter
from headrace_train.rows.provider import MixingProvider

D = 3


def rows(n_rows):
    """Rows with their own number as values."""
    return torch.arange(1.0, n_rows + 1)[:, None].expand(-1, D).clone()


def provider(acts, *, batch_size=50, buffer_rows=400, seed=0, positions=None, drop_bos=False, multiple=0.0, **options):
    row_filter = RowFilter(Recipe(packing="one_document"), drop_bos=drop_bos, max_norm_multiple=multiple)
    blocks = blocks_of(acts, positions, epochs=None, **options)
    return MixingProvider(
        blocks, row_filter, n_rows=len(acts), batch_size=batch_size, buffer_rows=buffer_rows, seed=seed
    )


def numbers(batches):
    return torch.cat([batch[:, 0] for batch in batches]).long().tolist()


def test_no_row_comes_twice_before_the_stream_repeats():
    one = provider(rows(2000))

    got = numbers(itertools.islice(one, (2000 - 400) // 50))

    assert len(got) == len(set(got)) == 1600


def test_batches_mix_rows_from_the_whole_buffer():
    one = provider(rows(20_000))
    list(itertools.islice(one, 40))

    batch = next(one)[:, 0]

    assert batch.max() - batch.min() > 300
    assert not torch.equal(batch, batch.sort().values)


def test_the_seed_alone_decides_the_order():
    first, again, other = (
        numbers(itertools.islice(provider(rows(1000), seed=seed, block_rows=block_rows), 30))
        for seed, block_rows in ((5, 100), (5, 33), (6, 100))
    )

    assert first == again
    assert first != other


def test_it_goes_on_over_epochs():
    batches = list(itertools.islice(provider(rows(130)), 40))

    assert {tuple(batch.shape) for batch in batches} == {(50, D)}
    assert set(numbers(batches)) == set(range(1, 131))


def test_a_batch_larger_than_the_set_is_filled_from_several_epochs():
    assert next(provider(rows(30), batch_size=80)).shape == (80, D)


def test_a_batch_is_fresh_memory():
    one, other = provider(rows(300)), provider(rows(300))
    for _ in range(12):
        batch, untouched = next(one), next(other)
        assert torch.equal(batch, untouched)
        batch.fill_(-1)


def test_the_first_batch_does_not_wait_for_the_whole_buffer():
    taken = []

    def counted():
        for block in blocks_of(rows(1000), block_rows=10):
            taken.append(len(block))
            yield block

    row_filter = RowFilter(Recipe(), drop_bos=False, max_norm_multiple=0)
    one = MixingProvider(counted(), row_filter, n_rows=1000, batch_size=50, buffer_rows=800, seed=0)
    next(one)

    assert sum(taken) == 800 // 4 + 50


def test_first_positions_and_outliers_never_come():
    acts = rows(600) / 600 + 1
    acts[::90] *= 50
    positions = torch.arange(600, dtype=torch.int32) % 20
    one = provider(acts, positions=positions, drop_bos=True, multiple=10.0)
    fit = torch.ones(600, dtype=torch.bool)
    fit[::90] = fit[::20] = False

    got = torch.cat(list(itertools.islice(one, 60)))[:, 0]

    assert torch.equal(got.unique(), acts[fit][:, 0].unique())


def test_rows_of_which_none_is_fit_are_an_error_not_a_hang():
    one = provider(rows(300), positions=torch.zeros(300, dtype=torch.int32), drop_bos=True)

    with pytest.raises(InvalidArgument, match="none of 300 rows") as raised:
        next(one)
    assert "--no-drop-bos" in raised.value.remedy


def test_time_spent_on_the_stream_is_counted():
    times = itertools.count()
    row_filter = RowFilter(Recipe(), drop_bos=False, max_norm_multiple=0)
    one = MixingProvider(
        blocks_of(rows(1000)),
        row_filter,
        n_rows=1000,
        batch_size=50,
        buffer_rows=400,
        seed=0,
        clock=lambda: next(times),
    )

    next(one)

    assert one.wait_s == 2  # Two blocks of a hundred rows, a tick each.
