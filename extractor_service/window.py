"""How far a WINDOW set may grow: a pure decision."""

from __future__ import annotations

from activation_log.manifest import Manifest


def grant_row(manifest: Manifest, *, window_bytes: int, first_kept_row: int) -> int:
    """The row the forward pass may write up to, so that the segments on disk stay within `window_bytes`.

    At least one segment beyond what is kept: a window smaller than a segment would never move.
    """
    segment_bytes = manifest.segment_rows * manifest.row_bytes
    return first_kept_row + max(window_bytes // segment_bytes, 1) * manifest.segment_rows
