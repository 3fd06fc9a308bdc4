"""Which sets go when room is wanted: pure decisions over what is on the disk and what is promised.

The sets of a node stay within a quota and the disk keeps a reserve. What extractions under way will still write counts
as if it were there, so that no two of them count on the same room. Sets go by least recent use; one that is written,
read or pinned never does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace_log.index import SegmentIndex
from headrace_log.manifest import Manifest

GB = 10**9
DEFAULT_QUOTA_BYTES = 100 * GB
DEFAULT_IDLE_S = 30 * 86_400.0
# Enough for records and logs of everybody on that disk; on a small one, its fiftieth part.
MAX_RESERVE_BYTES = 1024**3
RESERVE_SHARE = 0.02
# A segment file's header and the page behind its rows.
_PAGES_BYTES = 8192
# Manifest, index, notes and statistics.
_PAPERS_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the sets may take; 0: no limit. A negative reserve stands for the default one."""

    quota_bytes: int = DEFAULT_QUOTA_BYTES
    idle_s: float = DEFAULT_IDLE_S
    reserve_bytes: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The disk the sets are on."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSet:
    """A set's folder. `size_bytes` is what it takes now; the promises are of extractions under way, 0 without."""

    folder: Path
    set_id: str = ""
    size_bytes: int = 0
    sealed_bytes: int = 0  # Without the segments being written, which have their full size from the start.
    promised_bytes: int = 0  # What it will take in the end.
    peak_bytes: int = 0  # The same while its last segment is written.
    last_used: float = 0.0
    held: bool = False  # Written, read, or a WINDOW.
    pinned: bool = False

    @property
    def may_go(self) -> bool:
        """True if nobody needs it."""
        return not self.held and not self.pinned

    @property
    def charged_bytes(self) -> int:
        """What counts for the quota."""
        return max(self.promised_bytes, self.sealed_bytes)

    @property
    def unwritten_bytes(self) -> int:
        """What the disk will still have to take."""
        return max(self.peak_bytes - self.size_bytes, 0)


def excess_bytes(sets: Sequence[CachedSet], limits: Limits, disk: Disk) -> int:
    """Bytes that must go so that everything there and promised fits; 0 if it does."""
    return max(_over_quota(sets, limits), _over_disk(sets, limits, disk), 0)


def victims(sets: Iterable[CachedSet], wanted_bytes: int) -> tuple[CachedSet, ...]:
    """The least recently used sets that together have `wanted_bytes`, none of them in vain; all there are if fewer."""
    chosen: list[CachedSet] = []
    missing = wanted_bytes
    for each in sorted((each for each in sets if each.may_go), key=_by_use):
        if missing <= 0:
            break
        chosen.append(each)
        missing -= each.size_bytes
    for each in reversed(list(chosen)):  # What came last may be large enough to spare some before it.
        if missing + each.size_bytes <= 0:
            chosen.remove(each)
            missing += each.size_bytes
    return tuple(chosen)


def unused(sets: Iterable[CachedSet], limits: Limits, now: float) -> tuple[CachedSet, ...]:
    """Sets nobody has used for longer than the limit, the longest first."""
    if not limits.idle_s:
        return ()
    return tuple(sorted((s for s in sets if s.may_go and now - s.last_used > limits.idle_s), key=_by_use))


def available_bytes(sets: Sequence[CachedSet], limits: Limits, disk: Disk) -> int:
    """Bytes that a new extraction could take, what may be evicted counted."""
    evictable = sum(each.size_bytes for each in sets if each.may_go)
    room = [evictable - _over_disk(sets, limits, disk)]
    if limits.quota_bytes:
        room.append(sum(each.charged_bytes for each in sets if each.may_go) - _over_quota(sets, limits))
    return max(min(room), 0)


def most_bytes(limits: Limits, disk: Disk) -> int:
    """The largest extraction there can ever be here."""
    on_disk = disk.total_bytes - reserve_bytes(limits, disk)
    return min(on_disk, limits.quota_bytes) if limits.quota_bytes else on_disk


def reserve_bytes(limits: Limits, disk: Disk) -> int:
    """What of the disk is left to others."""
    if limits.reserve_bytes >= 0:
        return limits.reserve_bytes
    return min(MAX_RESERVE_BYTES, int(disk.total_bytes * RESERVE_SHARE))


def promised(manifest: Manifest, index: SegmentIndex, wants: Sequence[tuple[Sequence[str], int]]) -> tuple[int, int]:
    """Bytes of a set once every `(columns, n_rows)` of `wants` is there, and at most while it is being made."""
    rows = _rows_in_the_end(index, wants)
    in_the_end = at_most = _PAPERS_BYTES
    for column in manifest.columns:
        there = index.n_rows([column.name])
        n_rows = rows.get(column.name, there)
        n_new = -(-(n_rows - there) // manifest.segment_rows)
        pages_bytes = (n_new + len(index.records)) * _PAGES_BYTES
        in_the_end += n_rows * column.row_bytes + pages_bytes
        # A segment being written has its full size.
        at_most += (there + n_new * manifest.segment_rows) * column.row_bytes + pages_bytes
    return in_the_end, at_most


def _rows_in_the_end(index: SegmentIndex, wants: Sequence[tuple[Sequence[str], int]]) -> Mapping[str, int]:
    rows: dict[str, int] = {}
    for columns, n_rows in wants:
        for name in columns:
            rows[name] = max(rows.get(name, index.n_rows([name])), n_rows)
    return rows


def _over_quota(sets: Sequence[CachedSet], limits: Limits) -> int:
    return sum(each.charged_bytes for each in sets) - limits.quota_bytes if limits.quota_bytes else 0


def _over_disk(sets: Sequence[CachedSet], limits: Limits, disk: Disk) -> int:
    to_come = sum(each.unwritten_bytes for each in sets)
    return to_come + reserve_bytes(limits, disk) - disk.free_bytes


def _by_use(each: CachedSet) -> tuple[float, str]:
    return each.last_used, each.folder.name
