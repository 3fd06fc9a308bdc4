"""The catalog: its numbers against published ones, its filters, its pages."""

from __future__ import annotations

import grpc
import pytest

from fix_postgres import refused
from headrace.registry.v1 import model_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.sizing.catalog import CATALOG, CATEGORIES, MEMORY_SIZES
from headrace_registry.sizing.estimate import FORMS, estimate
from headrace_registry.sizing.workload import Workload

# As the models' authors or the hub's own headers give them.
PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576, "pythia-70m": 70_426_624, "pythia-160m": 162_322_944, "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320, "opt-125m": 125_239_296,
    "opt-350m": 331_196_416, "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800, "opt-6.7b": 6_658_473_984, "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384, "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984, "gemma-2-27b": 27_227_128_320, "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472, "gemma-3-12b": 12_187_325_040, "gemma-3-27b": 27_432_406_640,
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "mistral-7b": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264, "phi-1.5": 1_418_270_720, "phi-2": 2_779_683_840,
    "phi-3-mini-4k-instruct": 3_821_079_552, "phi-3-medium-4k-instruct": 13_960_238_080, "phi-4": 14_659_507_200,
    "phi-4-mini-instruct": 3_836_021_760, "starcoder2-3b": 3_030_371_328, "starcoder2-7b": 7_173_923_840,
    "starcoder2-15b": 15_957_889_024, "deepseek-coder-1.3b": 1_346_471_936, "deepseek-coder-6.7b": 6_740_512_768,
    "deepseek-coder-33b": 33_342_991_360, "codellama-7b": 6_738_546_688, "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
}  # fmt: skip
BY_NAME = {entry.name: entry for entry in CATALOG.entries}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_counted_from_the_networks_numbers_are_the_published_ones(name):
    assert BY_NAME[name].n_parameters == PUBLISHED[name]


@pytest.mark.parametrize("entry", CATALOG.entries, ids=lambda entry: entry.name)
def test_probe_layers_are_early_middle_and_late(entry):
    early, middle, late = entry.probe_layers

    assert 0 < early < middle < late < entry.network.n_layers


@pytest.mark.parametrize("entry", CATALOG.entries, ids=lambda entry: entry.name)
def test_a_recommended_batch_fits_and_one_more_sequence_does_not(entry):
    for batch in entry.batches:
        form = next(f for f in FORMS if f.quantization is batch.quantization and f.dtype == "bfloat16")

        def total(batch_size, form=form):
            work = Workload(batch_size=batch_size, context_size=1024, n_hookpoints=1)
            return estimate(entry.profile, form, kind=DeviceKind.CUDA, workload=work).total_bytes

        assert total(batch.batch_size) <= batch.memory_bytes
        assert batch.batch_size == 1024 or total(batch.batch_size + 1) > batch.memory_bytes


def test_every_category_is_filled_and_every_family_is_there():
    families = ("gpt2", "pythia", "opt", "smollm2", "gemma-2b", "gemma-2-", "gemma-3-", "llama-2", "llama-3", "mistral")
    families += ("qwen2.5", "qwen3", "phi-2", "phi-3", "phi-4", "starcoder2", "deepseek-coder", "codellama")

    assert {category for entry in CATALOG.entries for category in entry.categories} == set(CATEGORIES)
    assert all(any(name.startswith(family) for name in BY_NAME) for family in families)


def test_the_known_sizes_of_llama_3_1_8b():
    totals = {(m.form.quantization, m.form.dtype): m.total_bytes for m in BY_NAME["llama-3.1-8b"].memory}

    # 6.98e9 linear weights, 0.53e9 of embeddings, no head; 0.6 GB of an empty runner.
    assert totals["NONE", "bfloat16"] == pytest.approx(7.505e9 * 2 + 0.6e9, rel=0.001)
    assert totals["INT8", "bfloat16"] == pytest.approx(6.98e9 + 0.525e9 * 2 + 0.6e9, rel=0.005)
    assert totals["INT4", "bfloat16"] == pytest.approx(6.98e9 * (0.5 + 1 / 64) + 0.525e9 * 2 + 0.6e9, rel=0.005)


async def test_fits_lists_what_fits_in_its_smallest_form_and_nothing_else(registry):
    answer = await registry.stubs.models.ListCatalog(
        pb.ListCatalogRequest(fits_bytes=MEMORY_SIZES[3], page_size=1000), timeout=20
    )

    shown = {entry.name for entry in answer.entries}
    assert {"gpt2", "gemma-2-27b", "qwen2.5-32b"} <= shown
    assert not {"llama-3.1-70b", "llama-2-70b"} & shown
    assert all(min(memory.total_bytes for memory in entry.memory) <= 24 * 10**9 for entry in answer.entries)


async def test_categories_filter(registry):
    answer = await registry.stubs.models.ListCatalog(
        pb.ListCatalogRequest(category="coding", page_size=1000), timeout=20
    )

    assert {"starcoder2-3b", "codellama-7b"} <= {entry.name for entry in answer.entries}
    assert all("coding" in entry.categories for entry in answer.entries)


async def test_pages_show_every_entry_once(registry):
    seen, token = [], ""
    while True:
        answer = await registry.stubs.models.ListCatalog(
            pb.ListCatalogRequest(page_size=17, page_token=token), timeout=20
        )
        seen += [entry.name for entry in answer.entries]
        token = answer.next_page_token
        if not token:
            break

    assert seen == [entry.name for entry in CATALOG.entries]


async def test_an_entry_carries_what_people_choose_by(registry):
    answer = await registry.stubs.models.ListCatalog(pb.ListCatalogRequest(page_size=1000), timeout=20)
    gemma = next(entry for entry in answer.entries if entry.name == "gemma-2-2b")

    assert (gemma.repo_id, gemma.gated, gemma.model_type) == ("google/gemma-2-2b", True, "gemma2")
    assert (gemma.n_layers, gemma.d_model, gemma.context_window) == (26, 2304, 8192)
    assert list(gemma.probe_layers) == [6, 13, 19]
    assert len(gemma.memory) == 5
    assert gemma.batches[0].quantization == model_pb2.QUANTIZATION_NONE


@pytest.mark.parametrize(
    "request_", [pb.ListCatalogRequest(category="poetry"), pb.ListCatalogRequest(fits_bytes=-1)], ids=str
)
async def test_bad_filters_are_refused(registry, request_):
    refusal = await refused(registry.stubs.models.ListCatalog(request_, timeout=20))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")


async def test_a_token_of_another_filter_is_refused(registry):
    first = await registry.stubs.models.ListCatalog(pb.ListCatalogRequest(page_size=1), timeout=20)
    request = pb.ListCatalogRequest(page_token=first.next_page_token, category="coding")

    assert (await refused(registry.stubs.models.ListCatalog(request, timeout=20))).reason == "FIELD_INVALID"
