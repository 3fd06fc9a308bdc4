"""How pieces of work in a runner tell how far they are."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int], None]  # bytes done, bytes in all
