"""Runs the same functions without a child and without limits, for tools and tests, whose bytes come from themselves."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from headrace_chassis.confined.limits import Limits
from headrace_chassis.confined.ports import DEFAULT_LIMITS, Refuse
from headrace_chassis.errors import ServiceError


class InProcess:
    """Implements Confinement in this process."""

    @contextmanager
    def open(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        refuse: Refuse,
        files: Sequence[int] = (),
        limits: Limits = DEFAULT_LIMITS,  # noqa: ARG002 -- a child's
    ) -> Iterator[OwnTalk]:
        """Yields a conversation with the generator."""
        steps = function(*files, **arguments)
        try:
            yield OwnTalk(steps, refuse)
        finally:
            steps.close()

    def run(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        refuse: Refuse,
        files: Sequence[int] = (),
        limits: Limits = DEFAULT_LIMITS,  # noqa: ARG002 -- a child's
    ) -> Any:
        """Returns the answer of `function(*files, **arguments)`."""
        try:
            result = function(*files, **arguments)
        except ServiceError:
            raise
        except Exception as exc:
            raise _refused(refuse, exc) from exc
        if not inspect.isgenerator(result):
            return result
        talk = OwnTalk(result, refuse)
        for _ in talk:
            pass
        return talk.answer

    async def call(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        refuse: Refuse,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Any:
        """Returns the answer of `function(**arguments)`, from a thread."""
        return await asyncio.to_thread(self.run, function, arguments, refuse=refuse, limits=limits)


class OwnTalk:
    """A conversation with a generator of this process. Without `refuse`, exceptions stay as they are."""

    def __init__(self, steps: Any, refuse: Refuse | None = None) -> None:
        self._steps = steps
        self._refuse = refuse
        self._begun = False
        self.answer: Any = None

    def __iter__(self) -> Iterator[Any]:
        """Yields the items, with None as the reply to each."""
        while True:
            try:
                item = self._next(None)
            except StopIteration as exc:
                self.answer = exc.value
                return
            yield item

    def ask(self, question: Any) -> Any:
        """Sends a reply and returns the next item. The first item of the generator is skipped."""
        if not self._begun:
            self._next(None)
        return self._next(question)

    def _next(self, reply: Any) -> Any:
        self._begun = True
        try:
            return self._steps.send(reply)
        except (ServiceError, StopIteration):
            raise
        except Exception as exc:
            if self._refuse is None:
                raise
            raise _refused(self._refuse, exc) from exc


def _refused(refuse: Refuse, exc: Exception) -> ServiceError:
    return refuse(f"can't be read: {type(exc).__name__}: {exc}")


IN_PROCESS = InProcess()
