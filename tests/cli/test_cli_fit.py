"""`headrace fit`, `headrace models catalog` and short names, against a scripted registry."""

import json

import pytest
from typer.testing import CliRunner

from headrace.registry.v1 import model_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace_cli.app import app
from headrace_cli.settings import Defaults
from headrace_client.values import Fit, Quantization

GB = 10**9


@pytest.fixture
def headrace(registry_host):
    def run(*arguments):
        return CliRunner().invoke(app, [str(one) for one in arguments], obj=Defaults(registry=registry_host.address))

    return run


@pytest.fixture
def registered(client):
    return client.models.register(hub="a/b", id="tiny")


@pytest.fixture
def advice(scripted_registry):
    placements = [
        pb.Placement(node_id="n", device_id="cuda:0", fit=pb.FIT_AFTER_EVICTION, required_bytes=2 * GB,
                     evicted_model_ids=["old"], max_batch_size=9),
        pb.Placement(node_id="n", device_id="cpu", fit=pb.FIT_NEVER, required_bytes=2 * GB),
    ]  # fmt: skip
    full = pb.MemoryEstimate(
        quantization=model_pb2.QUANTIZATION_NONE, dtype="float32", weight_bytes=GB, overhead_bytes=GB,
        total_bytes=2 * GB, measured=True, placements=placements,
    )  # fmt: skip
    small = pb.MemoryEstimate(quantization=model_pb2.QUANTIZATION_INT4, dtype="bfloat16", total_bytes=GB)
    scripted_registry.advice = pb.EstimateMemoryResponse(estimates=[full, small], recommended=0)


@pytest.fixture
def catalog(scripted_registry):
    def entry(name, repo_id, total_bytes, *, gated=False):
        return pb.CatalogEntry(
            name=name, repo_id=repo_id, n_parameters=124_439_808, n_layers=12, d_model=768, context_window=1024,
            probe_layers=[3, 6, 9], categories=["tiny"], gated=gated,
            memory=[pb.CatalogMemory(quantization=model_pb2.QUANTIZATION_INT4, dtype="bfloat16",
                                     total_bytes=total_bytes)],
            batches=[
                pb.CatalogBatch(memory_bytes=8 * GB, batch_size=4, quantization=model_pb2.QUANTIZATION_INT4),
                pb.CatalogBatch(memory_bytes=24 * GB, batch_size=64, quantization=model_pb2.QUANTIZATION_NONE),
            ],
        )  # fmt: skip

    scripted_registry.catalog = [
        entry("gpt2", "openai-community/gpt2", GB),
        entry("gpt2-xl", "openai-community/gpt2-xl", 3 * GB),
        entry("gemma-2-2b", "google/gemma-2-2b", 2 * GB, gated=True),
    ]


def test_fit_shows_every_form_and_the_recommended_one(headrace, registered, advice):
    result = headrace("fit", "tiny")

    assert result.exit_code == 0, result.stderr
    header, full, small = result.stdout.splitlines()
    assert header.split() == "form weights overhead total fits on evicts batch up to advice".split()
    assert full.split() == (
        "float32 953.7 MiB 953.7 MiB 1.9 GiB measured n/cuda:0 (after eviction) old 9 recommended".split()
    )
    assert small.split() == "int4 0 B 0 B 953.7 MiB nowhere".split()


def test_fit_sends_the_workload_and_prints_json(headrace, registered, advice, scripted_registry):
    result = headrace("fit", "tiny", "--batch", 8, "--context", 512, "--hookpoints", 3, "--json")

    printed = json.loads(result.stdout)
    assert printed["recommended"]["placements"][0]["fit"] == "AFTER_EVICTION"
    request = scripted_registry.calls["EstimateMemory"][0]
    assert (request.batch_size, request.context_size, request.n_hookpoints) == (8, 512, 3)


