"""Which positions of a document become rows, and what becomes of long documents."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from headrace_client.errors import InvalidArgument

_MAX_POSITION = 2**31 - 1


class LongDocuments(StrEnum):
    """What happens to a document that exceeds a sequence."""

    SPLIT = "split"
    TRUNCATE = "truncate"


@dataclass(frozen=True, slots=True)
class TokenWindow:
    """Positions from `start` to before `end` of each document become rows, inserted tokens counted.

    Negative numbers count from the end of what the model is given of the document, an `end` of 0 is that end:
    `TokenWindow(-1)` is the last position.
    """

    start: int = 0
    end: int = 0

    def __post_init__(self) -> None:
        if not all(type(value) is int and abs(value) <= _MAX_POSITION for value in (self.start, self.end)):
            raise InvalidArgument(
                f"a window goes from one integer of 32 bits to another, not from {self.start!r} to {self.end!r}",
                fields={"window": "start and end"},
            )

    @classmethod
    def parse(cls, text: str) -> TokenWindow:
        """Reads `START:END`, either of which may be empty, as in a slice; raises InvalidArgument."""
        start, colon, end = text.partition(":")
        try:
            if colon:
                return cls(int(start or 0), int(end or 0))
        except ValueError:
            pass
        raise InvalidArgument(f"a window is START:END, such as -1: or 0:16, not {text!r}", fields={"window": text})
