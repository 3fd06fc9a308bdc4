"""`headrace sets`, and the calls of the client behind it."""

from __future__ import annotations

import datetime as dt
import json

import pytest
from typer.testing import CliRunner

from fix_scripted_extractor import EXTRACTION_ID
from headrace.registry.v1 import residency_pb2 as residency_pb
from headrace_cli.app import app
from headrace_cli.settings import Defaults
from headrace_client import HeadraceClient, errors


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


def test_a_lost_holder_of_a_set_hides_no_other(headrace, scripted_registry, tmp_path):
    scripted_registry.add_node("n0", "127.0.0.1:1", state=residency_pb.NODE_STATE_LOST)
    scripted_registry.set_nodes = ["n0", "n1"]

    verified = answer(headrace("--json", "sets", "verify", "set-1"))
    pulled = answer(headrace("--json", "pull", "set-1", "--out", tmp_path / "rows.safetensors"))

    assert [one["node_id"] for one in verified] == ["n1"]
    assert pulled["extraction_id"] == EXTRACTION_ID


def test_a_set_whose_holders_are_all_lost_can_not_be_verified(client, scripted_registry):
    scripted_registry.set_nodes = ["n0"]

    with pytest.raises(errors.NodeLost, match="alive: n0"):
        list(client.sets.verify("set-1"))


def test_an_extractor_at_a_given_address_verifies_a_set_once(registry_host, scripted_registry, extractor_host):
    scripted_registry.set_nodes = ["n0", "n1"]

    with HeadraceClient.connect(registry_host.address, extractor=extractor_host.address) as client:
        (verified,) = client.sets.verify("set-1")

    assert (verified.node_id, verified.done) == ("", True)
