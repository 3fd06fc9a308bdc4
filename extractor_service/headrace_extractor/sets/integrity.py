"""Whether a set's files are as they were sealed: digests, compared once, and again after a file has changed.

A segment that an extraction of this server sealed counts as compared. Damage is taken out of the set (`repair.py` of
the log): at once, or before the next pass while a writer is at work. Until then `visible` leaves it out.
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path

from headrace_log import repair
from headrace_log.errors import DigestMismatch, LockHeld, LogError
from headrace_log.index import SegmentIndex, SegmentRecord, dropped_rows
from headrace_log.layout import ColumnSpec, segment_path
from headrace_log.manifest import Manifest
from headrace_log.segment import DATA_OFFSET
from headrace_log.segment_file import Stamp, check_sealed, stamp_of

# Compared before an extraction is answered from rows on disk: some four seconds of one core. Rows beyond are compared
# when they are first read.
EAGER_BYTES = 4 * 1024**3

logger = logging.getLogger(__name__)


class Integrity:
    """What is known of one set's files. Methods may be called from any thread."""

    def __init__(self, folder: Path, closing: threading.Event) -> None:
        self.n_mended = 0  # How often damage was taken out of the set: files opened before may be other ones since.
        self._folder = folder
        self._closing = closing
        # By column, a word for each segment: its file and its record when they were compared, 0 if they never were. A
        # set of a terabyte has hundreds of thousands of files.
        self._compared: dict[str, array[int]] = {}
        # By segment and column, the stamp of the damaged file, None without one: another file in its place is none.
        self._damaged: dict[tuple[int, str], Stamp | None] = {}
        self._n_trusted: int | None = None  # Segments of an index that is cut there; None: all of them.
        self._unreadable = False
        self._lock = threading.Lock()

    def knows(self, record: SegmentRecord, columns: Sequence[ColumnSpec], stamps: Sequence[Stamp]) -> bool:
        """True if these files of a segment were compared with their digests and have not changed since."""
        return all(
            self._known(column.name, record.segment) == _word(stamp, record, column)
            for column, stamp in zip(columns, stamps, strict=True)
        )

    def trust(self, manifest: Manifest, before: SegmentIndex, index: SegmentIndex) -> None:
        """Takes segments for compared that were sealed since `before`."""
        for record in index.records[_first_new(before, index) :]:
            old = before.records[record.segment].digests if record.segment < len(before.records) else {}
            for column in manifest.columns:
                if column.name in record.digests and column.name not in old:
                    stamp = self._stamp(column, record.segment)
                    if stamp is None:  # Dropped meanwhile, or gone: whoever reads it next finds out.
                        continue
                    self._note(column, record, stamp)
                    with self._lock:  # A look at an older record may have missed the file before it was sealed.
                        self._damaged.pop((record.segment, column.name), None)

    def check(self, manifest: Manifest, record: SegmentRecord, columns: Sequence[ColumnSpec]) -> None:
        """Compares files of a segment with their digests. Raises DigestMismatch after it has noted what is damaged."""
        first: DigestMismatch | None = None
        for column in columns:
            stamp = self._stamp(column, record.segment)
            try:
                self._note(column, record, check_sealed(self._folder, column, record))
            except DigestMismatch as exc:
                if dropped_rows(self._folder) >= record.end_row:
                    return  # A WINDOW set has dropped the segment meanwhile.
                logger.error("%s", exc)  # noqa: TRY400 -- no bug: the message says it all
                first = first or exc
                self._note_damage(manifest, record, column, stamp)
        if first:
            self.try_to_mend()
            raise first

    def look_for_damage(self, manifest: Manifest, index: SegmentIndex, columns: Sequence[str], n_rows: int) -> None:
        """Looks for damage in the first `n_rows` rows (0: all) of columns, so that a pass can compute them again.

        Every file must be there with its size; the first `EAGER_BYTES` that are not known are compared byte by byte.
        """
        specs, bytes_left = [manifest.column(name) for name in columns], EAGER_BYTES
        for record in index.records[index.n_before(dropped_rows(self._folder)) :]:
            if (n_rows and record.first_row >= n_rows) or self._closing.is_set():
                break
            for column in (each for each in specs if each.name in record.digests):
                n_bytes = record.n_rows * column.row_bytes
                if self._looks_whole(record, column, by_size=bytes_left < n_bytes):
                    continue
                stamp = self._stamp(column, record.segment)
                try:
                    self._note(column, record, check_sealed(self._folder, column, record))
                except DigestMismatch as exc:
                    if dropped_rows(self._folder) < record.end_row:
                        logger.warning("%s", exc)
                        self._note_damage(manifest, record, column, stamp)
                bytes_left -= n_bytes
        self.try_to_mend()

    def _looks_whole(self, record: SegmentRecord, column: ColumnSpec, *, by_size: bool) -> bool:
        """True if a file is known to be whole; `by_size`: or has its size, and the rest is left to its first reader."""
        stamp = self._stamp(column, record.segment)
        if stamp is None:
            return False
        if self._known(column.name, record.segment) == _word(stamp, record, column):
            return True
        return by_size and stamp.size_bytes == DATA_OFFSET + record.n_rows * column.row_bytes

    @property
    def is_damaged(self) -> bool:
        """True while damage was noted and not yet taken out of the set."""
        return bool(self._damaged) or self.is_index_damaged

    @property
    def is_index_damaged(self) -> bool:
        """True while damage of the index itself was noted and not yet taken out of the set."""
        return self._unreadable or self._n_trusted is not None

    def damaged(self) -> Sequence[tuple[int, str]]:
        """The segments, by number and column, that were found damaged and are not yet taken out of the set."""
        with self._lock:
            return sorted(self._damaged)

    def note_unreadable_index(self) -> None:
        """Notes that the index has a line that can't be read."""
        self._unreadable = True

    def visible(self, index: SegmentIndex) -> SegmentIndex:
        """The index without the damage that was noted and not yet taken out of the set."""
        with self._lock:
            visible = index if self._n_trusted is None else index.cut(self._n_trusted)
            return visible.without(self._damaged.keys())

    def mend(self) -> None:
        """Takes the damage out of the set; its rows are then missing. Raises LockHeld while the set is written."""
        with self._lock:
            if not self.is_damaged:
                return
            manifest = Manifest.load(self._folder)
            for (segment, name), stamp in list(self._damaged.items()):
                if self._stamp(manifest.column(name), segment) != stamp:  # Computed anew since.
                    del self._damaged[segment, name]
            if not self.is_damaged:
                return
            repair.set_aside(self._folder, self._damaged.keys(), n_segments=self._n_trusted)
            logger.warning("damaged segments of %s were set aside; the next extraction computes them", self._folder)
            for segment, name in self._damaged:
                self._compared[name][segment : segment + 1] = array("Q", [0])
            self._damaged, self._n_trusted, self._unreadable = {}, None, False
            self.n_mended += 1

    def try_to_mend(self) -> None:
        """As `mend`; while the set is written, or can't be written, the damage is only noted."""
        try:
            self.mend()
        except LockHeld as exc:
            logger.info("damage in %s stays until its writer ends: %s", self._folder, exc)
        except (LogError, OSError) as exc:  # A full or read-only disk, or one without locks.
            logger.warning("damage in %s is left out, and can't be taken out of the set: %s", self._folder, exc)

    def _stamp(self, column: ColumnSpec, segment: int) -> Stamp | None:
        try:
            return stamp_of(segment_path(self._folder, column, segment))
        except OSError:
            return None

    def _known(self, column: str, segment: int) -> int:
        words = self._compared.get(column)
        return words[segment] if words is not None and segment < len(words) else 0

    def _note(self, column: ColumnSpec, record: SegmentRecord, stamp: Stamp) -> None:
        with self._lock:
            words = self._compared.setdefault(column.name, array("Q"))
            if record.segment >= len(words):
                words.extend([0] * (record.segment + 1 - len(words)))
            words[record.segment] = _word(stamp, record, column)

    def _note_damage(self, manifest: Manifest, record: SegmentRecord, column: ColumnSpec, stamp: Stamp | None) -> None:
        """Notes that a file is damaged that had this stamp before it was compared.

        A record that all files of its segment contradict is at fault itself: the index is cut there.
        """
        misrecorded = repair.is_misrecorded(self._folder, manifest, record)
        with self._lock:
            self._compared.setdefault(column.name, array("Q"))
            if misrecorded:
                self._n_trusted = min(each for each in (record.segment, self._n_trusted) if each is not None)
            else:
                self._damaged[record.segment, column.name] = stamp


def _first_new(before: SegmentIndex, index: SegmentIndex) -> int:
    """The first segment that has more columns than before, or did not exist."""
    for at, (old, new) in enumerate(zip(before.records, index.records, strict=False)):
        if old is not new and old.digests.keys() != new.digests.keys():
            return at
    return len(before.records)


def _word(stamp: Stamp, record: SegmentRecord, column: ColumnSpec) -> int:
    """A word that changes with the file, and with the record that it was compared with; never 0."""
    return hash((stamp, record.first_row, record.n_rows, record.digests[column.name])) & 0xFFFF_FFFF_FFFF_FFFF or 1
