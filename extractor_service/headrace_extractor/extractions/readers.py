"""The readers of an extraction, each with a cursor of its own: those attached, and those that will surely be back."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from headrace_extractor.errors import TooManyStreams
from headrace_extractor.extractions.values import ReaderStatus
from headrace_log.order import Shard

MAX_READERS = 64
# Releasing this row says that the reader comes no more.
FOR_GOOD = (1 << 63) - 1


@dataclass(eq=False, slots=True)
class Reader:
    """A reader; rows before `released_row` may go. One that comes back has the same `key`, empty if nobody knows.

    It is done with once it has released `last_row`, which is known when it was sent its end.
    """

    name: str
    released_row: int
    key: str = ""
    is_shard: bool = False
    has_released: bool = False
    last_row: int = FOR_GOOD

    @property
    def is_done(self) -> bool:
        """True when it needs no row any more."""
        return self.released_row >= self.last_row

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
        """Removes a reader. One that has rows to release, and a key, is waited for until then."""
        self._readers.remove(reader)
        if reader.is_done or not back_until:
            self._leave(reader)
        elif again := next((other for other in self._readers if reader.key and other.key == reader.key), None):
            if not again.has_released:  # What it has said since holds.
                again.released_row = min(again.released_row, reader.released_row)
        elif reader.key:
            self._keep(reader, back_until)

    def release(self, name: str, row: int, *, until: float) -> None:
        """Lets rows before `row` go for the reader of that name, attached or away; FOR_GOOD: it needs no more rows.

        One that is away is alive all the same, with rows that it was sent before: it has until then to come back.
        """
        reader = next((reader for reader in self._readers if reader.name == name), None)
        away = None if reader else next((each for each, _ in self._away.values() if each.name == name), None)
        if not (found := reader or away):
            return
        if row == FOR_GOOD:
            found.last_row = 0
        else:
            found.released_row, found.has_released = max(found.released_row, row), True
        if away:
            del self._away[away.key]
            if away.is_done:
                self._leave(away)
            else:
                self._keep(away, until)

    def _leave(self, reader: Reader) -> None:
        if reader.is_shard:
            self._gone.add(reader.key)

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
