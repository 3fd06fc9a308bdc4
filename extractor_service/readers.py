"""The readers attached to an extraction, each with a cursor of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from extractor_service.errors import TooManyStreams
from extractor_service.values import ReaderStatus

MAX_READERS = 64


@dataclass(eq=False, slots=True)
class Reader:
    """An attached reader; rows before `released_row` may go."""

    name: str
    released_row: int

    @property
    def status(self) -> ReaderStatus:
        """As others see it."""
        return ReaderStatus(reader=self.name, next_row=self.released_row)


@dataclass(slots=True)
class Readers:
    """All readers of one extraction."""

    _readers: list[Reader] = field(default_factory=list)
    _n_attached: int = 0

    def __bool__(self) -> bool:
        return bool(self._readers)

    def attach(self, name: str, start_row: int) -> Reader:
        """Adds a reader; a name already there gets a number. Raises TooManyStreams."""
        if len(self._readers) >= MAX_READERS:
            raise TooManyStreams(f"{MAX_READERS} readers are attached, the most there can be.", retry_after_s=5.0)
        self._n_attached += 1
        name = name or f"reader-{self._n_attached}"
        taken = any(reader.name == name for reader in self._readers)
        reader = Reader(f"{name}#{self._n_attached}" if taken else name, start_row)
        self._readers.append(reader)
        return reader

    def detach(self, reader: Reader) -> None:
        """Removes a reader."""
        self._readers.remove(reader)

    def named(self, name: str) -> Reader | None:
        """The reader with that name."""
        return next((reader for reader in self._readers if reader.name == name), None)

    def released_row(self, default: int) -> int:
        """The row before which every reader has let go; `default` without readers."""
        return min((reader.released_row for reader in self._readers), default=default)

    def slowest(self) -> tuple[ReaderStatus, ...]:
        """The readers everyone waits for."""
        least = self.released_row(0)
        return tuple(reader.status for reader in self._readers if reader.released_row == least)

    def statuses(self) -> tuple[ReaderStatus, ...]:
        """All of them."""
        return tuple(reader.status for reader in self._readers)
