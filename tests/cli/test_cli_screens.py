"""Screens of 80 columns: ids and names stay whole, and columns without room are named."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer
from rich.cells import cell_len
from typer.testing import CliRunner

from fix_scripted_extractor import EXTRACTION_ID
from fix_terminal import into_closed_pipe
from headrace.extractor.v1 import corpus_service_pb2 as corpora_pb
from headrace.registry.v1 import model_pb2, residency_pb2
from headrace.registry.v1 import model_service_pb2 as models_pb
from headrace_cli.app import app
from headrace_cli.output.tables import Column, layout
from headrace_cli.settings import Defaults

GB = 10**9
MODEL = "deepseek-coder-1.3b-instruct-int4"
REPO = "deepseek-ai/deepseek-coder-1.3b-instruct"
NODE = "gpu-node-17.cluster.example.org"
CORPUS = "the-pile-uncopyrighted-sample"

LISTS = {
    ("models", "list"): (MODEL,),
    ("models", "catalog"): (MODEL, "a-model-of-forty-letters-in-the-catalog"),
    ("models", "pins"): (MODEL,),
    ("models", "options"): ("sliding_window",),
    ("models", "attempts", MODEL): ("c0ffee00", "passed"),
    ("models", "hookpoints", MODEL): ("blocks.1.hook_resid_post",),
    ("residencies", "list"): (MODEL,),
    ("corpora", "list"): (CORPUS,),
    ("sets", "list"): ("set-1",),
    ("extractions", "list"): (EXTRACTION_ID,),
    ("fit", MODEL): ("bfloat16", f"{NODE}/cuda:0"),
    ("devices",): (NODE, "cuda:0"),
}


@pytest.fixture
def crowded(scripted_registry, scripted_extractor, client):
    """Servers whose things all have long names."""
    client.models.register(hub=REPO, id=MODEL, quantization="int4", labels={"team": "x"})
    scripted_registry.models[MODEL].n_parameters = 1_346_471_936
    scripted_registry.models[MODEL].weight_bytes = 2 * GB
    node = scripted_registry.nodes[0]
    node.id, node.memory_bytes, node.memory_free_bytes, node.max_loads = NODE, 64 << 30, 32 << 30, 2
    device = node.devices[0]
    device.id, device.kind, device.name = "cuda:0", residency_pb2.DEVICE_KIND_CUDA, "NVIDIA H200"
    device.capability, device.flash_attention, device.total_bytes, device.lost_bytes = "9.0", True, 140 << 30, 2 << 30
    scripted_registry.residencies = [
        residency_pb2.Residency(
            id="r",
            model_id=MODEL,
            node_id=NODE,
            device_id="cuda:0",
            state=residency_pb2.RESIDENCY_STATE_RESIDENT,
            reserved_bytes=3 * GB,
            reason="loaded for a lease of extraction ex-1 of the trainer",
            holders=["anna@workstation-3.example.org", "the trainer"],
            n_leases=2,
            pinned=True,
        )
    ]
    client.pins.pin(MODEL, "anna@workstation-3.example.org", reason="for the demonstration of next Thursday")
    placement = models_pb.Placement(
        node_id=NODE, device_id="cuda:0", fit=models_pb.FIT_AFTER_EVICTION, evicted_model_ids=[MODEL], max_batch_size=9
    )
    scripted_registry.advice = models_pb.EstimateMemoryResponse(
        estimates=[
            models_pb.MemoryEstimate(
                quantization=model_pb2.QUANTIZATION_NONE,
                dtype="bfloat16",
                weight_bytes=GB,
                overhead_bytes=GB,
                total_bytes=2 * GB,
                measured=True,
                placements=[placement],
            )
        ],
        recommended=0,
    )
    scripted_registry.catalog = [
        models_pb.CatalogEntry(
            name=name,
            repo_id=REPO,
            n_parameters=1_346_471_936,
            n_layers=24,
            d_model=2048,
            context_window=16384,
            probe_layers=[6, 12, 18],
            gated=True,
            memory=[
                models_pb.CatalogMemory(quantization=quantization, dtype="bfloat16", total_bytes=3 * GB)
                for quantization in (model_pb2.QUANTIZATION_NONE, model_pb2.QUANTIZATION_INT8)
            ],
            batches=[models_pb.CatalogBatch(memory_bytes=8 * GB, batch_size=4)],
        )
        for name in (MODEL, "a-model-of-forty-letters-in-the-catalog")
    ]
    scripted_registry.attempts = [
        model_pb2.ValidationAttempt(
            id="c0ffee" + "0" * 26,
            kind=model_pb2.ATTEMPT_KIND_LOAD,
            model_id=MODEL,
            node_id=NODE,
            device_id="cuda:0",
            done=True,
            passed=True,
            versions={"torch": "2.13.0+cu130", "transformers": "5.23.0"},
        )
    ]
    scripted_extractor.corpora[CORPUS] = corpora_pb.Corpus(
        id=CORPUS, digest="d" * 64, n_documents=5_000_000, size_bytes=3 * GB, origin=f"hub {REPO} at {'0' * 40}"
    )
    spec = scripted_extractor.extraction.spec
    spec.model_id, spec.corpus_id = MODEL, CORPUS
    scripted_extractor.extraction.n_rows = 123_456_789


@pytest.mark.parametrize("command", LISTS, ids=" ".join)
def test_a_table_fits_80_columns_and_breaks_no_name(terminal, crowded, command):
    screen = terminal(*command)

    assert screen.code == 0, screen.text
    assert screen.width <= 80, screen.text
    for name in LISTS[command]:
        assert name in screen.text.replace("\n", " ").split() or f"{name} " in screen.text, screen.text


def test_columns_without_room_are_named_and_wide_shows_them(terminal, crowded):
    narrow = terminal("models", "catalog")
    wide = terminal("models", "catalog", "--wide")

    assert "probe layers" not in narrow.lines[0]
    assert "--wide shows" in narrow.lines[-1]
    assert "probe layers" in narrow.lines[-1]
    assert wide.lines[0].split("  ")[0] == "name"
    assert "probe layers" in wide.lines[0]
    assert wide.lines[1].split()[-2:] == [REPO, "gated"]
    assert len(wide.lines) == 3


def test_a_pipe_gets_all_columns(registry_host, crowded):
    done = CliRunner().invoke(app, ["models", "catalog"], obj=Defaults(registry=registry_host.address))

    header, *rows = done.stdout.splitlines()
    assert "probe layers" in header
    assert all(REPO in row for row in rows)
    assert done.stderr == ""


def test_an_id_that_is_wider_than_the_terminal_stays_whole():
    shown = layout([Column("id"), Column("state"), Column("source", 1)], [["x" * 90, "READY", "hub"]], 80)

    assert shown.widths == {0: 90, 1: 5}
    assert shown.left_out == ("source",)


def test_prose_takes_the_room_that_is_left_and_is_wrapped_between_words(terminal, crowded, scripted_registry):
    scripted_registry.residencies[0].holders[:] = []
    screen = terminal("residencies", "list", columns=140)

    assert screen.width <= 140
    assert "extraction" in screen.text.split()
    assert "workstation" not in screen.text


def test_facts_of_one_thing_are_wrapped_between_words(terminal, crowded, scripted_registry):
    failure = scripted_registry.models[MODEL].failure
    failure.reason, failure.message = "HUB_GATED", "accept the terms of this repo on the hub, then give a token " * 3
    screen = terminal("models", "show", MODEL)

    assert screen.width <= 80
    assert REPO in screen.text.split()
    assert screen.text.split().count("accept") == 3


@pytest.mark.parametrize("arguments", [["models", "show", MODEL], ["models", "list"], ["devices"], ["--version"]])
def test_a_reader_that_is_gone_ends_the_command_in_silence(registry_host, crowded, arguments):
    done = into_closed_pipe(["--registry", registry_host.address, *arguments])

    assert done.stderr == ""
    assert done.returncode in (-signal.SIGPIPE, 1)
    assert arguments == ["--version"] or done.returncode == -signal.SIGPIPE


def test_version_is_the_package_s():
    done = CliRunner().invoke(app, ["--version"], obj=Defaults())

    assert (done.exit_code, done.stdout) == (0, f"headrace {version('headrace')}\n")


def test_a_shell_completes_commands_and_options():
    def completed(words):
        environment = os.environ | {"_HEADRACE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "2"}
        command = [sys.executable, "-m", "headrace_cli"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=45, check=True).stdout

    # The command looks for the shell that started it; the second command keeps bash from becoming the first.
    shell = ["bash", "-c", f"{sys.executable} -m headrace_cli --show-completion; echo status $?"]
    script = subprocess.run(shell, capture_output=True, text=True, timeout=45, check=True).stdout

    assert "_COMPLETE=complete_bash" in script
    assert script.endswith("status 0\n")
    assert completed("headrace models ca").split() == ["catalog"]
    assert completed("headrace fit --b").split() == ["--batch"]


def commands_below(command, path=()):
    """Yields the words of a command and of all commands below it."""
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands_below(inner, (*path, name))


def test_help_of_every_command_fits_80_columns():
    screens = {
        path: CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"})
        for path in commands_below(typer.main.get_command(app))
        if path[:1] != ("serve",)  # Becomes the program that it starts.
    }

    assert len(screens) > 50
    assert {path for path, screen in screens.items() if screen.exit_code} == set()
    wide = {path: max(map(cell_len, screen.stdout.splitlines())) for path, screen in screens.items()}
    assert {path: width for path, width in wide.items() if width > 80} == {}


def test_an_error_names_the_request_of_the_server_s_log(registry_host, scripted_registry):
    scripted_registry.trailing = (("x-request-id", "4f2a"),)

    def run(*arguments):
        return CliRunner().invoke(
            app, [*arguments, "models", "show", "nope"], obj=Defaults(registry=registry_host.address)
        )

    assert "request: 4f2a" in run().stderr
    assert json.loads(run("--json").stderr)["error"]["request_id"] == "4f2a"


def test_debug_prints_each_call_with_its_request(registry_host, scripted_registry):
    scripted_registry.trailing = (("x-request-id", "77aa"),)
    command = [sys.executable, "-m", "headrace_cli", "--debug", "--registry", registry_host.address, "models", "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=45, check=True)

    [line] = [line for line in done.stderr.splitlines() if "ModelService.ListModels" in line]
    assert line.startswith(f"headrace_client: ModelService.ListModels at {registry_host.address}: ")
    assert line.endswith("request 77aa")
