"""Queues, fairness, failure memory, limits and watchdogs against a real Postgres, with time moved by hand."""

from __future__ import annotations

import contextlib

import pytest

from fix_residency import S, World, told
from headrace_registry.errors import (
    AdmissionTimeout,
    CapacityBusy,
    DeviceOom,
    LeaseLost,
    LoadFailed,
    QueueFull,
    RunnerLost,
)
from headrace_registry.residency.policy import Policy
from headrace_registry.sizing.reservation import estimated_bytes

TINY = estimated_bytes({"F32": 1000}, "float32")
ONE = TINY * 3 // 2
TWO = TINY * 5 // 2
POLICY = Policy(max_queued=2, max_waiters=3)
ATTEMPTS = "SELECT residency_id, kind, passed, failure->>'reason' AS reason FROM validation_attempts"


@pytest.fixture
def world(database_url):
    made = World(database_url, POLICY)
    for name in "abcd":
        made.add_model(name, 1000)
    yield made
    made.check()
    made.close()


def one_device(world: World, capacity: int = ONE, **limits: int) -> None:
    world.start_node("n", {"cpu": capacity}, **limits)


def aged(world: World, model: str) -> None:
    """Resident for longer than the minimum, and idle."""
    world.release(world.acquire(model))
    world.advance(POLICY.min_residency_s + 1)
    world.heartbeat("n")


# The bugs that other residency managers had ------------------------------------------------------------------------


def test_a_victim_is_not_revived_by_a_request_that_comes_as_it_leaves(world):
    """Elsewhere a request revived a model on its way out, and the scheduler waited for hours for its unload."""
    one_device(world)
    aged(world, "a")
    first = world.ask("b")
    assert world.poll(first) is None
    victim = world.latest("a")
    again = world.ask("a")

    assert world.poll(again) is None
    assert (victim["state"], world.residency(victim["id"])["state"]) == (S.UNLOADING, S.UNLOADING)
    world.obey()  # The victim goes, b loads.
    world.obey()
    assert world.poll(first) is not None
    assert world.poll(again) is None
    assert world.latest("a")["state"] == S.QUEUED


def test_a_model_that_loads_is_no_victim(world):
    """Elsewhere a model that was still loading was chosen as victim and killed."""
    one_device(world)
    loading = world.ask("a")
    assert world.poll(loading) is None
    world.advance(POLICY.min_residency_s + POLICY.max_wait_s)
    world.heartbeat("n")
    other = world.ask("b")
    world.poll(other)
    world.poll(loading)
    world.tick()

    assert world.states() == {"a": S.LOADING, "b": S.QUEUED}


def test_two_that_need_the_same_room_are_both_served_and_the_requested_is_not_evicted(world):
    """Elsewhere two waiters were promised the same slot: one waited for ever; then the mended version evicted again."""
    one_device(world)
    aged(world, "a")
    waiting = {name: world.ask(name) for name in "bc"}
    for call in waiting.values():
        assert world.poll(call) is None
    world.obey()
    world.obey()
    lease = world.poll(waiting["b"])
    assert world.poll(waiting["c"]) is None
    assert (world.states()["b"], world.states()["c"]) == (S.RESIDENT, S.QUEUED)
    world.release(lease)
    world.advance(POLICY.min_residency_s)
    world.heartbeat("n")
    world.poll(waiting["c"])
    world.obey()
    world.obey()

    assert world.poll(waiting["c"]) is not None


def test_a_large_load_takes_no_more_than_it_needs_and_waits_for_the_release(world):
    """Elsewhere one larger load evicted nearly everything: memory still unloading was not counted as coming back."""
    world.add_model("large", 60_000_000)
    needed = estimated_bytes({"F32": 60_000_000}, "float32")
    one_device(world, TINY * 4)
    assert TINY < needed <= TINY * 2
    for name in "abcd":
        world.release(world.acquire(name))
        world.advance(1.0)
    world.advance(POLICY.min_residency_s)
    world.heartbeat("n")
    call = world.ask("large")
    for _ in range(5):
        world.poll(call)
        world.tick()

    assert world.states() == {"a": S.UNLOADING, "b": S.UNLOADING, "c": S.RESIDENT, "d": S.RESIDENT, "large": S.QUEUED}


