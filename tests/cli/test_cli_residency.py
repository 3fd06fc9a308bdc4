"""Pins, residencies and devices on the command line."""

import datetime as dt
import getpass
import io
import json

import pytest
from typer.testing import CliRunner

from headrace.registry.v1 import model_pb2
from headrace.registry.v1 import residency_pb2 as residency_pb
from headrace_cli.app import app
from headrace_cli.commands.models.residencies import COLUMNS, row
from headrace_cli.output import formats
from headrace_cli.output.live import LiveResidencies
from headrace_cli.settings import Defaults


def residency(state="RESIDENT", **fields):
    facts = {"id": "res-1", "model_id": "tiny", "node_id": "n1", "device_id": "cpu", "reason": "asked for"}
    return residency_pb.Residency(
        state=residency_pb.ResidencyState.Value(f"RESIDENCY_STATE_{state}"), **{**facts, **fields}
    )


@pytest.fixture
def headrace(registry_host, client):
    client.models.register(hub="a/b", id="tiny")

    def run(*arguments):
        return CliRunner().invoke(app, [str(one) for one in arguments], obj=Defaults(registry=registry_host.address))

    return run


def answer(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_pins_are_set_listed_and_removed(headrace):
    before = dt.datetime.now(dt.UTC)
    pin = answer(headrace("models", "pin", "tiny", "--owner", "anna", "--reason", "demo", "--for", "2h", "--json"))
    table = headrace("models", "pins").stdout
    listed = answer(headrace("models", "pins", "tiny", "--json"))
    removed = answer(headrace("models", "unpin", "tiny", "--owner", "anna", "--json"))

    assert (pin["model_id"], pin["owner"], pin["reason"]) == ("tiny", "anna", "demo")
    length = dt.datetime.fromisoformat(pin["expire_time"]) - before
    assert dt.timedelta(hours=2) <= length < dt.timedelta(hours=2, minutes=1)
    assert "anna" in table
    assert "any" in table
    assert [one["owner"] for one in listed] == ["anna"]
    assert removed == {"unpinned": "tiny", "owner": "anna", "node_id": ""}
    assert "no pins" in headrace("models", "pins").stderr


def test_a_pin_is_the_callers_unless_told_and_for_ever_unless_told(headrace):
    pin = answer(headrace("models", "pin", "tiny", "--node", "n1", "--json"))
    shown = headrace("models", "pin", "tiny").stdout

    assert (pin["owner"], pin["node_id"], pin["expire_time"]) == (getpass.getuser(), "n1", None)
    assert "for ever" in shown


@pytest.mark.parametrize("text", ["soon", "-1h", "0s", "2 weeks", "99999999999d"])
def test_a_bad_duration_is_a_usage_error(headrace, text):
    result = headrace("models", "pin", "tiny", "--for", text)

    assert result.exit_code == 2
    assert "--for" in result.stderr


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("1.5h", 5400), ("7D", 604800)])
def test_durations_are_read(text, seconds):
    assert formats.parse_duration(text) == seconds


def test_pinning_an_unknown_model_exits_as_not_found(headrace):
    assert headrace("models", "pin", "unknown", "--owner", "anna").exit_code == 3


def test_load_waits_until_resident_and_shows_the_way(headrace, scripted_registry):
    scripted_registry.residencies = [residency("RESIDENT", measured_bytes=1 << 30)]
    loaded = headrace("models", "load", "tiny", "--json")
    at_once = answer(headrace("models", "load", "tiny", "--no-wait", "--json"))

    assert answer(loaded)["state"] == "RESIDENT"
    assert "tiny loading" in loaded.stderr
    assert at_once["state"] == "LOADING"


def test_load_goes_on_with_the_residency_that_took_the_place_of_the_one_it_waited_for(headrace, scripted_registry):
    scripted_registry.residencies = [residency("UNLOADED"), residency("RESIDENT", id="res-2")]

    assert answer(headrace("models", "load", "tiny", "--json"))["id"] == "res-2"


def test_a_load_that_somebody_ended_says_so(headrace, scripted_registry):
    scripted_registry.residencies = [residency("UNLOADED", reason="sent off by anna")]
    result = headrace("models", "load", "tiny")

    assert result.exit_code == 1
    assert "sent off by anna" in result.stderr


