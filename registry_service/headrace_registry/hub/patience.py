"""Repeats tries that meet a passing fault; three tries in a row without a new byte end it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception

from headrace_registry.hub.faults import is_transient, retry_after_s, summary

T = TypeVar("T")

_TRIES = 3
# The limit even if each try brings bytes: a hub that cuts every connection early does not get better.
_MOST_TRIES = 100
_LONGEST_WAIT_S = 60.0
# A longer wait than this is a failure: a caller had better try again later than hold its claim.
_LONGEST_ASKED_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Repeats tries. Before each wait, `on_wait` gets its reason and its seconds."""

    backoff_s: float
    on_wait: Callable[[str, float], None]

    def call(self, work: Callable[[], T], *, moved: Callable[[], int] = lambda: 0) -> T:
        """Returns the result of the first try that succeeds; `moved` counts the bytes so far. Raises the last error."""
        failures = _Failures(moved)

        def wait_s(state: RetryCallState) -> float:
            least_s = min(self.backoff_s * 2 ** (failures.in_a_row - 1), _LONGEST_WAIT_S)
            # Spread out, so that the files of one download do not all come back at the same moment.
            return retry_after_s(_error(state)) or random.uniform(least_s, 1.5 * least_s)  # noqa: S311 - no secret.

        def tell(state: RetryCallState) -> None:
            next_s = state.next_action.sleep if state.next_action is not None else 0.0
            self.on_wait(summary(_error(state)), next_s)

        retrying = Retrying(
            retry=retry_if_exception(is_transient),
            stop=failures.enough,
            wait=wait_s,
            before_sleep=tell,
            reraise=True,
        )
        return retrying(work)


class _Failures:
    """Counts the failed tries in a row that brought no new byte."""

    def __init__(self, moved: Callable[[], int]) -> None:
        self._moved = moved
        self._best = moved()
        self.in_a_row = 0

    def enough(self, state: RetryCallState) -> bool:
        if retry_after_s(_error(state)) > _LONGEST_ASKED_S or state.attempt_number >= _MOST_TRIES:
            return True
        now = self._moved()
        self.in_a_row = 1 if now > self._best else self.in_a_row + 1
        self._best = max(self._best, now)
        return self.in_a_row >= _TRIES


def _error(state: RetryCallState) -> BaseException:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error
