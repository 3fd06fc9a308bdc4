"""The decisions about residency as pure functions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fix_scheduling import POLICY, S, node, occupant, queued, states
from headrace_registry.models.models import Failure
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.placement import (
    Action,
    Backoff,
    Space,
    decide_on_device,
    decide_placement,
    plan_with_candidate,
)
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.residency import Occupant, ResidencyState, follow_report
from headrace_registry.residency.scheduling import DeviceView, Outcome, choose_victims, plan
from headrace_registry.sizing.reservation import load_dtype
from headrace_registry.workers.upkeep import Listening


def space(*occupants: Occupant, needed: int = 40, node_id: str = "n", kind: DeviceKind = DeviceKind.CPU, **fields):
    backoff = fields.pop("backoff", None)
    view = replace(node(*occupants, **fields), id=node_id)
    return Space(node=view, device=replace(view.devices[0], kind=kind), required_bytes=needed, backoff=backoff)


def decide(*args: object, **fields: object) -> Action:
    return decide_on_device("m", space(*args, **fields), POLICY).action


# Placement -----------------------------------------------------------------------------------------------------------


def test_a_model_that_fits_is_loaded_at_once():
    assert decide(occupant("a", 60)) is Action.LOAD


def test_a_model_larger_than_the_device_never_fits():
    assert decide(needed=101) is Action.TOO_LARGE


@pytest.mark.parametrize("state", [S.LOADING, S.RESIDENT])
def test_a_residency_that_loads_or_is_loaded_is_joined(state):
    decision = decide_on_device("m", space(occupant("r", 10, state, model_id="m")), POLICY)

    assert (decision.action, decision.joined) == (Action.JOIN, "r")


def test_a_queued_residency_is_joined_and_tells_how_it_stands():
    going = occupant("going", 90, S.UNLOADING)
    decision = decide_on_device("m", space(going, queued("r", 20, 1, model_id="m")), POLICY)

    assert (decision.action, decision.joined) == (Action.WAIT, "r")


@pytest.mark.parametrize("state", [S.DRAINING, S.UNLOADING])
def test_one_on_its_way_out_is_not_joined_but_its_memory_is_awaited(state):
    decision = decide_on_device("m", space(occupant("r", 90, state, model_id="m", n_leases=1)), POLICY)

    assert (decision.action, decision.joined) == (Action.WAIT, "")


def test_leased_awaited_loading_and_young_ones_are_waited_for():
    held = (
        occupant("leased", 20, n_leases=1, holders=("x",)),
        occupant("awaited", 20, n_waiters=1),
        occupant("loading", 20, S.LOADING),
        occupant("young", 20, age_s=1.0),
        occupant("pinned", 20, pinned=True),
    )

    assert decide(*held) is Action.QUEUE


def test_only_pins_that_outlast_every_wait_refuse():
    assert decide(occupant("p", 70, pinned=True, pinned_for_good=True)) is Action.BUSY
    assert decide(occupant("p", 70, pinned=True)) is Action.QUEUE
    assert decide(occupant("p", 60, pinned=True, pinned_for_good=True)) is Action.LOAD


def test_a_full_queue_refuses_whoever_would_have_to_wait():
    waiting = [queued(str(n), 10, n) for n in range(POLICY.max_queued)]

    assert decide(occupant("leased", 100, n_leases=1), *waiting) is Action.FULL
    assert decide_placement(
        "m", [space(occupant("leased", 100, n_leases=1), *waiting), space(node_id="o")], POLICY
    ) == (decide_on_device("m", space(node_id="o"), POLICY))


def test_a_gpu_is_preferred_even_if_something_idle_must_leave_it():
    gpu = space(occupant("idle", 80), kind=DeviceKind.CUDA, node_id="gpu")
    decision = decide_placement("m", [space(capacity=1000), gpu], POLICY)

    assert (decision.action, decision.space.node.id) == (Action.EVICT, "gpu")


def test_the_cpu_is_taken_when_every_gpu_is_held():
    gpu = space(occupant("leased", 80, n_leases=1), kind=DeviceKind.CUDA, node_id="gpu")

    assert decide_placement("m", [space(), gpu], POLICY).space.device.kind is DeviceKind.CPU


def test_a_device_that_has_the_model_wins_over_an_empty_one():
    there = space(occupant("r", 10, model_id="m"), node_id="b")
    decision = decide_placement("m", [space(node_id="a", kind=DeviceKind.CUDA), there], POLICY)

    assert decision.joined == "r"


def test_a_resident_copy_wins_over_one_that_loads():
    loading = space(occupant("l", 10, S.LOADING, model_id="m"), node_id="a", kind=DeviceKind.CUDA)
    resident = space(occupant("r", 10, model_id="m"), node_id="b")

    assert decide_placement("m", [loading, resident], POLICY).joined == "r"


def test_a_queued_model_moves_only_to_where_it_fits_now():
    held = space(occupant("leased", 90, n_leases=1), queued("q", 40, 1, model_id="m"), node_id="a")
    idle = space(occupant("idle", 90), node_id="b")

    assert decide_placement("m", [held, idle], POLICY).joined == "q"
    assert decide_placement("m", [held, space(node_id="b")], POLICY).space.node.id == "b"


def test_a_place_left_alone_is_chosen_last_and_tells_why():
    failure = Failure(reason="DEVICE_OOM", message="no")
    left = space(node_id="a", backoff=Backoff(left_s=3.0, failure=failure))
    later = space(node_id="b", backoff=Backoff(left_s=5.0, failure=failure))
    held = space(occupant("leased", 90, n_leases=1), node_id="c")

    assert decide_placement("m", [left, held], POLICY).space.node.id == "c"
    assert decide_placement("m", [later, left], POLICY).space.backoff.left_s == 3.0


def test_a_refusal_names_the_device_that_could_hold_it():
    small = space(node_id="a", capacity=10)
    pinned = space(occupant("p", 80, pinned=True, pinned_for_good=True), node_id="b")

    assert decide_placement("m", [small, pinned], POLICY).action is Action.BUSY


def test_a_decision_brings_the_plan_by_which_the_new_residency_loads_or_others_leave_for_it():
    held = space(occupant("idle", 80))
    free = decide_on_device("m", space(), POLICY, residency_id="new", actor="anna")
    evicting = decide_placement("m", [held], POLICY, residency_id="new", actor="anna")

    assert [(step.residency_id, step.state) for step in free.plan.steps] == [("new", S.LOADING)]
    assert [(step.residency_id, step.state, step.actor) for step in evicting.plan.steps] == [
        ("idle", S.UNLOADING, "anna")
    ]
    assert evicting.plan.outcomes == {"new": Outcome.EVICT}


def test_joining_and_refusals_bring_no_plan():
    resident = space(occupant("r", 10, model_id="m"), occupant("leaving", 80, S.DRAINING))

    assert decide_on_device("m", resident, POLICY).plan is None
    assert decide_on_device("m", space(needed=101), POLICY).plan is None


# Plans ---------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_idle_residency_is_the_victim():
    found = plan(node(occupant("new", 50, idle_s=1), occupant("old", 50, idle_s=2), queued("q", 40, 1)), POLICY)

    assert [(step.residency_id, step.state) for step in found.steps] == [("old", S.UNLOADING)]
    assert found.steps[0].reason == "evicted for model-q"
    assert found.outcomes == {"q": Outcome.EVICT}


def test_memory_still_unloading_is_awaited_before_anything_is_evicted():
    assert states(node(occupant("going", 60, S.UNLOADING), occupant("idle", 40), queued("q", 40, 1))) == {}


def test_memory_that_an_unload_did_not_give_back_is_not_given_away():
    assert decide(lost=60) is Action.LOAD
    assert decide(lost=61) is Action.QUEUE


def test_nobody_overtakes_who_waits_longer():
    held = occupant("leased", 60, n_leases=1)

    assert states(node(held, queued("first", 50, 1), queued("second", 10, 2))) == {}
    assert states(node(held, queued("first", 30, 1), queued("second", 10, 2), queued("third", 10, 3))) == {
        "first": S.LOADING,
        "second": S.LOADING,
    }


def test_bytes_promised_to_the_first_are_not_promised_again():
    going = occupant("going", 100, S.UNLOADING)

    assert plan(node(going, queued("a", 80, 1), queued("b", 40, 2)), POLICY).outcomes == {
        "a": Outcome.WAIT,
        "b": Outcome.QUEUE,
    }


def test_one_that_pins_shut_out_for_ever_does_not_hold_up_the_others():
    pinned = occupant("p", 50, pinned=True, pinned_for_good=True)

    assert states(node(pinned, queued("large", 60, 1), queued("small", 40, 2))) == {"small": S.LOADING}


def test_a_queued_residency_that_nobody_waits_for_ends_without_loading():
    assert states(node(queued("q", 10, 1, n_waiters=0))) == {"q": S.UNLOADED}


def test_nothing_is_evicted_before_it_was_resident_for_the_minimum():
    almost = occupant("a", 80, age_s=POLICY.min_residency_s - 0.1)

    assert states(node(almost, queued("q", 40, 1))) == {}
    assert states(node(replace(almost, age_s=POLICY.min_residency_s), queued("q", 40, 1))) == {"a": S.UNLOADING}


def test_after_the_longest_wait_models_in_use_are_drained_for_the_first():
    used = occupant("used", 80, n_leases=1)

    assert states(node(used, queued("q", 40, 1, age_s=POLICY.max_wait_s - 0.1))) == {}
    assert states(node(used, queued("q", 40, 1, age_s=POLICY.max_wait_s))) == {"used": S.DRAINING}


def test_idle_victims_go_before_models_in_use_are_drained():
    view = node(occupant("idle", 50), occupant("used", 50, n_leases=1, idle_s=500), queued("q", 40, 1, age_s=99))

    assert states(view) == {"idle": S.UNLOADING}


def test_pinned_loading_and_young_models_are_not_drained():
    held = (
        occupant("pinned", 30, n_leases=1, pinned=True),
        occupant("young", 30, n_leases=1, age_s=1),
        occupant("loading", 40, S.LOADING),
    )

    assert states(node(*held, queued("q", 40, 1, age_s=99))) == {}


def test_a_drained_model_goes_with_its_last_lease():
    draining = occupant("d", 80, S.DRAINING, n_leases=1)

    assert states(node(draining, queued("q", 40, 1))) == {}
    assert states(node(replace(draining, n_leases=0), queued("q", 40, 1))) == {"d": S.UNLOADING}


def test_a_model_that_drains_for_nobody_stays():
    assert states(node(occupant("d", 80, S.DRAINING, n_leases=1))) == {"d": S.RESIDENT}
    assert states(node(occupant("d", 80, S.DRAINING, pinned=True), queued("q", 40, 1))) == {"d": S.RESIDENT}


def test_a_limit_of_loads_delays_and_evicts_nobody_meanwhile():
    view = node(occupant("l", 10, S.LOADING), occupant("idle", 80), queued("q", 40, 1), max_loads=1)

    assert (states(view), plan(view, POLICY).outcomes["q"]) == ({}, Outcome.WAIT)
    assert states(replace(view, max_loads=2)) == {"idle": S.UNLOADING}


def test_a_limit_of_models_evicts_although_there_is_room():
    view = node(occupant("a", 10, idle_s=1), occupant("b", 10, idle_s=2), queued("q", 10, 1), max_residents=2)

    assert states(view) == {"b": S.UNLOADING}
    assert states(replace(view, max_residents=3)) == {"q": S.LOADING}


def test_a_limit_of_models_counts_all_devices_of_the_node():
    gpu = DeviceView(id="cuda:0", kind=DeviceKind.CUDA, capacity_bytes=100)
    view = node(occupant("a", 10, n_leases=1), queued("q", 10, 1, device_id="cuda:0"), max_residents=1)

    assert states(replace(view, devices=(*view.devices, gpu))) == {}


def test_what_nobody_used_for_the_idle_timeout_goes():
    idle = occupant("i", 10, idle_s=POLICY.idle_timeout_s, age_s=POLICY.idle_timeout_s)

    assert states(node(idle)) == {"i": S.UNLOADING}
    assert states(node(replace(idle, idle_s=1.0))) == {}
    assert states(node(replace(idle, pinned=True))) == {}
    assert states(node(replace(idle, n_leases=1))) == {}
    assert states(node(idle), Policy(idle_timeout_s=0.0)) == {}


def test_a_needless_victim_is_spared():
    idle = [occupant("small", 10, idle_s=2.0), occupant("large", 50, idle_s=1.0)]

    assert [each.residency_id for each in choose_victims(idle, 50)] == ["large"]


OCCUPANTS = st.lists(
    st.builds(
        Occupant,
        residency_id=st.uuids().map(str),
        model_id=st.sampled_from(["x", "y", "z"]),
        device_id=st.just("cpu"),
        state=st.sampled_from([S.QUEUED, S.LOADING, S.RESIDENT, S.DRAINING, S.UNLOADING]),
        reserved_bytes=st.integers(0, 60),
        queue_seq=st.integers(1, 5),
        n_leases=st.integers(0, 1),
        n_waiters=st.integers(0, 1),
        pinned=st.booleans(),
        age_s=st.sampled_from([0.0, 25.0, 60.0]),
        idle_s=st.floats(0, 100),
    ),
    max_size=7,
)


def _held_bytes(found: list[Occupant], after: dict[str, ResidencyState]) -> int:
    return sum(o.reserved_bytes for o in found if after.get(o.residency_id, o.state).holds_memory)


@given(OCCUPANTS, st.integers(1, 150), st.integers(0, 2), st.integers(0, 4))
def test_a_plan_never_overcommits_and_never_takes_what_is_held(found, capacity, max_loads, max_residents):
    view = node(*found, capacity=capacity, max_loads=max_loads, max_residents=max_residents)
    after = states(view)
    loaded = [o for o in found if after.get(o.residency_id) is S.LOADING]
    sent_off = [o for o in found if o.state is S.RESIDENT and o.residency_id in after]

    if loaded:
        assert _held_bytes(found, after) <= capacity
        counted = [o for o in found if after.get(o.residency_id, o.state).holds_memory]
        assert not max_residents or len(counted) <= max_residents
        loading = [o for o in found if after.get(o.residency_id, o.state) is S.LOADING]
        assert not max_loads or len(loading) <= max_loads
    assert all(o.state is S.QUEUED and o.n_waiters for o in loaded)
    for victim in sent_off:
        assert not victim.pinned
        assert victim.age_s >= POLICY.min_residency_s
        assert after[victim.residency_id] is (S.DRAINING if victim.in_use else S.UNLOADING)


@given(OCCUPANTS, st.integers(1, 150))
def test_a_plan_taken_twice_does_nothing_more(found, capacity):
    view = node(*found, capacity=capacity)
    after = states(view)
    settled = [replace(o, state=after.get(o.residency_id, o.state)) for o in found]
    again = states(replace(view, occupants=tuple(o for o in settled if not o.state.ended)))

    assert not set(again.values()) & {S.LOADING, S.UNLOADED, S.RESIDENT}


@given(OCCUPANTS, st.integers(1, 150), st.booleans())
def test_the_plan_before_a_residency_is_stored_is_the_plan_after(found, capacity, pinned):
    """The stored row has no waiter yet, and may be pinned already; the queue number is larger than all."""
    where = space(*found, capacity=capacity)
    before = plan_with_candidate("x", where, POLICY, residency_id="new", actor="anna")
    stored = occupant("new", 40, S.QUEUED, model_id="x", actor="anna", queue_seq=99, n_waiters=0, age_s=0.0)
    stored = replace(stored, pinned=pinned, pinned_for_good=pinned, idle_s=0.0)
    after = plan(replace(where.node, occupants=(*found, stored)), POLICY, awaited="new")

    assert before == after


@given(OCCUPANTS, st.integers(1, 120))
def test_no_victim_is_needless(found, missing):
    chosen = [each.reserved_bytes for each in choose_victims(found, missing)]

    assert not chosen or sum(chosen) >= missing
    assert all(sum(chosen) - each < missing for each in chosen)


def test_the_backoff_doubles_to_its_limit():
    assert [POLICY.failure_backoff_s(n) for n in (0, 1, 2, 3, 4)] == [0.0, 1.0, 2.0, 4.0, 8.0]
    assert POLICY.failure_backoff_s(11) == POLICY.failure_backoff_s(1000) == 900.0


@given(st.sampled_from(list(S)), st.sampled_from([S.LOADING, S.RESIDENT, S.UNLOADED, S.FAILED]))
def test_no_report_revives_what_has_ended_or_is_on_its_way_out(current, reported):
    followed = follow_report(current, reported)

    if current.ended:
        assert followed in (None, current)
    if current is S.UNLOADING:
        assert followed in (S.UNLOADING, S.UNLOADED)
    if current is S.RESIDENT:
        assert followed is not S.LOADING


def test_a_load_that_was_given_up_ends_as_failed():
    assert follow_report(S.UNLOADING, S.UNLOADED, failed=True) is S.FAILED
    assert follow_report(S.UNLOADING, S.UNLOADED) is S.UNLOADED


def test_the_dtype_is_the_options_or_what_suits_the_device():
    assert load_dtype({}, DeviceKind.CPU) == "float32"
    assert load_dtype({}, DeviceKind.CUDA) == "bfloat16"
    assert load_dtype({"dtype": "float16"}, DeviceKind.CPU) == "float16"


def test_silence_counts_only_while_the_registry_listened():
    listening = Listening(longest_gap_s=2.0)

    assert [listening.tick(now) for now in (0.0, 1.0, 2.5)] == [0.0, 1.0, 2.5]
    assert listening.tick(60.0) == 0.0
    assert listening.tick(61.0) == 1.0
