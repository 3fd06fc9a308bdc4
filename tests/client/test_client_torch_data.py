"""DataLoader workers and ranks: every row once, in an order that depends on nothing else, resumed from a number."""

import json
from dataclasses import replace

import pytest
import torch

from fix_scripted_extractor import EXTRACTION_ID
from headrace_client import Reading, errors
from headrace_client.integrations.torch_data import ActivationDataset, ActivationLoader

READING = Reading(order="shuffled", seed=4, block_rows=20, mix_blocks=2)
OPTIONS = {"columns": "token_id", "batch_size": 10, "reading": READING}


@pytest.fixture
def make(extractor_host):
    def one(**changes):
        return ActivationDataset(EXTRACTION_ID, connect={"extractor": extractor_host.address}, **{**OPTIONS, **changes})

    return one


def rows_of(loader):
    batches = [batch.tolist() for batch in loader]
    assert {len(batch) for batch in batches} <= {10}
    return batches


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_share_the_rows(make, client, start):
    client.extractions.get(EXTRACTION_ID)  # This process has spoken to servers before its workers begin.

    batches = rows_of(ActivationLoader(make(), num_workers=2, multiprocessing_context=start))

    assert len(batches) == 100
    assert len({row for batch in batches for row in batch}) == 1000


def test_batches_come_in_the_same_order_every_time(make):
    one, other = (rows_of(ActivationLoader(make(epochs=2), num_workers=2)) for _ in range(2))

    assert one == other
    assert one[:100] != one[100:]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_loop_resumes_behind_the_batch_it_had(make, n_workers):
    whole = rows_of(ActivationLoader(make(epochs=2), num_workers=n_workers))
    for n_batches in (1, 50, len(whole) // 2, len(whole) // 2 + 7, len(whole) - 1):
        loader = ActivationLoader(make(epochs=2), num_workers=n_workers)
        taken = [batch.tolist() for _, batch in zip(range(n_batches), loader, strict=False)]
        state = json.loads(json.dumps(loader.state_dict()))
        again = ActivationLoader(make(epochs=2), num_workers=n_workers)

        again.load_state_dict(state)

        assert taken + rows_of(again) == whole


def test_a_state_of_other_workers_or_ranks_is_refused(make):
    state = ActivationLoader(make(), num_workers=2).state_dict()

    for other in (ActivationLoader(make(), num_workers=3), ActivationLoader(make(rank=1, world=2), num_workers=2)):
        with pytest.raises(errors.InvalidArgument):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seed", {"reading": replace(READING, seed=5)}),
        ("batch_size", {"batch_size": 20}),
        ("order", {"reading": replace(READING, order="sequential")}),
        ("mix_blocks", {"reading": replace(READING, mix_blocks=3)}),
    ],
)
def test_a_state_of_other_batches_is_refused(make, name, change):
    state = json.loads(json.dumps(ActivationLoader(make()).state_dict()))

    with pytest.raises(errors.InvalidArgument, match=name):
        ActivationLoader(make(**change)).load_state_dict(state)


def test_a_state_of_another_extraction_is_refused(make, extractor_host):
    other = ActivationDataset("ex-2", connect={"extractor": extractor_host.address}, **OPTIONS)

    with pytest.raises(errors.InvalidArgument, match="ex-2"):
        ActivationLoader(make()).load_state_dict(ActivationLoader(other).state_dict())


def test_a_state_that_does_not_name_its_batches_is_believed(make):
    """As states of older versions are."""
    whole = rows_of(ActivationLoader(make()))
    loader = ActivationLoader(make())

    loader.load_state_dict({"n_batches": 40, "n_workers": 0, "rank": 0, "world": 1})

    assert rows_of(loader) == whole[40:]


def test_ranks_have_equal_numbers_of_batches_and_no_row_in_common(make):
    ranks = [rows_of(ActivationLoader(make(rank=rank, world=3))) for rank in range(3)]

    assert [len(batches) for batches in ranks] == [32] * 3
    assert len({row for batches in ranks for batch in batches for row in batch}) == 3 * 320


def test_the_rank_is_that_of_torch_distributed(make, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        dataset = make()

        assert dataset.ranks == (0, 1)
        assert dataset.__getstate__()["_ranks"] == (0, 1), "a spawned worker must be told"
    finally:
        torch.distributed.destroy_process_group()


def test_epochs_of_their_own_have_orders_of_their_own(make):
    dataset, two = make(), rows_of(ActivationLoader(make(epochs=2)))

    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert rows_of(ActivationLoader(dataset)) == two[epoch * 100 : (epoch + 1) * 100]


@pytest.mark.parametrize("options", [{"reading": Reading(shard=(0, 2))}, {"drop_last": False}, {"rank": 1}])
def test_what_is_the_datasets_own_affair_is_refused(make, options):
    with pytest.raises(errors.InvalidArgument):
        make(**options)


def test_a_state_is_loaded_by_torch_without_pickles(make, tmp_path):
    loader = ActivationLoader(make())
    next(iter(loader))
    torch.save(loader.state_dict(), tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt", weights_only=True)

    assert state == loader.state_dict()
    json.dumps(state)


@pytest.mark.parametrize("option", ["order", "seed", "transport", "colums"])
def test_an_option_that_activations_does_not_have_is_refused_at_once(make, option):
    with pytest.raises(errors.InvalidArgument, match=option):
        make(**{option: "shuffled"})