def test_fit_without_any_room_says_so(headrace, registered):
    result = headrace("fit", "tiny")

    assert result.exit_code == 0
    assert "no form has room" in result.stderr


def test_fit_of_an_unknown_model_is_not_found(headrace):
    assert headrace("fit", "nobody").exit_code == 3


def test_the_client_reads_advice(client, registered, advice):
    found = client.models.estimate("tiny", batch_size=2)

    assert found.recommended is found.estimates[0]
    assert found.estimates[0].placements[0].fit is Fit.AFTER_EVICTION
    assert found.estimates[1].quantization is Quantization.INT4


def test_the_client_takes_fits_of_later_servers_for_unknown(client, registered, scripted_registry):
    placement = pb.Placement(node_id="n", device_id="cpu")
    placement.MergeFromString(b"\x18\x63")  # Field 3, 99.
    scripted_registry.advice = pb.EstimateMemoryResponse(
        estimates=[pb.MemoryEstimate(placements=[placement])], recommended=7
    )
    found = client.models.estimate("tiny")

    assert found.recommended is None
    assert found.estimates[0].placements[0].fit is Fit.UNKNOWN


@pytest.mark.parametrize(("text", "n_bytes"), [("24GB", 24 * GB), ("24GiB", 24 * 1024**3), ("8g", 8 * 1024**3)])
def test_catalog_sends_sizes_and_category(headrace, catalog, scripted_registry, text, n_bytes):
    result = headrace("models", "catalog", "--fits", text, "--category", "tiny")

    assert result.exit_code == 0, result.stderr
    request = scripted_registry.calls["ListCatalog"][0]
    assert (request.fits_bytes, request.category) == (n_bytes, "tiny")


def test_catalog_shows_all_pages_and_the_batch_for_the_memory_asked_for(headrace, catalog):
    lines = headrace("models", "catalog", "--fits", "24GB").stdout.splitlines()

    assert [one.split()[0] for one in lines] == ["name", "gpt2", "gpt2-xl", "gemma-2-2b"]
    assert "64 in 24 GB " in lines[1]
    assert lines[1].split()[1] == "124M"
    assert lines[3].endswith("gated")


def test_catalog_prints_json(headrace, catalog):
    printed = json.loads(headrace("models", "catalog", "--json").stdout)

    assert [entry["name"] for entry in printed] == ["gpt2", "gpt2-xl", "gemma-2-2b"]
    assert printed[0]["batches"][0]["quantization"] == "int4"


def test_a_bad_size_is_a_usage_error(headrace):
    result = headrace("models", "catalog", "--fits", "much")

    assert result.exit_code == 2
    assert "is not a size" in result.stderr


@pytest.mark.parametrize(
    ("source", "repo_id"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("GPT2-XL", "openai-community/gpt2-xl"),
        ("gemma", "google/gemma-2-2b"),
        ("distilroberta-base", "distilroberta-base"),
        ("someone/gpt2", "someone/gpt2"),
    ],
)
def test_short_names_stand_for_repos(headrace, catalog, scripted_registry, source, repo_id):
    result = headrace("models", "add", source, "--no-prepare")

    assert result.exit_code == 0, result.stderr
    assert scripted_registry.calls["RegisterModel"][0].model.source.hub.repo_id == repo_id


def test_a_path_keeps_its_meaning(headrace, catalog, scripted_registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    headrace("models", "add", "gpt2", "--no-prepare")

    assert scripted_registry.calls["RegisterModel"][0].model.source.folder.path == str(tmp_path / "gpt2")
    assert not scripted_registry.calls["ListCatalog"]


def test_a_name_that_could_be_several_is_refused(headrace, catalog, scripted_registry):
    result = headrace("models", "add", "g", "--no-prepare")

    assert result.exit_code == 2
    assert "could be gpt2, gpt2-xl, gemma-2-2b" in " ".join(result.stderr.replace("│", " ").split())
    assert not scripted_registry.calls["RegisterModel"]
