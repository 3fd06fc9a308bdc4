"""Which sets are evicted when space is needed: pure decisions over files on disk and reservations.

The sets of a node stay within a quota, and the disk keeps a reserve. The rows that extractions under way will still
write count as written, so that no two extractions count on the same space. Sets are evicted by least recent use; a set
that is written, read or pinned never is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace_log.index import SegmentIndex
from headrace_log.manifest import Manifest

GB = 10**9
DEFAULT_QUOTA_BYTES = 100 * GB
DEFAULT_IDLE_S = 30 * 86_400.0
# Enough for records and logs of all programs that use the disk; a fiftieth of a small disk.
MAX_RESERVE_BYTES = 1024**3
RESERVE_SHARE = 0.02
# A segment file's header and the page behind its rows.
_PAGES_BYTES = 8192
# Manifest, index, notes and statistics together.
_PAPERS_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of all sets together; 0: no limit. A negative reserve stands for the default reserve."""

    quota_bytes: int = DEFAULT_QUOTA_BYTES
    idle_s: float = DEFAULT_IDLE_S
    reserve_bytes: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The disk that the sets lie on."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSet:
    """A set's folder and its bytes on disk; the promised bytes are 0 unless an extraction of the set is under way."""

    folder: Path
    size_bytes: int = 0
    sealed_bytes: int = 0  # Without the segments being written, which have their full size from the start.
    promised_bytes: int = 0  # Size once the extractions have ended.
    peak_bytes: int = 0  # Largest size on the way there, while the last segment is written.
    last_used: float = 0.0
    idle_s: float = 0.0  # Seconds that a server has run since the last use.
    held: bool = False  # Written, read, or a WINDOW.
    pinned: bool = False

    @property
    def may_go(self) -> bool:
        """True if the set may be evicted."""
        return not self.held and not self.pinned

    @property
    def charged_bytes(self) -> int:
        """Bytes that count for the quota."""
        return max(self.promised_bytes, self.sealed_bytes)

    @property
    def unwritten_bytes(self) -> int:
        """Bytes that the disk will still have to take."""
        return max(self.peak_bytes - self.size_bytes, 0)


def excess_bytes(sets: Sequence[CachedSet], limits: Limits, disk: Disk) -> int:
    """Bytes to evict so that all files and promises fit; 0 if they fit already."""
    return max(_over_quota(sets, limits), _over_disk(sets, limits, disk), 0)


def victims(sets: Iterable[CachedSet], wanted_bytes: int) -> tuple[CachedSet, ...]:
    """The least recently used sets that together have `wanted_bytes`; all that may go if they have less."""
    chosen: list[CachedSet] = []
    missing = wanted_bytes
    for each in sorted((each for each in sets if each.may_go), key=_by_use):
        if missing <= 0:
            break
        chosen.append(each)
        missing -= each.size_bytes
    for each in reversed(list(chosen)):  # A set chosen late may be so large that some before it can stay.
        if missing + each.size_bytes <= 0:
            chosen.remove(each)
            missing += each.size_bytes
    return tuple(chosen)


def unused(sets: Iterable[CachedSet], limits: Limits) -> tuple[CachedSet, ...]:
    """Sets that were not used for longer than the limit, the longest unused first."""
    if not limits.idle_s:
        return ()
    return tuple(sorted((s for s in sets if s.may_go and s.idle_s > limits.idle_s), key=_by_use))


def available_bytes(sets: Sequence[CachedSet], limits: Limits, disk: Disk) -> int:
    """Bytes that a new extraction could take, including the bytes of sets that may be evicted."""
    evictable = sum(each.size_bytes for each in sets if each.may_go)
    space = [evictable - _over_disk(sets, limits, disk)]
    if limits.quota_bytes:
        space.append(sum(each.charged_bytes for each in sets if each.may_go) - _over_quota(sets, limits))
    return max(min(space), 0)


def most_bytes(limits: Limits, disk: Disk) -> int:
    """Bytes of the largest extraction that this node can ever hold."""
    on_disk = disk.total_bytes - reserve_bytes(limits, disk)
    return min(on_disk, limits.quota_bytes) if limits.quota_bytes else on_disk


def reserve_bytes(limits: Limits, disk: Disk) -> int:
    """Bytes of the disk that sets leave free for other programs."""
    if limits.reserve_bytes >= 0:
        return limits.reserve_bytes
    return min(MAX_RESERVE_BYTES, int(disk.total_bytes * RESERVE_SHARE))


def promised(manifest: Manifest, index: SegmentIndex, wants: Sequence[tuple[Sequence[str], int]]) -> tuple[int, int]:
    """Bytes of a set once every `(columns, n_rows)` of `wants` is sealed, and the most bytes on the way there."""
    rows: dict[str, int] = {}  # Rows of each column in the end.
    for columns, n_rows in wants:
        for name in columns:
            rows[name] = max(rows.get(name, index.n_rows([name])), n_rows)
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


def _over_quota(sets: Sequence[CachedSet], limits: Limits) -> int:
    return sum(each.charged_bytes for each in sets) - limits.quota_bytes if limits.quota_bytes else 0


def _over_disk(sets: Sequence[CachedSet], limits: Limits, disk: Disk) -> int:
    to_come = sum(each.unwritten_bytes for each in sets)
    return to_come + reserve_bytes(limits, disk) - disk.free_bytes


def _by_use(each: CachedSet) -> tuple[float, float, str]:
    # The wall clock decides only between sets that were used in the same minute.
    return -each.idle_s, each.last_used, each.folder.name
