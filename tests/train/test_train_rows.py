"""Attention sinks and outliers are left out of the rows an SAE learns from."""

import numpy as np
import pytest
import torch

from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT
from fix_train import blocks_of, documents, packed_rows
from headrace.extractor.v1 import extraction_pb2 as ex_pb
from headrace_client import HeadraceClient
from headrace_client.values import Recipe
from headrace_train.rows.blocks import RowBlock, RowFilter, read_blocks
from headrace_train.rows.source import Source


def row_filter(recipe=None, *, drop_bos=True, max_norm_multiple=10.0):
    return RowFilter(recipe or Recipe(context_size=16), drop_bos=drop_bos, max_norm_multiple=max_norm_multiple)


def sinks(one, provenance, block_rows):
    positions = torch.from_numpy(provenance["position"])
    acts = torch.zeros(len(positions), 1)
    return torch.cat([one.sinks(block) for block in blocks_of(acts, positions, block_rows=block_rows)])


@pytest.mark.parametrize("packing", ["packed", "one_document"])
@pytest.mark.parametrize("bos", ["document", "none"])
@pytest.mark.parametrize("block_rows", [7, 16, 100])
def test_the_first_position_of_every_piece_is_a_sink(packing, bos, block_rows):
    provenance, begins = packed_rows(documents(50), packing=packing, bos=bos)
    recipe = Recipe(context_size=16, packing=packing, bos=bos)

    found = sinks(row_filter(recipe), provenance, block_rows)

    assert torch.equal(found, torch.from_numpy(begins))


@pytest.mark.parametrize("dropped", [{"drop_first_positions": 2}, {"drop_special_tokens": True}])
def test_no_row_is_a_sink_where_the_recipe_left_them_out(dropped):
    provenance, begins = packed_rows(documents(50), **dropped)
    recipe = Recipe(context_size=16, **dropped)

    found = sinks(row_filter(recipe), provenance, 16)

    assert not begins.any()
    assert not found.any()


def test_sinks_stay_when_asked_for():
    provenance, _ = packed_rows(documents(20))

    assert not sinks(row_filter(drop_bos=False), provenance, 16).any()


def test_rows_far_longer_than_the_median_are_outliers():
    acts = torch.ones(10, 4)
    acts[3] *= 10.1
    acts[7] *= 9.9
    one = row_filter()
    block = RowBlock(first_row=1, acts=acts, positions=torch.ones(10, dtype=torch.int32))

    before = one.outliers(block)
    one.calibrate(acts)

    assert not before.any()
    assert one.outliers(block).nonzero().flatten().tolist() == [3]
    assert len(one.kept(block)) == 9


def test_blocks_know_their_first_row():
    class Batches:
        next_row = 0

        def __iter__(self):
            for n_rows in (4, 4, 2, 4):
                self.next_row = self.next_row % 10 + n_rows
                yield {"hook": torch.zeros(n_rows, 3), "position": torch.zeros(n_rows, dtype=torch.int32)}

    assert [block.first_row for block in read_blocks(Batches(), "hook")] == [0, 4, 8, 0]


@pytest.mark.parametrize(
    ("positions", "tokens", "found"),
    [
        ([0, 1, 2, 0, 1], [1, 5, 6, 1, 7], True),
        ([0, 1, 2, 0, 1], [1, 5, 6, 2, 7], False),
        ([0, 1, 2, 3, 4], [1, 5, 6, 1, 7], False),  # One document proves nothing,
        ([1, 2, 3, 1, 2], [1, 5, 6, 1, 7], False),  # nor do rows without first positions.
    ],
)
def test_documents_begin_with_a_bos_if_two_of_them_prove_it(planted_host, planted_registry, positions, tokens, found):
    planted = planted_host.servicer
    planted.extraction.spec.recipe.bos = ex_pb.BOS_POLICY_TOKENIZER
    planted.n_rows = planted.extraction.n_rows = planted.extraction.n_rows_expected = len(positions)
    planted.provenance = {"position": np.array(positions), "token_id": np.array(tokens)}

    with HeadraceClient.connect(planted_registry.address) as client:
        source = Source(client, client.extractions.get(EXTRACTION_ID), HOOKPOINT)
        assert source.begins_with_bos() is found
