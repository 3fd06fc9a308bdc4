"""A state machine on a real Postgres: callers, leases, pins, operators, time, and nodes that fail in every way."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from fix_residency import SILENT_S, S, World
from headrace_chassis.errors import ServiceError
from headrace_registry.errors import AdmissionTimeout, EpochStale, LeaseLost, ModelInUse
from headrace_registry.residency.leases import Lease
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.residency import Residency
from headrace_registry.sizing.reservation import estimated_bytes
from headrace_registry.workers.lease_wait import LeaseWait

POLICY = Policy(max_queued=3, max_waiters=8, idle_timeout_s=600.0)
SIZES = {"small": 1_000_000, "medium": 50_000_000, "large": 120_000_000, "huge": 250_000_000}
BYTES = {name: estimated_bytes({"F32": n}, "float32") for name, n in SIZES.items()}
MODELS = tuple(SIZES)
NODES = {
    "alpha": {"cpu": BYTES["small"] + BYTES["large"], "cuda:0": BYTES["medium"] * 2},
    "beta": {"cpu": BYTES["huge"]},
}
PICK = st.integers(0, 11)
# A rule that shall be rare acts at 0.
DICE = st.integers(0, 4)


class Residencies(RuleBasedStateMachine):
    """Each rule is one thing that may happen; after each, everything that must always hold is checked."""

    world: World
    n_steps = 0
    seen: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[LeaseWait] = []
        self.deadlines: dict[LeaseWait, float] = {}
        self.held: dict[str, Lease] = {}
        self.limits = (0, 0)
        self.begun = False

    @initialize(max_loads=st.integers(0, 2), max_residents=st.sampled_from([0, 2, 3]))
    def begin(self, max_loads: int, max_residents: int) -> None:
        self.world.empty()
        self.limits = (max_loads, max_residents)
        for name, n_parameters in SIZES.items():
            self.world.add_model(name, n_parameters)
        for name in NODES:
            self._start(name)
        self.begun = True

    # Callers

    @rule(models=st.lists(st.sampled_from(MODELS), min_size=1, max_size=4), wait_s=st.sampled_from([20, 300]))
    def ask(self, models: list[str], wait_s: float) -> None:
        for model in models:
            self._ask(model, "", wait_s)

    @rule(model=st.sampled_from(MODELS), node=st.sampled_from(["alpha", "beta"]))
    def ask_one_node(self, model: str, node: str) -> None:
        self._ask(model, node, 100.0)

    @rule(models=st.lists(st.sampled_from(MODELS), min_size=1, max_size=3))
    def use(self, models: list[str]) -> None:
        """Calls that are granted, as far as there is room."""
        for model in models:
            self._ask(model, "", 20)
        self._rounds(2)

    @precondition(lambda self: self.waiting)
    @rule(pick=PICK)
    def poll(self, pick: int) -> None:
        self._poll(_pick(self.waiting, pick))

    @precondition(lambda self: self.waiting)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        call = _pick(self.waiting, pick)
        self.waiting.remove(call)
        self.world.run(call.give_up())

    @precondition(lambda self: self.held)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        self.world.release(self.held.pop(_pick(list(self.held), pick)))

    @precondition(lambda self: self.held)
    @rule(pick=PICK)
    def renew(self, pick: int) -> None:
        lease = self.held[_pick(list(self.held), pick)]
        self.held[lease.id] = self.world.run(self.world.leases.renew(lease.id, lease.fence))

    # Operators

    @rule(model=st.sampled_from(MODELS), node=st.sampled_from(["", "alpha"]))
    def load(self, model: str, node: str) -> None:
        self._try(lambda: self.world.load(model, node=node))

    @rule(model=st.sampled_from(MODELS), force=st.booleans(), dice=DICE)
    def unload(self, model: str, force: bool, dice: int) -> None:
        if dice > 1:
            return
        leased = [lease for lease in self.held.values() if lease.model_id == model]
        in_use = self.world.leased(model) or self.world.pinned(model)
        try:
            ended = self.world.unload(model, force=force)
        except ModelInUse:
            assert in_use
            assert not force
            return
        assert force or not in_use or not ended
        for lease in leased:
            del self.held[lease.id]

    @rule(model=st.sampled_from(MODELS), for_s=st.sampled_from([None, 300.0, 300.0]))
    def pin(self, model: str, for_s: float | None) -> None:
        self.world.pin(model, for_s=for_s)

    @rule(model=st.sampled_from(MODELS))
    def unpin(self, model: str) -> None:
        self.world.unpin(model)

    # Nodes

    @rule(node=st.sampled_from(sorted(NODES)))
    def obey(self, node: str) -> None:
        self.world.obey(node)

    @rule(node=st.sampled_from(sorted(NODES)), pick=PICK, end=st.sampled_from(["loads", "less", "oom", "died", "hang"]))
    def answer_a_load(self, node: str, pick: int, end: str) -> None:
        told = self._told(node, S.LOADING)
        if not told:
            return
        residency = _pick(told, pick)
        self.world.starts_loading(residency)
        if end == "loads":
            self.world.loads(residency)
        elif end == "less":
            self.world.loads(residency, measured_bytes=residency.reserved_bytes * 4 // 5)
        elif end == "oom":
            self.world.fails(residency)
        elif end == "died":
            self.world.fails(residency, "RUNNER_LOST", lost_bytes=residency.reserved_bytes // 4)

    @rule(node=st.sampled_from(sorted(NODES)), pick=PICK, leaks=st.sampled_from([False, False, True]))
    def answer_an_unload(self, node: str, pick: int, leaks: bool) -> None:
        told = self._told(node, S.UNLOADING)
        if told:
            residency = _pick(told, pick)
            self.world.unloads(residency, lost_bytes=residency.reserved_bytes // 2 if leaks else 0)

    @rule(node=st.sampled_from(sorted(NODES)), pick=PICK)
    def a_runner_dies(self, node: str, pick: int) -> None:
        told = [*self._told(node, S.RESIDENT), *self._told(node, S.DRAINING)]
        if told:
            residency = _pick(told, pick)
            self._forget_leases(lambda lease: lease.residency_id == residency.id)
            self.world.fails(residency, "RUNNER_LOST")

    @rule(node=st.sampled_from(sorted(NODES)), dice=DICE)
    def restart(self, node: str, dice: int) -> None:
        if dice:
            return
        old, told = self.world.epochs[node], self.world.assignments(node)
        self._forget_leases(lambda lease: lease.node_id == node)
        self._start(node)
        for residency in told[:1]:
            with pytest.raises(EpochStale):
                self.world.report(residency, S.RESIDENT, epoch=old)

    @rule(node=st.sampled_from(sorted(NODES)))
    def stale_report(self, node: str) -> None:
        for residency in self._told(node, S.LOADING)[:1]:
            with pytest.raises(LeaseLost):
                self.world.report(residency, S.RESIDENT, fence=residency.fence - 1)

    @rule(node=st.sampled_from(sorted(NODES)))
    def memory_comes_back(self, node: str) -> None:
        self.world.heartbeat(node)
        self.world.returns_lost(node)

    # Time

    @rule(seconds=st.sampled_from([0.3, 2.0, 9.0]))
    def wait(self, seconds: float) -> None:
        self._pass(seconds, heard=sorted(NODES))

    @rule(seconds=st.sampled_from([25.0, 35.0, 130.0]), silent=st.sampled_from(["", "", "", *NODES]))
    def wait_longer(self, seconds: float, silent: str) -> None:
        self._pass(seconds, heard=[node for node in sorted(NODES) if node != silent])

    @rule(seconds=st.sampled_from([700.0, 4000.0]), dice=DICE)
    def wait_very_long(self, seconds: float, dice: int) -> None:
        if not dice:
            self._pass(seconds, heard=sorted(NODES))

    @rule(rounds=st.integers(1, 5))
    def go_on(self, rounds: int) -> None:
        """Nodes and callers do what is expected."""
        self._rounds(rounds)

    def _rounds(self, rounds: int) -> None:
        for _ in range(rounds):
            self._pass(4.0, heard=sorted(NODES))
            self.world.obey()
            for call in list(self.waiting):
                self._poll(call)

    def check_invariants(self, settings: object = None, *args: object, **kwargs: object) -> None:
        super().check_invariants(settings, *args, **kwargs)  # type: ignore[arg-type]
        type(self).n_steps += 1
        self.world.check()
        rows = self.world.sync.execute(
            "SELECT id FROM leases WHERE id = ANY(%s) AND state = 'HELD'", (list(self.held),)
        ).fetchall()
        taken = set(self.held) - {row["id"] for row in rows}
        assert not taken, f"leases were taken away: {taken}"

    def teardown(self) -> None:
        """No call is lost: once nodes answer and time passes, every one ends."""
        if not self.begun:
            return
        self._count_events()
        end = max([self.deadlines[call] for call in self.waiting], default=0.0) + 5.0
        for call in list(self.waiting):
            self._poll(call)
        while self.waiting:
            assert self.world.now <= end, f"{len(self.waiting)} calls wait past their deadline"
            self._pass(9.0, heard=sorted(NODES))
            self.world.obey()
            for call in list(self.waiting):
                self._poll(call)
            self.world.check()
        # Without a waiting call every transition under way ends; LoadModel's models may still load one after another.
        stuck = self._on_the_way()
        for _ in range(30):
            self._pass(4.0, heard=sorted(NODES))
            self.world.obey()
            stuck = self._on_the_way()
            if not stuck:
                break
        assert not stuck, f"never arrives: {stuck}"

    def _on_the_way(self) -> list[dict[str, object]]:
        return self.world.sync.execute(
            "SELECT model_id, state, reason FROM residencies r WHERE state IN ('LOADING', 'DRAINING', 'UNLOADING')"
            " OR (state = 'QUEUED' AND NOT EXISTS (SELECT 1 FROM waiters w WHERE w.residency_id = r.id))"
        ).fetchall()

    def _ask(self, model: str, node: str, wait_s: float) -> None:
        call = self.world.ask(model, node=node, wait_s=wait_s, ttl_s=40.0)
        self.waiting.append(call)
        self.deadlines[call] = self.world.now + wait_s
        self._poll(call)

    def _count_events(self) -> None:
        rows = self.world.sync.execute("SELECT state, reason FROM residency_events").fetchall()
        self.seen.update(row["state"] for row in rows)
        self.seen.update(row["reason"].split(" for ")[0] for row in rows)

    def _poll(self, call: LeaseWait) -> None:
        """Takes one step of a call, which ends with a lease or with a typed error."""
        overdue = self.world.now - self.deadlines[call]
        try:
            lease = self.world.poll(call)
        except ServiceError as exc:
            self.waiting.remove(call)
            self.world.run(call.give_up())
            self.seen[type(exc).__name__] += 1
            if isinstance(exc, AdmissionTimeout) and overdue < 0:
                raise
            return
        if lease is not None:
            self.waiting.remove(call)
            self.held[lease.id] = lease
            self.seen["granted"] += 1
            assert self.world.residency(lease.residency_id)["state"] == S.RESIDENT

    def _try(self, work: Callable[[], object]) -> None:
        with contextlib.suppress(ServiceError):
            work()

    def _pass(self, seconds: float, *, heard: list[str]) -> None:
        self.world.advance(seconds)
        for node in heard:
            self.world.heartbeat(node)
        self._forget_leases(lambda lease: lease.expire_time <= self._clock())
        self.world.tick()
        if seconds > SILENT_S:
            # Leases on a silent node run out by themselves; until then they can't be renewed.
            self._forget_leases(lambda lease: lease.node_id not in heard)

    def _clock(self) -> object:
        row = self.world.sync.execute("SELECT registry_now() AS now").fetchone()
        assert row is not None
        return row["now"]

    def _told(self, node: str, state: S) -> list[Residency]:
        self.world.heartbeat(node)
        return [residency for residency in self.world.assignments(node) if residency.state is state]

    def _forget_leases(self, gone: Callable[[Lease], bool]) -> None:
        self.held = {lease.id: lease for lease in self.held.values() if not gone(lease)}

    def _start(self, node: str) -> None:
        self.world.start_node(node, NODES[node], max_loads=self.limits[0], max_residents=self.limits[1])


def _pick(items: list, pick: int):
    return items[pick % len(items)]


def _run(database_url: str, *, n_examples: int, n_steps: int, derandomize: bool) -> int:
    world = World(database_url, POLICY)
    machine = type("Machine", (Residencies,), {"world": world, "n_steps": 0, "seen": Counter()})
    started = time.monotonic()
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=n_examples,
                stateful_step_count=n_steps,
                derandomize=derandomize,
                database=None,
                deadline=None,
                print_blob=True,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        took_s = time.monotonic() - started
        world.close()
        print(f"{machine.n_steps} steps in {took_s:.0f} s: {dict(machine.seen.most_common())}")  # noqa: T201
    return machine.n_steps


@pytest.mark.timeout(240)  # About 10 s alone on two cores.
def test_nothing_is_over_committed_taken_away_or_lost(database_url):
    _run(database_url, n_examples=20, n_steps=40, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_nothing_is_over_committed_taken_away_or_lost_in_100_000_steps(database_url):
    # Many examples end before their hundredth step.
    assert _run(database_url, n_examples=1300, n_steps=100, derandomize=False) >= 100_000