def test_a_load_that_fails_exits_with_its_reason(headrace, scripted_registry):
    failed = residency("FAILED")
    failed.failure.reason, failed.failure.message = "DEVICE_OOM", "no room"
    scripted_registry.residencies = [failed]
    result = headrace("models", "load", "tiny")

    assert result.exit_code == 5
    assert "DEVICE_OOM: no room" in result.stderr


def test_a_load_that_takes_too_long_exits_as_out_of_time(headrace, scripted_registry):
    scripted_registry.residencies = [residency("QUEUED", queue_position=3)]
    result = headrace("models", "load", "tiny", "--wait-s", "0.5")

    assert result.exit_code == 4
    assert "number 3 in the queue" in result.stderr


def test_unload_is_refused_while_pinned_unless_forced(headrace, scripted_registry):
    scripted_registry.residencies = [residency("UNLOADING")]
    headrace("models", "pin", "tiny", "--owner", "anna")
    refused = headrace("models", "unload", "tiny")
    forced = answer(headrace("models", "unload", "tiny", "--force", "--json"))

    assert refused.exit_code == 5
    assert "MODEL_IN_USE" in refused.stderr
    assert [one["state"] for one in forced] == ["UNLOADING"]


def test_rm_passes_force_on(headrace, scripted_registry):
    headrace("models", "rm", "tiny", "--force")

    assert scripted_registry.calls["DeleteModel"][0].force


def test_residencies_are_listed_with_holders_queue_and_reason(headrace, scripted_registry):
    scripted_registry.residencies = [
        residency("QUEUED", queue_position=2, reason="waits for memory"),
        residency(holders=["anna", ""], n_leases=3, pinned=True, measured_bytes=3 << 20),
    ]
    table = headrace("residencies", "list").stdout
    found = answer(headrace("residencies", "list", "--json"))

    assert "anna, someone, 1 more, pinned" in table
    assert "3.0 MiB" in table
    assert "waits for memory" in table
    assert [one["queue_position"] for one in found] == [2, 0]
    assert found[1]["holders"] == ["anna", ""]


def test_watch_prints_an_event_a_line(headrace, scripted_registry):
    scripted_registry.residency_events = [residency("LOADING"), residency(actor="node n1", reason="reported resident")]
    lines = headrace("residencies", "watch").stdout.splitlines()
    events = [json.loads(line) for line in headrace("residencies", "watch", "--json").stdout.splitlines()]
    rest = headrace("residencies", "watch", "--json", "--after-seq", "1").stdout.splitlines()

    assert lines[1].endswith("tiny on n1/cpu  resident · reported resident (node n1)")
    assert [(one["seq"], one["snapshot"], one["residency"]["state"]) for one in events] == [
        (1, True, "LOADING"),
        (2, False, "RESIDENT"),
    ]
    assert [json.loads(line)["seq"] for line in rest] == [2]


def test_the_live_table_shows_what_is_listed_and_survives_an_absent_registry(client, scripted_registry, registry_host):
    from rich.console import Console  # noqa: PLC0415

    scripted_registry.residencies = [residency(holders=["anna"], n_leases=1)]
    live = LiveResidencies(client, model="", columns=COLUMNS, row=row, line=str)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(live._drawn())
    registry_host.stop()
    console.print(live._drawn())
    shown = console.export_text()

    assert shown.count("anna") == 2
    assert shown.count("not current:") == 1


def test_devices_tell_who_holds_what(headrace, scripted_registry):
    node = scripted_registry.nodes[0]
    node.memory_bytes, node.max_loads, node.max_residents = 64 << 30, 2, 3
    device = node.devices[0]
    device.kind = residency_pb.DEVICE_KIND_CUDA
    device.name, device.capability, device.flash_attention = "NVIDIA H200", "9.0", True
    device.total_bytes, device.lost_bytes = 140 << 30, 2 << 30
    scripted_registry.residencies = [
        residency(node_id=node.id, device_id=device.id, holders=["anna"], n_leases=1, pinned=True)
    ]
    shown = headrace("devices").stdout
    found = answer(headrace("devices", "--json"))

    for part in (
        "NVIDIA H200",
        "9.0",
        "yes",
        "140.0 GiB",
        "2.0 GiB",
        "64.0 GiB",
        "tiny (anna, pinned)",
        "2 loads, 3 models",
    ):
        assert part in shown
    assert found["nodes"][0]["devices"][0]["lost_bytes"] == 2 << 30
    assert found["nodes"][0]["memory_bytes"] == 64 << 30


