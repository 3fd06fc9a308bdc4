"""`headrace sets`, and the calls of the client behind it."""

from __future__ import annotations

import datetime as dt
import json

import pytest
from typer.testing import CliRunner

from headrace_cli.app import app
from headrace_cli.settings import Defaults
from headrace_client import errors


@pytest.fixture
def headrace(registry_host):
    def run(*arguments):
        return CliRunner().invoke(app, [str(one) for one in arguments], obj=Defaults(registry=registry_host.address))

    return run


def answer(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_pin_is_set_changed_shown_and_ended(headrace, scripted_registry):
    headrace("sets", "pin", "set", "--owner", "ann", "--reason", "for the paper", "--for", "8h")
    listed = headrace("sets", "list").stdout
    shown = headrace("sets", "show", "set-1").stdout
    found = answer(headrace("--json", "sets", "show", "set-1"))[0]
    ended = answer(headrace("--json", "sets", "unpin", "set-1", "--owner", "ann"))

    sent = scripted_registry.calls["PinActivationSet"][0]
    assert (sent.set_id, sent.owner, sent.reason) == ("set-1", "ann", "for the paper")
    assert sent.request_id
    left_s = sent.expire_time.ToDatetime(dt.UTC) - dt.datetime.now(dt.UTC)
    assert dt.timedelta(hours=7.9) < left_s <= dt.timedelta(hours=8)
    assert "pin of ann, x1" in listed
    assert "(for the paper)" in shown
    assert [pin["owner"] for pin in found["pins"]] == ["ann"]
    assert found["holders"] == ["x1"]
    assert ended == {"unpinned": "set-1", "owner": "ann"}
    assert scripted_registry.set_pins == []


def test_a_pin_without_an_end_is_for_ever(headrace, scripted_registry):
    headrace("sets", "pin", "set-1", "--owner", "ann")

    assert not scripted_registry.calls["PinActivationSet"][0].HasField("expire_time")


def test_delete_is_refused_while_pinned(headrace, scripted_registry):
    headrace("sets", "pin", "set-1", "--owner", "ann")
    refused = headrace("sets", "delete", "set-1")
    headrace("sets", "unpin", "set-1", "--owner", "ann")
    gone = answer(headrace("--json", "sets", "delete", "set"))

    assert refused.exit_code == 5
    assert "unpin it first" in refused.stderr
    assert gone == {"deleted": "set-1"}
    assert scripted_registry.calls["DeleteActivationSet"][-1].set_id == "set-1"


def test_a_duration_that_is_none_is_refused_before_any_call(headrace, scripted_registry):
    refused = headrace("sets", "pin", "set-1", "--for", "soon")

    assert refused.exit_code == 2
    assert "PinActivationSet" not in scripted_registry.calls


def test_sets_in_the_client(client, scripted_registry):
    client.sets.pin("set-1", "ann", expire_time=dt.datetime(2999, 1, 1, tzinfo=dt.UTC))
    (held,) = client.sets.get("set-1")
    with pytest.raises(errors.StateConflict):
        client.sets.delete("set-1")
    client.sets.unpin("set-1", "ann")
    client.sets.delete("set-1")

    assert held.pins[0].expire_time == dt.datetime(2999, 1, 1, tzinfo=dt.UTC)
    assert not held.deleting


def test_a_set_is_shown_with_its_recipe(headrace):
    lines = headrace("sets", "show", "set-1").stdout.splitlines()
    found = answer(headrace("--json", "sets", "show", "set-1"))[0]

    shown = {line[:12].strip(): line[13:].strip() for line in lines}
    assert shown["recipe"] == "context_size=256 packing=packed"
    assert shown["numbers"] == "compute_dtype=float32"
    assert found["identity"]["recipe"]["drop_first_positions"] == 0
