"""Tries again what may be gone in a moment: three tries in a row that bring no byte are enough."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception

from headrace_registry.hub.faults import is_transient, retry_after_s, summary

T = TypeVar("T")

_TRIES = 3
# However often bytes come in between: a hub that cuts every connection early is not worth more.
_MOST_TRIES = 100
_LONGEST_WAIT_S = 60.0
# A hub that asks for more patience than this is better tried by a person later.
_LONGEST_ASKED_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How to try again. `on_wait` hears why and for how long, before each wait."""

    backoff_s: float
    on_wait: Callable[[str, float], None]

    def call(self, work: Callable[[], T], *, moved: Callable[[], int] = lambda: 0) -> T:
        """Returns what `work` returns in the end; `moved` counts the bytes so far. Raises its last error."""
        failures = _Failures(moved)
        retrying = Retrying(
            retry=retry_if_exception(is_transient),
            stop=failures.enough,
            wait=lambda state: self._wait_s(state, failures.in_a_row),
            before_sleep=self._tell,
            reraise=True,
        )
        return retrying(work)

    def _wait_s(self, state: RetryCallState, in_a_row: int) -> float:
        """What the hub asked for; else twice as long after each failure in a row, and not all at the same moment."""
        asked_s = retry_after_s(_error(state))
        waited_s = min(self.backoff_s * 2 ** (in_a_row - 1), _LONGEST_WAIT_S)
        return asked_s or random.uniform(waited_s, 1.5 * waited_s)  # noqa: S311 - nothing secret.

    def _tell(self, state: RetryCallState) -> None:
        wait_s = state.next_action.sleep if state.next_action is not None else 0.0
        self.on_wait(summary(_error(state)), wait_s)


class _Failures:
    """Counts tries in a row that brought no byte."""

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