# Queues ------------------------------------------------------------------------------------------------------------


def test_the_queue_is_served_in_the_order_of_arrival(world):
    one_device(world)
    lease = world.acquire("a")
    waiting = [world.ask(name) for name in "bc"]
    for call in waiting:
        world.poll(call)
    world.release(lease)
    world.go_on(POLICY.min_residency_s, *waiting)
    world.tick()
    world.obey()

    assert (world.states()["b"], world.states()["c"]) == (S.LOADING, S.QUEUED)


def test_only_so_many_models_and_calls_may_wait_and_refusing_changes_nothing(world):
    one_device(world)
    world.acquire("a")
    for name in "bc":
        world.poll(world.ask(name))
    with told(QueueFull) as too_many_models:
        world.poll(world.ask("d"))
    world.poll(world.ask("c"))
    with told(QueueFull) as too_many_calls:
        world.poll(world.ask("b"))

    assert too_many_models[0].retry_after_s
    assert too_many_calls[0].retry_after_s
    assert world.states() == {"a": S.RESIDENT, "b": S.QUEUED, "c": S.QUEUED}


def test_at_the_deadline_the_call_says_where_it_stood_and_behind_whom(world):
    one_device(world)
    world.acquire("a")
    call = world.ask("b", wait_s=5.0)
    world.poll(call)
    world.advance(5.0)
    with told(AdmissionTimeout) as found:
        world.poll(call)

    assert found[0].metadata == {"state": "QUEUED", "position": "1", "holders": "caller-1 (a)"}


def test_pins_that_leave_no_room_for_ever_refuse_at_once_others_are_waited_for(world):
    one_device(world)
    world.acquire("a")
    world.pin("a")
    with told(CapacityBusy) as found:
        world.poll(world.ask("b"))
    world.unpin("a")
    world.pin("a", for_s=60.0)

    assert "caller-1 (a)" in found[0].metadata["holders"]
    assert world.poll(world.ask("b")) is None
    assert world.states()["b"] == S.QUEUED


def test_a_queued_model_that_nobody_waits_for_never_loads(world):
    one_device(world)
    lease = world.acquire("a")
    call = world.ask("b")
    world.poll(call)
    world.run(call.give_up())
    world.release(lease)
    world.advance(POLICY.min_residency_s)
    world.heartbeat("n")
    world.tick()

    assert world.states() == {"a": S.RESIDENT, "b": S.UNLOADED}
    assert world.latest("b")["reason"] == "nobody waits any more"


def test_a_queued_model_moves_to_where_it_fits_now(world):
    one_device(world)
    world.acquire("a")
    asked, loaded = world.ask("b"), world.load("c")
    world.poll(asked)
    world.start_node("m", {"cpu": TWO})
    world.poll(asked)
    world.tick()

    assert (world.latest("b")["node_id"], world.latest("b")["state"]) == ("m", S.LOADING)
    assert loaded.state is S.QUEUED
    assert (world.latest("c")["node_id"], world.latest("c")["state"]) == ("m", S.LOADING)


def test_a_stream_of_new_leases_does_not_starve_who_waits(world):
    one_device(world)
    lease = world.acquire("a")
    waiting = world.ask("b")
    world.poll(waiting)
    for _ in range(4):  # There is never a moment without a lease.
        world.advance(6.0)
        world.heartbeat("n")
        world.poll(waiting)
        newer = world.poll(world.ask("a"))
        assert newer is not None
        world.release(lease)
        lease = newer
    world.advance(7.0)
    world.poll(waiting)
    late = world.ask("a")
    world.poll(late)

    assert world.latest("a")["state"] == S.QUEUED
    assert world.residency(lease.residency_id)["state"] == S.DRAINING
    assert world.residency(lease.residency_id)["reason"].startswith("drained for b")
    world.run(world.leases.renew(lease.id, lease.fence))  # A lease that is held stays.
    world.release(lease)
    world.obey()
    world.obey()
    assert world.poll(waiting) is not None


