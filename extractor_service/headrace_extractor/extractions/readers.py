"""The readers of an extraction, each with its own cursor: attached readers, and readers that are expected back."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from headrace_extractor.errors import TooManyStreams
from headrace_extractor.extractions.values import ReaderStatus
from headrace_log.order import Shard

MAX_READERS = 64
# A reader that releases up to this row will not come back.
FOR_GOOD = (1 << 63) - 1


@dataclass(eq=False, slots=True)
class Reader:
    """A reader, which has released the rows before `released_row`.

    A reader that reconnects has the `key` it had before; an empty key can't be recognized. The reader is done once it
    has released `last_row`, which is known when the end of the stream was sent.
    """

    name: str
    released_row: int
    key: str = ""
    is_shard: bool = False
    has_released: bool = False
    last_row: int = FOR_GOOD

    @property
    def is_done(self) -> bool:
        """True when it needs no more rows."""
        return self.released_row >= self.last_row

    @property
    def status(self) -> ReaderStatus:
        """The reader as clients see it."""
        return ReaderStatus(reader=self.name, next_row=self.released_row)


@dataclass(slots=True)
class Readers:
    """All readers of one extraction. A reader that is away has until a time on the monotonic clock to come back."""

    _readers: list[Reader] = field(default_factory=list)
    _away: dict[str, tuple[Reader, float]] = field(default_factory=dict)
    _gone: set[str] = field(default_factory=set)  # Keys of shards that have left for good.
    _n_attached: int = 0

    def __bool__(self) -> bool:
        return bool(self._readers)

    def attach(self, name: str, start_row: int, *, shard: str = "") -> Reader:
        """Adds a reader; a name that is in use gets a number. Raises TooManyStreams.

        A reader that reconnects keeps its unreleased rows.
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
        """Holds rows from `first_row` on for shards that have not attached yet, up to the most readers there can be."""
        known = {reader.key for reader in self._readers} | self._away.keys() | self._gone
        for index in range(min(n_shards, MAX_READERS)):
            if (key := shard_key(Shard(index, n_shards))) not in known:
                self._keep(Reader(key, first_row, key, is_shard=True), until)

    def detach(self, reader: Reader, *, back_until: float = 0.0) -> None:
        """Removes a reader. If it has unreleased rows and a key, they are held for it until `back_until`."""
        self._readers.remove(reader)
        if reader.is_done or not back_until:
            self._leave(reader)
        elif again := next((other for other in self._readers if reader.key and other.key == reader.key), None):
            if not again.has_released:  # Else its new connection has told which rows it still needs.
                again.released_row = min(again.released_row, reader.released_row)
        elif reader.key:
            self._keep(reader, back_until)

    def release(self, name: str, row: int, *, until: float) -> None:
        """Notes that the reader called `name`, attached or away, has released rows before `row`; FOR_GOOD: all rows.

        A reader that is away still works on rows that it was sent before: it has until `until` to come back.
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
        """The row before which every reader has released its rows; `default` while none is attached."""
        if not self._readers:
            return default
        return min(reader.released_row for reader in self._waited_for())

    def slowest(self) -> tuple[ReaderStatus, ...]:
        """The readers with the smallest released row, for which the forward pass waits."""
        least = self.released_row(0)
        return tuple(reader.status for reader in self._waited_for() if reader.released_row == least)

    def all_back(self) -> bool:
        """True when no reader is away."""
        return len(self._waited_for()) == len(self._readers)

    def statuses(self) -> tuple[ReaderStatus, ...]:
        """The attached readers."""
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
    """The key of a shard's reader, whichever client reads it."""
    return f"shard {shard.index} of {shard.count}"
