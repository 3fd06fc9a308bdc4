"""The port to confinement, and a conversation with a confined function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

from headrace_chassis.confined.limits import Limits
from headrace_chassis.errors import ServiceError

# Makes an error of the end of a sentence, such as "takes more than 512 MiB of memory to read".
Refuse: TypeAlias = Callable[[str], ServiceError]

DEFAULT_LIMITS = Limits()


class Talk(Protocol):
    """A conversation with a generator: it yields items, each is replied to, and at last it has an answer."""

    answer: Any

    def __iter__(self) -> Iterator[Any]:
        """Yields the items, with None as the reply to each."""
        ...

    def ask(self, question: Any) -> Any:
        """Sends a reply and returns the next item. The first item of the generator is skipped."""
        ...


class Confinement(Protocol):
    """Runs functions that read bytes from outside; `Confined` in children, `InProcess` in this process."""

    def open(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        refuse: Refuse,
        files: Sequence[int] = (),
        limits: Limits = DEFAULT_LIMITS,
    ) -> AbstractContextManager[Talk]:
        """Starts `function(*files, **arguments)`, a generator function, for a conversation."""
        ...

    def run(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        refuse: Refuse,
        files: Sequence[int] = (),
        limits: Limits = DEFAULT_LIMITS,
    ) -> Any:
        """Returns the answer of `function(*files, **arguments)`. Blocks."""
        ...

    async def call(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        refuse: Refuse,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Any:
        """Returns the answer of `function(**arguments)`."""
        ...
