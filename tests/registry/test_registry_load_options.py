"""Load options: known options of the right type pass, others are refused with a remedy; code needs an allowance."""

from __future__ import annotations

import json
import math

import psycopg
import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from fix_postgres import refused, running_registry
from fix_registry import GIB, FakeNode, cpu, ready_model, register_folder, write_model
from headrace.registry.v1 import model_pb2, residency_service_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace_registry.errors import FieldInvalid, NotAllowed
from headrace_registry.models.allowances import Allowances
from headrace_registry.models.models import Source, SourceKind
from headrace_registry.rpc.convert.models import load_options_from_pb

ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048.0, "attention_factor": 0.5}

GOOD = [
    ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ({"device_map": "auto"}, {"device_map": "auto"}),
    ({"device_map": "cuda:0"}, {"device_map": "cuda:0"}),
    ({"device_map": {"": 0.0, "model.layers.1": "cpu"}}, {"device_map": {"": 0, "model.layers.1": "cpu"}}),
    ({"max_memory": {"0": "10GiB", "cpu": 2.0**34}}, {"max_memory": {"0": "10GiB", "cpu": 2**34}}),
    ({"attn_implementation": "sdpa"}, {"attn_implementation": "sdpa"}),
    ({"rope_scaling": ROPE}, {"rope_scaling": {**ROPE, "factor": 4, "original_max_position_embeddings": 2048}}),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5]}}, None),
    ({"rope_scaling": None}, {"rope_scaling": None}),
    ({"low_cpu_mem_usage": True, "use_fast": False}, {"low_cpu_mem_usage": True, "use_fast": False}),
    ({"sliding_window": 4096.0}, {"sliding_window": 4096}),
    ({"sliding_window": None}, {"sliding_window": None}),
    ({"trust_remote_code": True}, {"trust_remote_code": True}),
    ({}, {}),
]

BAD = [
    ({"dtpye": "float32"}, "known: dtype"),
    ({"dtype": "float64"}, "bfloat16"),
    ({"dtype": 16}, "one of"),
    ({"device_map": "disk"}, "cuda:0"),
    ({"device_map": {}}, "object"),
    ({"device_map": {"a b": "cpu"}}, "module names"),
    ({"device_map": {"model": True}}, "devices"),
    ({"device_map": {"model": "disk"}}, "devices"),
    ({"max_memory": {"cuda": "1GB"}}, "GPU's number"),
    ({"max_memory": {"0": -1}}, "10GiB"),
    ({"max_memory": {"0": "lots"}}, "10GiB"),
    ({"max_memory": "10GiB"}, "object"),
    ({"attn_implementation": "flash"}, "sdpa"),
    ({"rope_scaling": {"factor": 2}}, "rope_type"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "positive numbers"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "positive numbers"),
    ({"rope_scaling": {"rope_type": "linear", "power": 2}}, "positive numbers"),
    ({"rope_scaling": "yarn"}, "rope_type"),
    ({"low_cpu_mem_usage": "yes"}, "true or false"),
    ({"use_fast": 1}, "true or false"),
    ({"sliding_window": 0}, "tokens"),
    ({"sliding_window": 1.5}, "tokens"),
    ({"sliding_window": True}, "tokens"),
    ({"trust_remote_code": "true"}, "true or false"),
    ({"sliding_window": math.nan}, "not finite"),
    ({"rope_scaling": {"rope_type": "linear", "factor": math.inf}}, "not finite"),
]


def checked_load_options(options):
    """Sends the options as a message, in which every number is a double, as a client does."""
    message = struct_pb2.Struct()
    message.update(options)
    return load_options_from_pb(message)


@pytest.mark.parametrize(("options", "checked"), GOOD, ids=lambda value: json.dumps(value)[:60])
def test_known_options_of_their_types_pass(options, checked):
    found = checked_load_options(options)

    assert found == (options if checked is None else checked)
    assert checked_load_options(found) == found


