"""How work on model files tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

OnProgress = Callable[[int, int], None]  # bytes done, bytes in all


@contextmanager
def bar_watched(module: ModuleType, on_done: OnProgress, size_of: Callable[[Any], int] = lambda _: 1) -> Iterator[None]:
    """Calls `on_done` after each item of a loop in a module of transformers, with the sizes done and in all.

    transformers has no callback for it, but shows a bar, `module.tqdm`, which is replaced during the block.
    """
    shown = module.tqdm

    def counted(items: Collection[Any], **_options: Any) -> Iterator[Any]:
        done, total = 0, sum(size_of(item) for item in items)
        for item in items:
            yield item
            done += size_of(item)
            on_done(done, total)

    module.tqdm = counted
    try:
        yield
    finally:
        module.tqdm = shown
