"""The command line against scripted servers: JSON, text and exit codes."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fix_scripted import unavailable
from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT, PROVENANCE, SECOND, Fault
from headrace.extractor.v1 import extraction_pb2 as ex_pb
from headrace.registry.v1 import residency_pb2 as residency_pb
from headrace_cli.app import app, hoisted
from headrace_cli.commands.models.registered import source_of
from headrace_cli.output import formats
from headrace_cli.output.progress import Bar, show_model
from headrace_cli.processes.servers import server_command
from headrace_cli.settings import Defaults
from headrace_client.values import ModelState, Transfer


@pytest.fixture
def headrace(registry_host):
    """Runs the command line against the scripted registry."""

    def run(*arguments, token=None):
        defaults = Defaults(registry=registry_host.address, token=token)
        return CliRunner().invoke(app, [str(one) for one in arguments], obj=defaults)

    return run


@pytest.fixture
def registered(client):
    return client.models.register(hub="a/b", id="tiny")


def answer(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_help_names_the_exit_codes(headrace):
    result = headrace("--help")

    assert result.exit_code == 0
    assert "130 interrupted" in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", [["models"], ["corpora"], ["sets"], ["serve"]])
def test_groups_without_a_command_tell_their_usage(headrace, command):
    assert headrace(*command).exit_code == 2


def test_models_add_prepares_with_progress_on_stderr(headrace, scripted_registry):
    result = headrace("--json", "models", "add", "a/b", "--id", "tiny", "--dtype", "bfloat16", "--label", "team=x")

    model = answer(result)
    assert (model["id"], model["state"], model["labels"]) == ("tiny", "READY", {"team": "x"})
    assert model["load_options"] == {"dtype": "bfloat16"}
    assert "tiny downloading" in result.stderr
    assert len(scripted_registry.calls["PrepareModel"]) == 1


def test_a_download_shows_bytes_rate_and_time_left(capsys, registered):
    transfer = Transfer(
        done_bytes=1024**2, total_bytes=4 * 1024**2, percent=25.0, rate_bytes_per_s=2 * 1024**2, eta_s=90.0
    )
    with Bar("tiny", terminal=False) as bar:
        show_model(bar, replace(registered, state=ModelState.DOWNLOADING, transfer=transfer))

    assert capsys.readouterr().err == "tiny downloading 25 % · 1.0 MiB of 4.0 MiB · 2.0 MiB/s · 1:30 left\n"


def test_models_add_can_leave_the_files_for_later(headrace, scripted_registry):
    assert answer(headrace("--json", "models", "add", "a/b", "--id", "tiny", "--no-prepare"))["state"] == "REGISTERED"
    assert not scripted_registry.calls["PrepareModel"]


def test_a_failed_preparation_says_why_and_what_to_do(headrace, scripted_registry):
    scripted_registry.script = ["DOWNLOADING", "FAILED"]

    result = headrace("models", "add", "a/b", "--id", "tiny")

    assert result.exit_code == 5
    assert "HUB_GATED: accept the terms" in result.stderr
    assert "what to do:" in result.stderr
    assert "Traceback" not in result.stderr


def test_models_list_show_and_rm(headrace, registered):
    listed = answer(headrace("models", "list", "--json"))
    shown = answer(headrace("--json", "models", "show", "tiny"))
    table = headrace("models", "list")
    removed = answer(headrace("--json", "models", "rm", "tiny"))

    assert [one["id"] for one in listed] == ["tiny"]
    assert shown["source"] == {"kind": "hub", "location": "a/b", "revision": ""}
    assert "tiny" in table.stdout
    assert removed == {"deleted": "tiny"}
    assert "no models" in headrace("models", "list").stderr


def test_models_watch_prints_an_event_a_line(headrace, registered):
    result = headrace("--json", "models", "watch", "tiny")

    states = [json.loads(line)["state"] for line in result.stdout.splitlines()]
    assert states == ["DOWNLOADING", "DOWNLOADING", "READY"]


def test_hookpoints_are_listed(headrace):
    assert [one["name"] for one in answer(headrace("--json", "models", "hookpoints", "tiny"))] == [SECOND, HOOKPOINT]


def test_corpora_add_list_and_rm(headrace, scripted_extractor, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n')

    added = answer(headrace("--json", "corpora", "add", "docs", path))
    headrace("corpora", "add", "there", "/data/b.csv", "--on-node", "--text-column", "body")
    listed = answer(headrace("--json", "corpora", "list"))
    answer(headrace("--json", "corpora", "rm", "docs"))

    assert (added["id"], added["n_documents"]) == ("docs", 1)
    assert [one["id"] for one in listed] == ["docs", "there"]
    assert scripted_extractor.calls["RegisterCorpus"][0].spec.text_column == "body"
    assert list(scripted_extractor.corpora) == ["there"]


def test_corpora_of_the_hub_and_of_other_corpora(headrace, scripted_extractor, tmp_path):
    (tmp_path / "token").write_text("hf_x\n")
    options = ["--split", "train", "--chat", "--text-column", "messages", "--hub-token-file", tmp_path / "token"]
    answer(headrace("--json", "corpora", "add-hub", "h", "owner/name", *options))
    answer(headrace("--json", "corpora", "add-mix", "m", "a=3", "b", "--seed", 7))
    wrong = [headrace("corpora", "add-mix", "m", *parts) for parts in (["a=x", "b"], ["a", "a=2"])]

    hub, mix = scripted_extractor.calls["RegisterCorpus"]
    assert (hub.hub.hub_token, hub.spec.chat, hub.spec.text_column) == ("hf_x", True, "messages")
    assert [(part.corpus_id, part.weight) for part in mix.mix.parts] == [("a", 3), ("b", 1)]
    assert mix.mix.seed == 7
    assert all(result.exit_code != 0 for result in wrong)


def test_extract_waits_and_prints_the_extraction(headrace, scripted_extractor):
    options = ["-h", HOOKPOINT, "-h", SECOND, "--context-size", 64, "--window", "2MiB", "--dtype", "bfloat16"]

    result = headrace("--json", "extract", "tiny", "docs", *options)

    assert answer(result)["state"] == "DONE"
    assert "rows/s" in result.stderr
    spec = scripted_extractor.calls["StartExtraction"][0].spec
    assert list(spec.hookpoints) == [HOOKPOINT, SECOND]
    assert (spec.recipe.context_size, spec.retention.window_bytes) == (64, 2 << 20)


def test_extract_takes_windows_and_long_documents(headrace, scripted_extractor):
    options = ["-h", HOOKPOINT, "--no-wait", "--long-documents", "truncate", "--token-window", "-1:"]
    answer(headrace("--json", "extract", "tiny", "docs", *options))
    wrong = headrace("extract", "tiny", "docs", "-h", HOOKPOINT, "--token-window", "5")

    recipe = scripted_extractor.calls["StartExtraction"][0].spec.recipe
    assert recipe.long_documents == ex_pb.LONG_DOCUMENTS_TRUNCATE
    assert (recipe.window.start, recipe.window.end) == (-1, 0)
    assert wrong.exit_code != 0
    assert "START:END" in wrong.stderr


def test_extract_without_waiting_or_only_estimating(headrace, scripted_extractor):
    started = answer(headrace("--json", "extract", "tiny", "docs", "-h", HOOKPOINT, "--no-wait"))
    estimated = answer(headrace("--json", "extract", "tiny", "docs", "-h", HOOKPOINT, "--estimate"))

    assert started["id"] == EXTRACTION_ID
    assert estimated["n_rows"] == 10
    assert len(scripted_extractor.calls["StartExtraction"]) == 1
    assert not scripted_extractor.calls["WatchExtraction"]


def test_progress_says_who_is_waited_for(headrace, scripted_extractor):
    scripted_extractor.extraction.waiting_for.add(reader="trainer-7", next_row=12345)
    scripted_extractor.end_state = ex_pb.EXTRACTION_STATE_WAITING

    result = headrace("watch", EXTRACTION_ID)

    assert "waits for trainer-7 at row 12,345" in result.stderr


def test_watch_prints_an_event_a_line_and_cancel_stops(headrace, scripted_extractor):
    lines = headrace("--json", "watch", EXTRACTION_ID).stdout.splitlines()
    scripted_extractor.extraction.state = ex_pb.EXTRACTION_STATE_RUNNING
    cancelled = answer(headrace("--json", "cancel", EXTRACTION_ID))

    assert [json.loads(line)["n_rows"] for line in lines] == [0, 200, 400, 600, 800, 1000]
    assert cancelled["state"] == "CANCELLED"


def test_sets_devices_and_nodes(headrace, scripted_registry):
    state = residency_pb.RESIDENCY_STATE_RESIDENT
    scripted_registry.residencies = [residency_pb.Residency(id="r", model_id="tiny", node_id="n1", state=state)]

    assert answer(headrace("--json", "sets", "list"))[0]["id"] == "set-1"
    assert answer(headrace("--json", "sets", "show", "set"))[0]["n_rows"] == 7
    found = answer(headrace("--json", "devices"))
    assert found["nodes"][0]["devices"][0]["id"] == "cpu"
    assert found["residencies"][0]["state"] == "RESIDENT"
    assert "8.0 GiB" in headrace("devices").stdout


def test_pull_writes_one_safetensors_file(headrace, scripted_extractor, tmp_path):
    out = tmp_path / "rows.safetensors"

    result = answer(headrace("--json", "pull", EXTRACTION_ID, "--out", out))
    again = headrace("--json", "pull", EXTRACTION_ID, "--out", out)

    tensors = load_file(out)
    for name in (*PROVENANCE, HOOKPOINT):
        np.testing.assert_array_equal(tensors[name], scripted_extractor.column(name))
    assert result["n_rows"] == 1000
    assert "already there" in again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.safetensors"]


def test_pull_writes_a_folder_with_a_file_a_column(headrace, scripted_extractor, tmp_path):
    out = tmp_path / "rows"

    answer(
        headrace(
            "--json", "pull", EXTRACTION_ID, "--out", out, "--columns", f"token_id,{HOOKPOINT}", "--rows", "10:500"
        )
    )

    got = load_file(out / f"{HOOKPOINT}.safetensors")[HOOKPOINT]
    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT)[10:500])
    tokens = load_file(out / "token_id.safetensors")["token_id"]
    np.testing.assert_array_equal(tokens, scripted_extractor.column("token_id")[10:500])


@pytest.mark.parametrize("name", ["rows", "rows.safetensors"])
def test_pull_goes_on_where_it_broke_off(headrace, scripted_extractor, tmp_path, name):
    refused = {"code": unavailable()["code"].INTERNAL, "reason": "INTERNAL", "message": "bug"}
    scripted_extractor.faults.append(Fault("cut", after=3, status=refused))
    out = tmp_path / name
    broken = headrace("pull", EXTRACTION_ID, "--out", out, "--columns", HOOKPOINT)
    part = out if name == "rows" else out.with_name(out.name + ".part")
    with (part / f"{HOOKPOINT}.safetensors.part").open("ab") as file:
        file.write(b"torn")

    result = headrace("--json", "pull", EXTRACTION_ID, "--out", out, "--columns", HOOKPOINT)

    assert broken.exit_code == 1
    assert "goes on at row 192" in result.stderr
    assert [call.start_row for call in scripted_extractor.calls["StreamActivations"]] == [0, 192]
    file = out / f"{HOOKPOINT}.safetensors" if name == "rows" else out
    np.testing.assert_array_equal(load_file(file)[HOOKPOINT], scripted_extractor.column(HOOKPOINT))
    assert answer(result)["n_rows"] == 1000


def test_pull_does_not_touch_other_files(headrace, tmp_path):
    out = tmp_path / "rows.safetensors"
    out.write_text("my thesis")

    result = headrace("pull", EXTRACTION_ID, "--out", out)

    assert result.exit_code == 1
    assert "FILE_EXISTS" in result.stderr
    assert out.read_text() == "my thesis"


def test_bfloat16_is_pulled_as_bfloat16(headrace, scripted_extractor, tmp_path):
    from safetensors import safe_open  # noqa: PLC0415

    scripted_extractor.dtype = "bfloat16"
    out = tmp_path / "rows.safetensors"
    answer(headrace("--json", "pull", EXTRACTION_ID, "--out", out, "--columns", HOOKPOINT))

    with safe_open(out, framework="pt") as file:
        assert file.get_slice(HOOKPOINT).get_dtype() == "BF16"
        assert file.metadata()["set_id"] == "set-1"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["models", "show", "nope"], 3),
        (["watch", "nope"], 3),
        (["sets", "show", "nope"], 3),
        (["models", "frobnicate"], 2),
        (["models", "add", "a/b", "--quantization", "int3"], 2),
        (["models", "add", "not a repo"], 2),
        (["models", "add", "a/b", "--label", "x"], 2),
        (["extract", "tiny", "docs", "-h", "x", "--window", "many"], 2),
        (["extract", "tiny", "docs", "-h", "x", "--packing", "tight"], 2),
        (["pull", EXTRACTION_ID, "--out", "x", "--rows", "5:3"], 2),
        (["corpora", "add", "docs", "/nowhere/a.txt"], 2),
        (["--token-file", "/nowhere/token", "models", "list"], 2),
        (["--registry", "nonsense", "models", "list"], 2),
        (["--registry", "127.0.0.1:1", "models", "list"], 4),
    ],
)
def test_exit_codes_tell_what_kind_of_failure(headrace, arguments, code):
    result = headrace(*arguments)

    assert result.exit_code == code, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert result.stderr
    assert "Traceback" not in result.stderr


def test_a_refusal_has_its_exit_code_and_json_on_stderr(headrace, scripted_registry):
    code = unavailable()["code"].UNAUTHENTICATED
    scripted_registry.fail["ListModels"].append({"code": code, "reason": "TOKEN_INVALID", "message": "wrong token"})

    result = headrace("--json", "models", "list")

    error = json.loads(result.stderr)["error"]
    assert (result.exit_code, error["exit_code"], error["reason"]) == (5, 5, "TOKEN_INVALID")
    assert "--token-file" in error["remedy"]
    assert result.stdout == ""


def test_a_field_that_the_message_names_is_not_told_again(headrace, scripted_registry):
    code, message = unavailable()["code"].INVALID_ARGUMENT, "labels: 'a' is no label; known: b, c"
    fail = {"code": code, "reason": "FIELD_INVALID", "message": message}
    for told in (message, "labels: 'a' … b, c", "another word"):
        scripted_registry.fail["ListModels"].append(fail | {"fields": {"labels": told}})

    lines = [headrace("models", "list").stderr.splitlines() for _ in range(3)]

    again = [[line for line in some if line.startswith("  labels: ")] for some in lines]
    assert again == [[], [], ["  labels: another word"]]


def test_the_token_comes_from_the_file_or_the_environment(headrace, scripted_registry, tmp_path):
    file = tmp_path / "token"
    file.write_text("from-file\n")

    headrace("models", "list", token="from-env")
    headrace("--token-file", file, "models", "list", token="from-env")

    seen = [one["authorization"] for one in scripted_registry.metadata["ListModels"]]
    assert seen == ["Bearer from-env", "Bearer from-file"]


def test_doctor_finds_all_well(headrace, registered, scripted_registry, tmp_path):
    scripted_registry.models["tiny"].store_bytes = 3 * 1024**2
    scripted_registry.models["tiny"].files_path = "/store/tiny"
    findings = {one["subject"]: one for one in answer(headrace("--json", "doctor", "--data-dir", tmp_path))}

    assert {"registry", "database", "extractor", "clock", "disk", "versions"} <= findings.keys()
    assert "127.0.0.1" in findings["extractor"]["text"]
    assert findings["database"]["text"] == "answers; 1 model, 3.0 MiB in the model store"


def test_doctor_names_what_is_bad_and_what_to_do(headrace, scripted_registry, extractor_host, tmp_path):
    extractor_host.stop()
    scripted_registry.nodes[0].heartbeat_time.FromSeconds(2_000_000_000_0)
    scripted_registry.fail["ListModels"].extend([unavailable("DATABASE_UNAVAILABLE")] * 5)

    result = headrace("--json", "doctor", "--data-dir", tmp_path)

    bad = {one["subject"]: one["remedy"] for one in json.loads(result.stdout) if not one["ok"]}
    assert result.exit_code == 1
    assert bad.keys() == {"database", "extractor", "clock"}
    assert all(bad.values())


def test_doctor_fails_for_a_lost_node_unless_it_was_lost_long_ago(headrace, scripted_registry, tmp_path):
    lost = residency_pb.NODE_STATE_LOST
    scripted_registry.add_node("broken", "127.0.0.1:1", state=lost)
    scripted_registry.add_node("retired", "127.0.0.1:2", state=lost).heartbeat_time.FromSeconds(1_000_000_000)

    result = headrace("--json", "doctor", "--data-dir", tmp_path)

    bad = {one["text"].split()[0]: one["remedy"] for one in json.loads(result.stdout) if not one["ok"]}
    assert result.exit_code == 1
    assert list(bad) == ["broken"]
    assert "headrace serve extractor" in bad["broken"]


def test_doctor_looks_at_the_disk_that_holds_the_data(headrace, registered, scripted_registry, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "store" / "tiny").mkdir(parents=True)
    scripted_registry.models["tiny"].store_bytes = 3 * 1024**2
    scripted_registry.models["tiny"].files_path = str(tmp_path / "store" / "tiny")

    findings = {one["subject"]: one for one in answer(headrace("--json", "doctor"))}

    assert findings["disk"]["text"].endswith(f"free at {tmp_path / 'store' / 'tiny'}")


def test_doctor_goes_on_where_a_folder_is_not_for_this_user(
    headrace, registered, scripted_registry, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model, stat = scripted_registry.models["tiny"], Path.stat
    model.store_bytes, model.files_path = 3 * 1024**2, str(tmp_path / "theirs" / "tiny")
    # As root, a folder without rights is no obstacle.
    monkeypatch.setattr(Path, "stat", lambda path, **how: refuse(path) if path.name == "tiny" else stat(path, **how))

    found = headrace("--json", "doctor")
    named = headrace("--json", "doctor", "--data-dir", tmp_path / "theirs" / "tiny")

    assert [one["ok"] for one in answer(found) if one["subject"] == "disk"] == [True]
    (disk,) = [one for one in json.loads(named.stdout) if one["subject"] == "disk"]
    assert disk["text"] == f"{tmp_path / 'theirs' / 'tiny'} can't be looked at: Permission denied"


def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))


def test_doctor_has_findings_where_sets_can_not_be_listed(headrace, scripted_registry, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    scripted_registry.fail["ListActivationSets"].extend([unavailable("DATABASE_UNAVAILABLE")] * 5)

    found = answer(headrace("--json", "doctor"))

    assert {"disk", "versions"} <= {one["subject"] for one in found}


def test_doctor_names_a_replica_that_is_away(headrace, registry_host, tmp_path):
    replicas = f"{registry_host.address},127.0.0.1:9"

    result = headrace("--json", "--registry", replicas, "doctor", "--data-dir", tmp_path)

    bad = {one["subject"]: one["text"] for one in json.loads(result.stdout) if not one["ok"]}
    assert result.exit_code == 1
    assert list(bad) == ["replica"]
    assert "127.0.0.1:9" in bad["replica"]


def test_doctor_without_a_registry(headrace, tmp_path):
    result = headrace("--registry", "127.0.0.1:1", "doctor", "--data-dir", tmp_path)

    assert result.exit_code == 1
    assert "BAD  registry" in result.stdout
    assert "what to do:" in result.stdout


def test_global_options_are_taken_behind_the_command():
    assert hoisted(["models", "list", "--json", "--registry", "h:1"]) == [
        "--json",
        "--registry",
        "h:1",
        "models",
        "list",
    ]
    assert hoisted(["extract", "m", "--registry=h:1", "--", "--json"]) == [
        "--registry=h:1",
        "extract",
        "m",
        "--",
        "--json",
    ]
    servers = ["serve", "extractor", "--registry", "h:1", "--token-file", "f"]
    assert hoisted(servers) == servers
    assert hoisted(["--registry", "a:1", *servers]) == ["--registry", "a:1", *servers]


def test_serve_passes_its_options_on():
    assert server_command("registry", ["--listen", "x"])[1:] == ["-m", "headrace_registry", "--listen", "x"]


def test_sources_are_told_apart(tmp_path):
    (tmp_path / "m").mkdir()

    assert source_of("owner/name") == {"hub": "owner/name"}
    assert source_of("gpt2") == {"hub": "gpt2"}
    assert source_of("/models/a.gguf") == {"gguf": "/models/a.gguf"}
    assert source_of(str(tmp_path / "m")) == {"folder": str(tmp_path / "m")}
    assert source_of("/not/here") == {"folder": "/not/here"}


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("10", 10), ("256MiB", 256 << 20), ("1.5g", 3 << 29), ("200MB", 200_000_000), ("4 k", 4096)]
)
def test_sizes_are_read(text, n_bytes):
    assert formats.parse_size(text) == n_bytes


def test_the_environment_is_read_by_main_only(registry_host):
    command = [sys.executable, "-m", "headrace_cli", "--json", "models", "list"]
    environment = {"HEADRACE_REGISTRY": registry_host.address, "PATH": "/usr/bin:/bin"}

    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True, env=environment)

    assert json.loads(done.stdout) == []


def test_ctrl_c_ends_a_process_whose_cleanup_hangs():
    program = """
import time
from headrace_cli import exits
exits.INTERRUPT_GRACE_S = 0.1
exits.end_when_interrupted()
while True:
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        pass
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(registry_host, scripted_extractor):
    scripted_extractor.faults.append(Fault("hang", after=2))
    command = [sys.executable, "-m", "headrace_cli", "--registry", registry_host.address, "watch", EXTRACTION_ID]

    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=30)[1]

    assert "running" in first
    assert process.returncode == 130
    assert f"headrace watch {EXTRACTION_ID}" in rest
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("number", "text"),
    [(912, "912"), (999_999, "1M"), (124_439_808, "124M"), (1_557_611_200, "1.56B"), (70_553_706_496, "70.6B")],
)
def test_counts_in_three_digits(number, text):
    assert formats.short_count(number) == text