def test_columns_that_say_nothing_are_left_out(headrace):
    shown = headrace("devices").stdout

    assert "a CPU" in shown
    for heading in ("capability", "flash attention", "lost"):
        assert heading not in shown


def test_evict_says_what_was_freed(headrace, scripted_registry):
    scripted_registry.residencies = [residency(state="UNLOADING", measured_bytes=3 << 30)]

    freed = headrace("models", "evict", "--free", "20GB")
    asked = scripted_registry.calls["EvictModels"][0]
    scripted_registry.residencies = []
    nothing = headrace("models", "evict", "--free", "1GiB", "--node", "n1", "--device", "cuda:0")
    found = answer(headrace("models", "evict", "--free", "1k", "--json"))
    wrong = headrace("models", "evict", "--free", "much")

    assert "1 model evicted, 3.0 GiB freed; 18.6 GiB free on n1/cuda:0" in freed.stderr
    assert "unloading" in freed.stdout
    assert (asked.free_bytes, asked.node_id) == (20_000_000_000, "")
    assert nothing.stderr == "nothing evicted; 1.0 GiB free on n1/cuda:0\n"
    assert found == {"residencies": [], "node_id": "n1", "device_id": "cuda:0", "free_bytes": 1025}
    assert wrong.exit_code == 2


def test_lists_tell_how_long_a_load_took_and_how_long_ago_it_was(headrace, scripted_registry):
    one = residency(load_s=12.34)
    one.resident_time.FromDatetime(dt.datetime.now(dt.UTC) - dt.timedelta(hours=3))
    scripted_registry.residencies = [one]

    table = headrace("residencies", "list").stdout
    found = answer(headrace("residencies", "list", "--json"))

    assert "3 h ago" in table
    assert "12.3 s" in table
    assert found[0]["load_s"] == 12.34


def test_add_takes_a_form_that_fits_and_loads_it(headrace, scripted_registry):
    scripted_registry.residencies = [residency()]

    result = headrace("models", "add", "a/b", "--id", "big", "--fit", "24GB", "--load")
    wrong = headrace("models", "add", "a/b", "--load", "--no-prepare")

    assert result.exit_code == 0, result.stderr
    assert scripted_registry.calls["RegisterModel"][-1].fit_bytes == 24 * 10**9
    assert "big fits into 24GB without quantization" in result.stderr
    assert [call.model_id for call in scripted_registry.calls["LoadModel"]] == ["big"]
    assert "big resident" in result.stderr
    assert wrong.exit_code == 2


def test_an_attempt_is_shown_noted_and_adopted(headrace, scripted_registry):
    one = model_pb2.ValidationAttempt(
        id="c0ffee" + "0" * 26, model_id="tiny", node_id="n1", device_id="cpu", done=True, passed=True,
        kind=model_pb2.ATTEMPT_KIND_LOAD, log_tail="loading\nloaded\n", versions={"torch": "2.13.0"},
        steps=[model_pb2.ValidationStep(name="load", state=model_pb2.VALIDATION_STEP_STATE_PASSED, seconds=1.5)],
    )  # fmt: skip
    one.load_options.update({"attn_implementation": "eager"})
    scripted_registry.attempts = [one]

    shown = headrace("models", "attempt", "tiny", "c0ffee").stdout
    noted = headrace("models", "note", "tiny", "c0", "runs on the old card")
    adopted = headrace("models", "adopt", "tiny", "c0ffee")
    unknown = headrace("models", "adopt", "tiny", "beef")

    assert "ok 1.5 s" in shown
    assert shown.endswith("\nloading\nloaded\n")
    assert noted.stderr == "noted on c0ffee00\n"
    assert "runs on the old card" in headrace("models", "attempts", "tiny").stdout
    assert adopted.stderr == 'tiny is loaded with these options from now on: {"attn_implementation": "eager"}\n'
    assert scripted_registry.calls["AdoptAttempt"][0].attempt_id == one.id
    assert unknown.exit_code == 3