@pytest.mark.parametrize(("options", "match"), BAD, ids=lambda value: json.dumps(value)[:60])
def test_all_else_is_refused_with_a_remedy(options, match):
    with pytest.raises(FieldInvalid, match=match) as caught:
        checked_load_options(options)

    assert caught.value.field == "load_options"


NAMES = (
    "dtype",
    "device_map",
    "max_memory",
    "attn_implementation",
    "rope_scaling",
    "low_cpu_mem_usage",
    "use_fast",
    "sliding_window",
    "trust_remote_code",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=12), JSON, max_size=3))
def test_whatever_json_comes_passes_or_is_refused_by_name(options):
    try:
        checked = checked_load_options(options)
    except FieldInvalid:
        return  # Any other error fails the test.

    assert set(checked) == set(options) <= set(NAMES)
    json.dumps(checked, allow_nan=False)


def test_code_is_trusted_for_the_repos_named_and_no_others():
    allowances = Allowances(code_repos=frozenset({"owner/tiny"}))
    trusting = {"trust_remote_code": True}
    allowances.check(Source(kind=SourceKind.HUB, location="owner/tiny"), trusting)
    allowances.check(Source(kind=SourceKind.HUB, location="owner/other"), {"trust_remote_code": False})
    for source in (
        Source(kind=SourceKind.HUB, location="owner/Tiny"),
        Source(kind=SourceKind.HUB, location="owner/tiny2"),
        Source(kind=SourceKind.FOLDER, location="owner/tiny"),
    ):
        with pytest.raises(NotAllowed, match="--trust-remote-code"):
            allowances.check(source, trusting)


async def test_code_that_is_not_allowed_any_more_is_not_loaded(database_url, tmp_path):
    trusting = "UPDATE models SET load_options = '{\"trust_remote_code\": true}' WHERE id = 'tiny'"
    async with running_registry(database_url, tmp_path / "data", roots=(tmp_path,)) as registry:
        await ready_model(registry.stubs, write_model(tmp_path / "tiny"), "tiny")
        with psycopg.connect(database_url, autocommit=True) as conn:
            conn.execute(trusting)  # As if it had been registered while --trust-remote-code named its repo.
        node = FakeNode(registry.stubs, "alpha", [cpu(GIB)])
        await node.start()
        request = residency_service_pb2.LoadModelRequest(model_id="tiny")
        load = await refused(registry.stubs.residencies.LoadModel(request, timeout=20))
        validate = registry.stubs.models.ValidateModel(pb.ValidateModelRequest(model_id="tiny"), timeout=20)
        trial = await refused(validate)
        await node.stop()

    assert (load.reason, trial.reason) == ("NOT_ALLOWED", "NOT_ALLOWED")
    assert "--trust-remote-code" in load.message


async def test_foreign_code_is_refused_at_registration_and_at_a_change(database_url, tmp_path):
    allowances = Allowances(code_repos=frozenset({"owner/trusted"}))
    async with running_registry(database_url, tmp_path / "data", roots=(tmp_path,), allowances=allowances) as registry:
        stubs = registry.stubs.models

        def register(repo_id: str) -> object:
            source = model_pb2.ModelSource(hub=model_pb2.HubSource(repo_id=repo_id))
            model = model_pb2.Model(source=source)
            model.load_options.update({"trust_remote_code": True, "sliding_window": 64})
            return stubs.RegisterModel(pb.RegisterModelRequest(model=model), timeout=20)

        other = await refused(register("owner/other"))
        trusted = (await register("owner/trusted")).model
        await register_folder(registry.stubs, write_model(tmp_path / "tiny"), "tiny")
        change = pb.UpdateModelRequest(model=model_pb2.Model(id="tiny"))
        change.model.load_options.update({"trust_remote_code": True})
        change.update_mask.paths.append("load_options")
        changed = await refused(stubs.UpdateModel(change, timeout=20))

    assert (other.reason, other.fields) == ("NOT_ALLOWED", ("load_options",))
    assert "--trust-remote-code owner/other" in other.message
    assert dict(trusted.load_options) == {"trust_remote_code": True, "sliding_window": 64}
    assert changed.reason == "NOT_ALLOWED"
