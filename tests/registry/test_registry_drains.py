"""Which models drain, for which others, and which stay after all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fix_scheduling import POLICY, S, node, occupant, queued, states
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.scheduling import DeviceView, NodeView, Outcome, plan

GPU = DeviceView(id="cuda:0", kind=DeviceKind.CUDA, capacity_bytes=100)


def draining(name: str, n_bytes: int, **fields: object):
    return occupant(name, n_bytes, S.DRAINING, **{"n_leases": 1, **fields})


def with_gpu(view: NodeView) -> NodeView:
    return replace(view, devices=(*view.devices, GPU))


def test_what_is_idle_meanwhile_goes_at_once_and_who_drained_for_the_waiter_stays():
    drains, idle, waiting = draining("d", 60), occupant("idle", 40), queued("q", 40, 1, age_s=99)
    found = plan(node(drains, idle, waiting), POLICY)
    then = node(replace(drains, state=S.RESIDENT, age_s=0.0), replace(idle, state=S.UNLOADING), waiting)

    assert {step.residency_id: step.state for step in found.steps} == {"idle": S.UNLOADING, "d": S.RESIDENT}
    assert found.outcomes == {"q": Outcome.EVICT}
    assert (states(then), plan(then, POLICY).outcomes) == ({}, {"q": Outcome.WAIT})


def test_idle_models_that_are_not_enough_stay_while_one_in_use_drains():
    found = plan(
        node(draining("d", 60), occupant("idle", 20), occupant("used", 20, n_leases=1), queued("q", 40, 1)), POLICY
    )

    assert (found.steps, found.outcomes) == ((), {"q": Outcome.WAIT})


def test_idle_models_make_up_what_the_drained_one_lacks():
    view = node(draining("d", 40), occupant("idle", 30), occupant("used", 30, n_leases=1), queued("q", 60, 1))

    assert states(view) == {"idle": S.UNLOADING}


def test_no_more_drain_than_the_waiters_need():
    drains = (draining("often", 50, idle_s=1), draining("rarely", 50, idle_s=2))

    assert states(node(*drains, queued("q", 40, 1))) == {"often": S.RESIDENT}
    assert states(node(*drains, queued("a", 40, 1), queued("b", 40, 2))) == {}


def test_one_that_is_drained_already_goes_before_one_in_use():
    drains = (draining("used", 50, idle_s=2), draining("free", 50, n_leases=0, idle_s=1))

    assert states(node(*drains, queued("q", 40, 1))) == {"used": S.RESIDENT, "free": S.UNLOADING}


def test_what_is_drained_goes_though_one_in_use_that_can_not_come_back_would_give_enough():
    leased, again = draining("leased", 40, model_id="b"), occupant("again", 20, model_id="b", n_leases=1)
    found = plan(node(draining("free", 40, n_leases=0), leased, again, queued("q", 20, 1)), POLICY)

    assert {step.residency_id: step.state for step in found.steps} == {"free": S.UNLOADING}
    assert found.outcomes == {"q": Outcome.WAIT}


@pytest.mark.parametrize("n_leases", [0, 1])
def test_a_model_asked_for_again_stays_once_nobody_else_waits_for_its_memory(n_leases):
    drains, used = draining("d", 60, model_id="m", n_leases=n_leases), occupant("used", 30, n_leases=1)
    again = queued("q", 60, 2, model_id="m", age_s=500)
    other = queued("first", 60, 1, age_s=500)

    assert [(s.residency_id, s.state) for s in plan(node(drains, used, again), POLICY).steps] == [
        ("q", S.UNLOADED),  # First, since a model is active only once on a device.
        ("d", S.RESIDENT),
    ]
    assert "q" not in states(node(drains, used, again, other))
    assert plan(node(drains, used, again), POLICY, awaited="q").outcomes == {"q": Outcome.WAIT}


def test_models_asked_for_again_all_stay_where_nobody_else_waits():
    drains = (draining("a1", 60, model_id="a"), draining("b1", 20, model_id="b"), draining("b2", 20, model_id="b"))
    again = (queued("a3", 60, 1, model_id="a"), queued("b3", 20, 2, model_id="b"))
    stay = {"a3": S.UNLOADED, "b3": S.UNLOADED, "a1": S.RESIDENT}

    assert states(node(*drains, *again)) in ({**stay, "b1": S.RESIDENT}, {**stay, "b2": S.RESIDENT})


def test_who_is_drained_stays_when_the_one_that_waits_for_memory_needs_only_to_join():
    drains = (draining("free", 40, n_leases=0), draining("leased", 60, model_id="b"))

    assert states(node(*drains, queued("q", 40, 1, model_id="b", age_s=500))) == {
        "q": S.UNLOADED,
        "free": S.RESIDENT,
        "leased": S.RESIDENT,
    }


def test_who_waits_for_another_device_keeps_nobody_draining():
    held, waiting = occupant("held", 90, n_leases=1), queued("q", 40, 1)

    assert states(with_gpu(node(held, waiting, draining("d", 80, device_id="cuda:0")))) == {"d": S.RESIDENT}
    assert states(with_gpu(node(held, waiting, draining("d", 80, n_leases=0, device_id="cuda:0")))) == {"d": S.RESIDENT}


@pytest.mark.parametrize(("max_residents", "expected"), [(1, {}), (2, {"q": S.LOADING, "d": S.RESIDENT})])
def test_one_drains_on_any_device_for_a_place_among_the_models_of_the_node(max_residents, expected):
    view = node(queued("q", 40, 1), draining("d", 80, device_id="cuda:0"), max_residents=max_residents)

    assert states(with_gpu(view)) == expected


def test_no_more_drain_for_a_place_than_the_waiters_need():
    drains = (draining("often", 10, device_id="cuda:0", idle_s=1), draining("rarely", 10, idle_s=2))

    assert states(with_gpu(node(queued("q", 10, 1), *drains, max_residents=2))) == {"often": S.RESIDENT}


def test_who_waits_for_more_than_drains_keeps_it_draining():
    view = node(draining("d", 50), occupant("held", 50, n_leases=1, age_s=1), queued("q", 60, 1))

    assert states(view) == {}


def test_who_is_shut_out_by_pins_keeps_nobody_draining():
    pinned = occupant("p", 50, pinned=True, pinned_for_good=True)

    assert states(node(draining("d", 50), pinned, queued("q", 60, 1))) == {"d": S.RESIDENT}


def test_a_limit_of_loads_lets_go_on_what_drains_for_those_behind_it():
    view = node(occupant("l", 20, S.LOADING), draining("d", 80), queued("q", 40, 1), max_loads=1)

    assert states(view) == {}
