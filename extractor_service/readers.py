"""The readers of an extraction, each with a cursor of its own: those attached, and those that will surely be back."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from activation_log.order import Shard
from extractor_service.errors import TooManyStreams
from extractor_service.values import ReaderStatus

MAX_READERS = 64
# Releasing this row says that the reader comes no more.
FOR_GOOD = (1 << 63) - 1


@dataclass(eq=False, slots=True)
class Reader:
    """A reader; rows before `released_row` may go. One that comes back has the same `key`, empty if nobody knows."""

    name: str
    released_row: int
    key: str = ""
    is_shard: bool = False
    leaves: bool = False

    @property
    def status(self) -> ReaderStatus:
        """As others see it."""
        return ReaderStatus(reader=self.name, next_row=self.released_row)


@dataclass(slots=True)
class Readers:
    """All readers of one extraction. Those away have until a time on the monotonic clock to come back."""

    _readers: list[Reader] = field(default_factory=list)
    _away: dict[str, tuple[Reader, float]] = field(default_factory=dict)
    _gone: set[str] = field(default_factory=set)  # Keys of shards that have left for good.
    _n_attached: int = 0

    def __bool__(self) -> bool:
        return bool(self._readers)

    def attach(self, name: str, start_row: int, *, shard: str = "") -> Reader:
        """Adds a reader; a name already there gets a number. Raises TooManyStreams.

        Of one that comes back, what it had not released stays so.
        """
        if len(self._readers) >= MAX_READERS:
            raise TooManyStreams(f"{MAX_READERS} readers are attached, the most there can be.", retry_after_s=5.0)
        self._n_attached += 1
        key = shard or name
        away, _ = self._away.pop(key, (None, 0.0))
        self._gone.discard(key)
        name = name or f"reader-{self._n_attached}"
        taken = any(reader.name == name for reader in self._readers)
        reader = Reader(f"{name}#{self._n_attached}" if taken else name, start_row, key, bool(shard))
        if away:
            reader.released_row = min(start_row, away.released_row)
        self._readers.append(reader)
        return reader

    def expect(self, n_shards: int, first_row: int, *, until: float) -> None:
        """All shards will come: rows from `first_row` on wait for them as for those that were there.

        No more than can be attached at once.
        """
        known = {reader.key for reader in self._readers} | self._away.keys() | self._gone
        for index in range(min(n_shards, MAX_READERS)):
            if (key := shard_key(Shard(index, n_shards))) not in known:
                self._keep(Reader(key, first_row, key, is_shard=True), until)

    def detach(self, reader: Reader, *, back_until: float = 0.0) -> None:
        """Removes a reader. One that was cut off, and has a key, is waited for until then."""
        self._readers.remove(reader)
        if reader.leaves or not back_until:
            self._gone |= {reader.key} if reader.is_shard else set()
            return
        if not reader.key:
            return
        if again := next((other for other in self._readers if other.key == reader.key), None):
            again.released_row = min(again.released_row, reader.released_row)
        else:
            self._keep(reader, back_until)

    def dismiss(self, name: str) -> None:
        """One comes no more once it has left, or has left already."""
        if reader := self.named(name):
            reader.leaves = True
        self._away = {key: away for key, away in self._away.items() if away[0].name != name}

    def named(self, name: str) -> Reader | None:
        """The reader with that name."""
        return next((reader for reader in self._readers if reader.name == name), None)

    def released_row(self, default: int) -> int:
        """The row before which every reader has let go; `default` while none is attached."""
        if not self._readers:
            return default
        return min(reader.released_row for reader in self._waited_for())

    def slowest(self) -> tuple[ReaderStatus, ...]:
        """The readers everyone waits for."""
        least = self.released_row(0)
        return tuple(reader.status for reader in self._waited_for() if reader.released_row == least)

    def all_back(self) -> bool:
        """True when nobody is away."""
        return len(self._waited_for()) == len(self._readers)

    def statuses(self) -> tuple[ReaderStatus, ...]:
        """Those attached."""
        return tuple(reader.status for reader in self._readers)

    def _keep(self, reader: Reader, until: float) -> None:
        if len(self._away) >= MAX_READERS:
            del self._away[min(self._away, key=lambda key: self._away[key][1])]
        self._away[reader.key] = reader, until

    def _waited_for(self) -> list[Reader]:
        now = time.monotonic()
        self._away = {key: away for key, away in self._away.items() if away[1] > now}
        return [*self._readers, *(reader for reader, _ in self._away.values())]


def shard_key(shard: Shard) -> str:
    """What a shard's reader is known by, whoever reads it."""
    return f"shard {shard.index} of {shard.count}"
