"""The bounds of a WINDOW set: how far the forward pass may write, and which rows are dropped behind the readers.

A row is dropped only after every reader has released it. A window that no reader reads for its grace is freed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from headrace_extractor.errors import DiskFull
from headrace_extractor.sets.activation_set import ActivationSet
from headrace_log.manifest import Manifest

# Sealing takes milliseconds; readers must not wait for it longer than they notice.
SEAL_POLL_S = 0.02

logger = logging.getLogger(__name__)


def grant_row(manifest: Manifest, *, window_bytes: int, first_kept_row: int) -> int:
    """The row the forward pass may write up to, so that the segments on disk stay within `window_bytes`.

    At least one segment beyond the rows that are kept: a window smaller than a segment would never move.
    """
    segment_bytes = manifest.segment_rows * manifest.row_bytes
    return first_kept_row + max(window_bytes // segment_bytes, 1) * manifest.segment_rows


class Window:
    """The rows that a WINDOW set keeps, and the time that it may be without a reader."""

    def __init__(
        self, of: ActivationSet, *, window_bytes: int, on_abandoned: Callable[[float], Awaitable[None]]
    ) -> None:
        self.first_kept_row = of.first_kept_row()
        self._set = of
        self._window_bytes = window_bytes
        self._on_abandoned = on_abandoned
        self._manifest = of.manifest()  # Columns and segment size of a window never change.
        self._grace: asyncio.Task[None] | None = None

    @property
    def grant_row(self) -> int:
        """The row the forward pass may write up to."""
        return grant_row(self._manifest, window_bytes=self._window_bytes, first_kept_row=self.first_kept_row)

    def drop_released(self, released_row: int) -> bool:
        """Drops the segments before `released_row`, which every reader has released; False if there were none."""
        before = self.first_kept_row
        if released_row - before < self._manifest.segment_rows:
            return False
        try:
            self.first_kept_row = self._set.drop_before(released_row)
        except DiskFull as exc:  # A drop must be on record before files are removed; the next release tries again.
            logger.warning("rows of %s can't be dropped: %s", self._set.folder, exc)
        except FileNotFoundError:  # The window was freed.
            return False
        return self.first_kept_row > before

    def start_grace(self, grace_s: float) -> None:
        """Calls `on_abandoned` after `grace_s` seconds, unless `end_grace` comes first."""
        if self._grace is None:
            self._grace = asyncio.create_task(self._abandon(grace_s), name=f"grace-{self._set.folder.name}")

    def end_grace(self) -> None:
        """A reader has come: the window stays."""
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