@pytest.mark.parametrize("standing", [False, True])
def test_a_model_in_use_that_drained_for_one_who_left_serves_those_who_asked_for_it_meanwhile(world, standing):
    one_device(world)
    lease = world.acquire("a")
    world.advance(POLICY.min_residency_s + 1)
    world.heartbeat("n")
    left, again = world.ask("b"), world.ask("a")
    world.poll(left)
    for _ in range(4):
        world.advance(POLICY.max_wait_s / 4 + 1)
        world.heartbeat("n")
        world.poll(left)
    if standing:
        world.load("a")
    else:
        world.poll(again)
    assert world.residency(lease.residency_id)["state"] == S.DRAINING
    assert world.latest("a")["state"] == S.QUEUED
    world.run(left.give_up())
    world.tick()

    assert world.residency(lease.residency_id)["state"] == S.RESIDENT
    granted = world.poll(again)
    assert granted is not None
    assert granted.residency_id == lease.residency_id
    assert world.latest("a")["state"] == S.UNLOADED


def test_two_models_that_do_not_fit_together_take_turns_of_the_minimum(world):
    one_device(world)
    world.release(world.acquire("a"))
    waiting = world.ask("b")
    world.poll(waiting)
    world.go_on(POLICY.min_residency_s - 0.1, waiting)
    world.tick()
    before = world.states()["a"]
    world.advance(0.2)
    world.tick()

    assert (before, world.states()["a"]) == (S.RESIDENT, S.UNLOADING)
    assert world.latest("a")["reason"] == "evicted for b"


# Failures -----------------------------------------------------------------------------------------------------------


def fail(world: World, call: object, reason: str = "DEVICE_OOM") -> None:
    """Lets the node fail the load that the call waits for."""
    loading = next(each for each in world.assignments("n") if each.state is S.LOADING)
    world.fails(loading, reason)


def test_a_failed_load_is_left_alone_twice_as_long_each_time(world):
    one_device(world)
    for backoff_s in (1.0, 2.0, 4.0):
        call = world.ask("a")
        world.poll(call)
        fail(world, call)
        with told(DeviceOom):
            world.poll(call)
        with told(DeviceOom) as left:
            world.poll(world.ask("a"))
        assert left[0].retry_after_s == pytest.approx(backoff_s)
        assert float(left[0].metadata["left_alone_s"]) == pytest.approx(backoff_s)
        world.advance(backoff_s)
        world.heartbeat("n")
    assert world.acquire("a")


def test_a_load_that_is_ended_from_outside_begins_again_at_once(world):
    one_device(world)
    call = world.ask("a")
    world.poll(call)
    for _ in range(5):
        [loading] = world.assignments("n")
        world.fails(loading, "RUNNER_LOST", interrupted=True)
        assert world.poll(call) is None
        assert world.latest("a")["state"] == S.LOADING
    world.obey()

    assert world.poll(call) is not None
    assert world.sync.execute("SELECT 1 FROM load_failures").fetchone() is None


def test_a_load_that_no_call_waits_for_begins_again_too_when_it_is_ended_from_outside(world):
    one_device(world)
    world.acquire("a")
    queued = world.load("b")
    world.unload("a", force=True)
    world.unloads(world.assignments("n")[0])
    for _ in range(3):
        [loading] = world.assignments("n")
        world.fails(loading, "RUNNER_LOST", interrupted=True)
        world.tick()
    world.obey()

    assert queued.state is S.QUEUED
    assert world.latest("b")["state"] == S.RESIDENT


