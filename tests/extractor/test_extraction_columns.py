"""Columns that several extractions share: added later, of different length, with values not all allow."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fix_extractor import model_info
from fix_runner import documents
from headrace_extractor.corpora.packing import SpecialTokens, count_rows
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.extractions.values import ExtractionState

pytestmark = pytest.mark.asyncio(loop_scope="module")

RECIPE = Recipe(context_size=64, batch_size=2, bos="document")
SPECIAL = SpecialTokens(bos_id=1, eos_id=2)
BROKEN_TOKEN = 96


def n_rows_of(seed):
    n_rows, _ = count_rows(documents(400, seed=seed), RECIPE, SPECIAL)
    return n_rows


@pytest.fixture
def broken_model(tiny_llama, tmp_path):
    """A model that gives NaN for one token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN_TOKEN] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    return model_info(tmp_path / "broken", "broken")


async def test_nobody_gets_values_that_only_others_allow(start_extractor, broken_model):
    extractor = await start_extractor()
    extractor.registry.models["broken"] = broken_model
    extractor.add_corpus([*documents(200, seed=37), [5, BROKEN_TOKEN, 6]])
    recipe = Recipe(context_size=64, batch_size=2, packing="one_document")
    request = {"model_id": "broken", "recipe": recipe}
    lenient = await extractor.extract(**request, allow_non_finite=True)
    content, _, _ = await extractor.read(lenient)
    await asyncio.wait([lenient.task])
    strict = await extractor.extract(**request)
    await asyncio.wait([strict.task], timeout=30)
    is_broken = np.isnan(np.frombuffer(content[lenient.columns[-1]], np.float32)).reshape(lenient.value.n_rows, -1)
    n_broken, first_broken = is_broken.sum(), int(is_broken.any(1).argmax())
    early = await extractor.extract(**request, max_rows=first_broken)
    await asyncio.wait([early.task], timeout=30)
    late = await extractor.extract(**request, max_rows=first_broken + 1, allow_non_finite=True)
    await asyncio.wait([late.task], timeout=30)

    assert lenient.value.n_non_finite == n_broken > 0
    assert strict.value.failure.reason == "NON_FINITE"
    assert lenient.columns[-1] in strict.value.failure.message
    # One segment holds them all; of that, what is not asked for does not count.
    assert early.value.state == ExtractionState.DONE
    assert (early.value.n_rows, early.value.n_rows_computed, early.value.n_non_finite) == (first_broken, 0, 0)
    assert late.value.n_non_finite == is_broken[first_broken].sum()

    await extractor.stop()
    await extractor.start()
    assert extractor.extractions.get(lenient.value.id).value.n_non_finite == n_broken


async def test_a_new_hookpoint_is_a_new_column_of_the_same_set(extractor, start_extractor):
    extractor.add_corpus(documents(400, seed=31))
    first = await extractor.extract(hookpoints=("blocks.1.hook_resid_post",))
    one, _, _ = await extractor.read(first)
    both = await extractor.extract(hookpoints=("blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"))
    content, firsts, end = await extractor.read(both)
    other = await start_extractor()
    other.add_corpus(documents(400, seed=31))
    at_once, _, _ = await other.read(
        await other.extract(hookpoints=("blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"))
    )

    assert both.folder == first.folder
    assert firsts == sorted(set(firsts))
    assert end.n_rows == n_rows_of(31)
    assert content == at_once
    assert {name: content[name] for name in one} == one
    again = await extractor.extract(hookpoints=("blocks.0.hook_mlp_out",))
    assert (await extractor.read(again))[2].n_rows == n_rows_of(31)
    assert again.value.cached


async def test_columns_of_different_length_are_brought_level(extractor):
    extractor.add_corpus(documents(400, seed=32))
    await extractor.read(await extractor.extract(hookpoints=("blocks.1.hook_resid_post",), max_rows=5000))
    await extractor.read(await extractor.extract(hookpoints=("blocks.2.hook_resid_pre",), max_rows=700))

    job = await extractor.extract(hookpoints=("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"))
    content, firsts, end = await extractor.read(job)

    assert end.n_rows == n_rows_of(32)
    assert firsts == sorted(set(firsts))
    # What enters block 2 is what left block 1.
    assert content["blocks.1.hook_resid_post"] == content["blocks.2.hook_resid_pre"]


async def test_cancelling_while_a_column_is_added_leaves_a_set_that_goes_on(extractor):
    extractor.add_corpus(documents(3000, seed=33))
    await extractor.read(await extractor.extract(hookpoints=("blocks.1.hook_resid_post",)))
    job = await extractor.extract(hookpoints=("blocks.2.hook_resid_pre",))
    await extractor.until(lambda: job.value.n_rows > 0)
    await job.cancel()
    await extractor.until(lambda: job.value.state.ended)

    again = await extractor.extract(hookpoints=("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"))
    content, _, _ = await extractor.read(again)

    assert content["blocks.1.hook_resid_post"] == content["blocks.2.hook_resid_pre"]
