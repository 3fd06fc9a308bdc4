"""Every parser of bytes from outside takes a changed file, or refuses it with an error of ours."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fix_fuzz import TARGETS, changed, run_inputs, seeds
from headrace_chassis.confined.limits import Limits
from headrace_chassis.confined.pool import Confined
from headrace_chassis.errors import ServiceError
from headrace_models.errors import ModelFilesError

# As much as the servers give such parsers, or less.
LIMITS = Limits(memory_bytes=1024**3, cpu_s=60, wall_s=120.0)


class Ended(ServiceError):
    """The child was ended: by its limits, or by a fault in a library. Servers refuse such a file."""


@pytest.fixture(scope="module")
def children():
    confined = Confined(errors=ServiceError, preload=("fix_fuzz",))
    yield confined
    confined.close()


def fuzz(children, target: str, seed: int, seconds: float) -> tuple[int, int, int]:
    """Returns the numbers of inputs, of refusals, and of children that were ended; fails with the first finding."""
    n_inputs = n_refused = n_ended = 0
    end = time.monotonic() + seconds
    while (rest := end - time.monotonic()) > 0:
        seed += 1
        job = {"target": target, "seed": seed, "seconds": min(rest, 5.0)}
        try:
            found = children.run(run_inputs, job, refuse=Ended, limits=LIMITS)
        except Ended:
            n_ended += 1
            continue
        assert not found["finding"], (found, seed)
        n_inputs += found["n_inputs"]
        n_refused += found["n_refused"]
    return n_inputs, n_refused, n_ended


@pytest.mark.parametrize("target", TARGETS)
def test_a_changed_file_is_taken_or_refused(children, target):
    n_inputs, n_refused, _ = fuzz(children, target, seed=0, seconds=0.7)

    assert n_inputs > n_refused >= 0


@pytest.mark.parametrize("target", TARGETS)
@given(st.integers(0, 2**32))
@settings(max_examples=1, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_good_files_are_taken(target, seed):
    for data in seeds(target):
        try:
            TARGETS[target](data)
        except (ServiceError, ModelFilesError) as exc:
            pytest.fail(f"{target}: {exc}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", TARGETS)
def test_minutes_of_changed_files_are_taken_or_refused(children, target):
    n_inputs, n_refused, n_ended = fuzz(children, target, seed=int(time.time()), seconds=60.0)

    print(f"\n{target}: {n_inputs} inputs, {n_refused} refused, {n_ended} children ended")  # noqa: T201 -- the figures of the run
    assert n_inputs > n_refused > 0


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("target", ["txt", "jsonl", "json", "csv", "npy", "header", "template"])
def test_any_bytes_are_taken_or_refused(target, data):
    try:
        TARGETS[target](data)
    except (ServiceError, ModelFilesError):
        return


def test_changes_are_those_of_their_seed():
    data = seeds("json")[0]

    assert [changed(data, random.Random(3)) for _ in range(2)].count(changed(data, random.Random(3))) == 2