def test_a_load_that_had_to_wait_for_nothing_begins_again_too(world):
    one_device(world)
    begun = world.load("a")
    world.fails(world.assignments("n")[0], "RUNNER_LOST", interrupted=True)
    world.tick()
    world.obey()

    assert begun.state is S.LOADING
    assert world.latest("a")["state"] == S.RESIDENT
    assert world.sync.execute("SELECT 1 FROM waiters").fetchone() is None


def test_a_call_whose_loads_are_ended_from_outside_again_and_again_is_told_so(world):
    one_device(world)
    call = world.ask("a")
    world.poll(call)
    for _ in range(6):
        [loading] = world.assignments("n")
        world.fails(loading, "RUNNER_LOST", interrupted=True)
        with contextlib.suppress(RunnerLost):
            world.poll(call)
    with told(RunnerLost) as lost:
        world.poll(call)

    assert lost[0].retry_after_s == 5.0
    assert "from outside" in lost[0].message
    assert world.acquire("a")  # The next call is not refused for it.


def test_a_runner_that_is_ended_from_outside_while_it_holds_its_model_has_not_died(world):
    one_device(world)
    for _ in range(4):
        lease = world.acquire("a")
        world.release(lease)
        [resident] = world.assignments("n")
        world.fails(resident, "RUNNER_LOST", interrupted=True)

    assert world.acquire("a")


def test_a_node_that_starts_anew_has_its_failures_forgiven(world):
    one_device(world)
    for _ in range(6):
        world.sync.execute("UPDATE load_failures SET retry_time = registry_now()")
        call = world.ask("a")
        world.poll(call)
        fail(world, call)
        with told(DeviceOom):
            world.poll(call)
    with told(DeviceOom):
        world.poll(world.ask("a"))
    world.start_node(
        "n", {"cpu": world.sync.execute("SELECT capacity_bytes FROM devices").fetchone()["capacity_bytes"]}
    )

    assert world.acquire("a")


def test_a_success_and_other_load_options_clear_the_memory_of_failures(world):
    one_device(world)
    world.poll(world.ask("a"))
    fail(world, None)
    world.sync.execute("UPDATE models SET load_options = '{\"attn_implementation\": \"eager\"}' WHERE id = 'a'")
    world.acquire("a")
    world.unload("a", force=True)
    world.obey()
    world.poll(world.ask("a"))
    fail(world, None)
    with told(DeviceOom) as left:
        world.poll(world.ask("a"))

    assert left[0].retry_after_s == pytest.approx(1.0)


def test_after_a_failure_another_place_is_tried_and_then_the_failure_told(world):
    world.start_node("m", {"cpu": ONE})
    one_device(world)
    call = world.ask("a")
    for _ in range(2):
        world.poll(call)
        for node in "mn":
            for loading in world.assignments(node):
                if loading.state is S.LOADING:
                    world.fails(loading)
        world.advance(1.5)  # The first device could be tried again, but not by this call.
    with told(DeviceOom):
        world.poll(call)

    tried = world.sync.execute("SELECT node_id FROM residencies WHERE state = 'FAILED'").fetchall()
    assert sorted(row["node_id"] for row in tried) == ["m", "n"]


def test_a_runner_that_dies_loads_again_at_once_but_not_if_it_dies_again(world):
    one_device(world)
    retries = []
    for _ in range(3):
        world.acquire("a")
        world.fails(world.assignments("n")[0], "RUNNER_LOST")
        try:
            world.poll(world.ask("a"))
            retries.append(0.0)
        except LoadFailed as exc:
            retries.append(exc.retry_after_s)
            world.advance(exc.retry_after_s)
            world.heartbeat("n")

    assert retries == [0.0, pytest.approx(1.0), pytest.approx(2.0)]


