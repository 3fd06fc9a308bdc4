"""The decisions about residency as pure functions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from registry_service.memory import estimated_bytes, load_dtype
from registry_service.nodes import DeviceKind
from registry_service.residency import (
    Action,
    Occupant,
    ResidencyState,
    Space,
    choose_victims,
    decide_on_device,
    decide_placement,
    follow_report,
    next_to_load,
)
from registry_service.upkeep import Listening

S = ResidencyState


def occupant(name: str, n_bytes: int = 10, state: ResidencyState = S.RESIDENT, **fields: object) -> Occupant:
    return Occupant(residency_id=name, model_id=f"model-{name}", state=state, reserved_bytes=n_bytes, **fields)


def space(*occupants: Occupant, capacity: int = 100, needed: int = 40, **fields: object) -> Space:
    place = {"node_id": "n", "device_id": "cpu", "kind": DeviceKind.CPU, **fields}
    return Space(capacity_bytes=capacity, required_bytes=needed, occupants=occupants, **place)


def test_a_model_that_fits_is_loaded_at_once():
    assert decide_on_device("m", space(occupant("a", 60))).action is Action.LOAD


def test_a_model_larger_than_the_device_never_fits():
    assert decide_on_device("m", space(needed=101)).action is Action.TOO_LARGE


def test_an_active_residency_of_the_model_is_joined():
    for state in (S.QUEUED, S.LOADING, S.RESIDENT):
        there = Occupant(residency_id="r", model_id="m", state=state, reserved_bytes=10)

        assert decide_on_device("m", space(there)).joined == "r"


def test_an_unloading_residency_of_the_model_is_not_joined_but_its_memory_is_awaited():
    going = Occupant(residency_id="r", model_id="m", state=S.UNLOADING, reserved_bytes=90)

    assert decide_on_device("m", space(going)).action is Action.WAIT


def test_the_least_recently_used_idle_residency_is_the_victim():
    decision = decide_on_device("m", space(occupant("new", 50, last_used=2.0), occupant("old", 50, last_used=1.0)))

    assert decision.action is Action.EVICT
    assert decision.victims == ("old",)


def test_leased_pinned_awaited_and_loading_residencies_are_never_victims():
    held = (
        occupant("leased", 20, n_leases=1, holders=("x",)),
        occupant("pinned", 20, pinned=True),
        occupant("awaited", 20, n_waiters=1),
        occupant("loading", 40, S.LOADING),
    )

    assert decide_on_device("m", space(*held)).action is Action.BUSY


def test_memory_still_unloading_is_awaited_before_anything_is_evicted():
    decision = decide_on_device("m", space(occupant("going", 60, S.UNLOADING), occupant("idle", 40)))

    assert decision.action is Action.WAIT
    assert decision.victims == ()


def test_bytes_promised_to_the_queue_are_not_promised_again():
    taken = space(occupant("going", 100, S.UNLOADING), occupant("queued", 80, S.QUEUED))

    assert decide_on_device("m", taken).action is Action.BUSY


def test_a_needless_victim_is_spared():
    idle = [occupant("small", 10, last_used=1.0), occupant("large", 50, last_used=2.0)]

    assert choose_victims(idle, 50) == ("large",)


def test_a_gpu_is_preferred_even_if_something_idle_must_leave_it():
    gpu = space(occupant("idle", 80), node_id="n", device_id="cuda:0", kind=DeviceKind.CUDA)
    decision = decide_placement("m", [space(capacity=1000), gpu])

    assert (decision.action, decision.space.device_id) == (Action.EVICT, "cuda:0")


def test_the_cpu_is_taken_when_every_gpu_is_held():
    gpu = space(occupant("leased", 80, n_leases=1), device_id="cuda:0", kind=DeviceKind.CUDA)

    assert decide_placement("m", [space(), gpu]).space.kind is DeviceKind.CPU


def test_a_device_that_has_the_model_wins_over_an_empty_one():
    there = Occupant(residency_id="r", model_id="m", state=S.RESIDENT, reserved_bytes=10)
    decision = decide_placement("m", [space(node_id="a", kind=DeviceKind.CUDA), space(there, node_id="b")])

    assert decision.joined == "r"


def test_busy_says_so_rather_than_too_large_when_one_device_could_hold_it():
    small = space(node_id="a", capacity=10)
    held = space(occupant("leased", 80, n_leases=1), node_id="b")

    assert decide_placement("m", [small, held]).action is Action.BUSY


def test_nobody_overtakes_in_the_queue():
    assert next_to_load([("first", 50), ("second", 10)], 40) == ()
    assert next_to_load([("first", 30), ("second", 10), ("third", 10)], 45) == ("first", "second")


OCCUPANTS = st.lists(
    st.builds(
        Occupant,
        residency_id=st.uuids().map(str),
        model_id=st.sampled_from(["x", "y", "z"]),
        state=st.sampled_from([S.QUEUED, S.LOADING, S.RESIDENT, S.DRAINING, S.UNLOADING]),
        reserved_bytes=st.integers(0, 60),
        n_leases=st.integers(0, 1),
        pinned=st.booleans(),
        n_waiters=st.integers(0, 1),
        last_used=st.floats(0, 100),
    ),
    max_size=6,
)


@given(OCCUPANTS, st.integers(1, 150), st.integers(1, 120))
def test_a_decision_never_overcommits_and_never_takes_what_is_held(occupants, capacity, needed):
    device = space(*occupants, capacity=capacity, needed=needed)
    decision = decide_on_device("m", device)
    by_id = {o.residency_id: o for o in occupants}
    victims = [by_id[victim] for victim in decision.victims]

    assert all(victim.evictable for victim in victims)
    if decision.action is Action.LOAD:
        assert device.held_bytes + device.claimed_bytes + needed <= capacity
    if decision.action in (Action.WAIT, Action.EVICT):
        staying = device.held_bytes - device.returning_bytes - sum(v.reserved_bytes for v in victims)
        assert staying + device.claimed_bytes + needed <= capacity
    if decision.action is Action.BUSY:
        idle = sum(o.reserved_bytes for o in occupants if o.evictable)
        assert device.held_bytes + device.claimed_bytes - device.returning_bytes - idle + needed > capacity


@given(OCCUPANTS, st.integers(1, 120))
def test_no_victim_is_needless(occupants, missing):
    by_id = {o.residency_id: o for o in occupants}
    chosen = [by_id[each].reserved_bytes for each in choose_victims(occupants, missing)]

    assert not chosen or sum(chosen) >= missing
    assert all(sum(chosen) - each < missing for each in chosen)


@given(st.sampled_from(list(S)), st.sampled_from([S.LOADING, S.RESIDENT, S.UNLOADED, S.FAILED]))
def test_no_report_revives_what_has_ended_or_is_on_its_way_out(current, reported):
    followed = follow_report(current, reported)

    if current.ended:
        assert followed in (None, current)
    if current is S.UNLOADING:
        assert followed in (S.UNLOADING, S.UNLOADED)
    if current is S.RESIDENT:
        assert followed is not S.LOADING


def test_the_estimate_follows_the_load_dtype():
    stored = {"BF16": 1000, "I64": 10}

    assert estimated_bytes(stored, "float32") == int(4080 * 1.2) + 200_000_000
    assert load_dtype({}, DeviceKind.CPU) == "float32"
    assert load_dtype({}, DeviceKind.CUDA) == "bfloat16"
    assert load_dtype({"dtype": "float16"}, DeviceKind.CPU) == "float16"


def test_silence_counts_only_while_the_registry_listened():
    listening = Listening(longest_gap_s=2.0)

    assert [listening.tick(now) for now in (0.0, 1.0, 2.5)] == [0.0, 1.0, 2.5]
    assert listening.tick(60.0) == 0.0
    assert listening.tick(61.0) == 1.0
