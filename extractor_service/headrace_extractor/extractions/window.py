"""A WINDOW set's bounds: how far the forward pass may write, and what goes behind the readers.

Nothing is dropped that a reader has not released; nobody reading for the grace ends the extraction.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from headrace_log import retention
from headrace_log.errors import DiskFull
from headrace_log.index import SegmentIndex, dropped_rows
from headrace_log.manifest import Manifest

# Sealing takes milliseconds; readers must not wait for it longer than they notice.
SEAL_POLL_S = 0.02

logger = logging.getLogger(__name__)


def grant_row(manifest: Manifest, *, window_bytes: int, first_kept_row: int) -> int:
    """The row the forward pass may write up to, so that the segments on disk stay within `window_bytes`.

    At least one segment beyond what is kept: a window smaller than a segment would never move.
    """
    segment_bytes = manifest.segment_rows * manifest.row_bytes
    return first_kept_row + max(window_bytes // segment_bytes, 1) * manifest.segment_rows


class Window:
    """The rows a WINDOW set keeps, and its life without a reader."""

    def __init__(self, folder: Path, *, window_bytes: int, on_abandoned: Callable[[float], Awaitable[None]]) -> None:
        self._folder = folder
        self._window_bytes = window_bytes
        self._on_abandoned = on_abandoned
        self._manifest = Manifest.load(folder)
        self._index = SegmentIndex()
        self._grace: asyncio.Task[None] | None = None
        self.first_kept_row = dropped_rows(folder)

    @property
    def grant_row(self) -> int:
        """The row the forward pass may write up to."""
        return grant_row(self._manifest, window_bytes=self._window_bytes, first_kept_row=self.first_kept_row)

    def make_room(self, released_row: int) -> bool:
        """Drops what every reader has released; False if there was nothing to drop."""
        before = self.first_kept_row
        if released_row - before < self._manifest.segment_rows:
            return False
        try:
            self._index = self._index.refreshed(self._folder)
            self.first_kept_row = retention.drop_before(self._folder, released_row, self._index)
        except DiskFull as exc:  # What goes must be on record first; the next release tries again.
            logger.warning("%s can't let rows go: %s", self._folder, exc)
        return self.first_kept_row > before

    def start_grace(self, grace_s: float) -> None:
        """Calls `on_abandoned` after `grace_s` seconds, unless somebody comes."""
        if self._grace is None:
            self._grace = asyncio.create_task(self._abandon(grace_s), name=f"grace-{self._folder.name}")

    def end_grace(self) -> None:
        """Somebody reads."""
        if self._grace:
            self._grace.cancel()
            self._grace = None

    async def close(self) -> None:
        """Ends the grace without its consequences: the server goes away."""
        if self._grace:
            self._grace.cancel()
            await asyncio.gather(self._grace, return_exceptions=True)

    async def _abandon(self, grace_s: float) -> None:
        await asyncio.sleep(grace_s)
        await self._on_abandoned(grace_s)