def test_memory_that_an_unload_did_not_give_back_counts_until_the_node_finds_it_free(world):
    one_device(world)
    aged(world, "a")
    call = world.ask("b")
    world.poll(call)
    leaving = next(each for each in world.assignments("n") if each.state is S.UNLOADING)
    world.unloads(leaving, lost_bytes=TINY)
    world.report(leaving, S.UNLOADED, lost_bytes=TINY)  # The same report again counts once.
    world.tick()
    waited = world.states()["b"]
    lost = world.sync.execute("SELECT lost_bytes FROM devices").fetchone()["lost_bytes"]
    world.returns_lost("n")
    world.tick()

    assert (waited, lost, world.states()["b"]) == (S.QUEUED, TINY, S.LOADING)


# Limits, idleness, sizes ---------------------------------------------------------------------------------------------


def test_a_node_loads_only_so_many_at_once(world):
    one_device(world, TINY * 4, max_loads=1)
    calls = [world.ask(name) for name in "ab"]
    for call in calls:
        world.poll(call)
    before = world.states()
    world.obey()

    assert before == {"a": S.LOADING, "b": S.QUEUED}
    assert world.states() == {"a": S.RESIDENT, "b": S.LOADING}


def test_a_node_holds_only_so_many_models(world):
    one_device(world, TINY * 4, max_residents=1)
    aged(world, "a")
    world.poll(world.ask("b"))

    assert world.states() == {"a": S.UNLOADING, "b": S.QUEUED}


def test_what_nobody_uses_is_unloaded_after_the_idle_timeout(world):
    one_device(world)
    world.release(world.acquire("a"))
    world.advance(POLICY.idle_timeout_s - 1)
    world.heartbeat("n")
    world.tick()
    before = world.states()["a"]
    world.advance(2)
    world.heartbeat("n")
    world.tick()

    assert (before, world.states()["a"]) == (S.RESIDENT, S.UNLOADING)
    assert world.latest("a")["reason"] == "idle for 1800 s"


def test_the_measured_size_is_taken_there_and_its_ratio_elsewhere(world):
    one_device(world)
    world.start_node("m", {"cpu": ONE})
    call = world.ask("a", node="n")
    world.poll(call)
    world.loads(world.assignments("n")[0], measured_bytes=TINY // 2)
    world.poll(call)
    elsewhere = world.load("a", node="m")
    estimated = world.latest("a")["estimated_bytes"]

    assert elsewhere.reserved_bytes == pytest.approx(estimated / 2, abs=2)


# Watchdogs -----------------------------------------------------------------------------------------------------------


def test_a_node_that_is_silent_about_a_load_is_asked_again_and_at_last_the_load_fails(world):
    one_device(world)
    call = world.ask("a")
    world.poll(call)
    first = world.assignments("n")[0]
    world.advance(POLICY.load_silence_s)
    world.heartbeat("n")
    world.tick()
    again = world.assignments("n")[0]
    with told(LeaseLost):
        world.report(first, S.RESIDENT)
    world.advance(POLICY.load_deadline_s)
    world.heartbeat("n")
    world.tick()
    given_up = world.latest("a")
    with told(LoadFailed):
        world.poll(call)
    world.obey()
    attempts = world.sync.execute(ATTEMPTS).fetchall()

    assert (again.state, again.reason) == (S.LOADING, "the node has not reported for 120 s and is asked again")
    assert again.fence > first.fence
    assert given_up["state"] == S.UNLOADING  # Its memory still counts.
    assert world.residency(first.id)["state"] == S.FAILED
    assert attempts == [{"residency_id": first.id, "kind": "LOAD", "passed": False, "reason": "LOAD_FAILED"}]


def test_a_node_that_is_silent_about_an_unload_is_asked_again_and_the_bytes_count(world):
    one_device(world)
    aged(world, "a")
    world.poll(world.ask("b"))
    before = world.latest("a")
    world.advance(POLICY.unload_silence_s)
    world.heartbeat("n")
    world.poll(world.ask("b"))
    world.tick()
    after = world.latest("a")

    assert (after["state"], after["fence"] > before["fence"]) == (S.UNLOADING, True)
    assert "asked again" in after["reason"]
    assert world.states()["b"] == S.QUEUED
