"""Tokenizers that a child process has loaded within its limits: a runner loads no other."""

from __future__ import annotations

from pathlib import Path

from headrace_chassis.confined.limits import Limits
from headrace_chassis.confined.ports import Confinement
from headrace_extractor.corpora.tokenizer import TOKENIZER, prove_loading
from headrace_extractor.errors import ModelUnsupported
from headrace_extractor.models import ModelInfo

_MAX_KEPT = 256
# The tokenizers of the largest vocabularies take half a gigabyte and three seconds.
_LIMITS = Limits(memory_bytes=2 * 1024**3, cpu_s=20, wall_s=60.0)


class ProvenTokenizers:
    """Remembers which versions of which files were loaded."""

    def __init__(self, confinement: Confinement) -> None:
        self._confinement = confinement
        self._proven: dict[str, tuple[int, ...]] = {}

    async def prove(self, model: ModelInfo) -> None:
        """Raises ModelUnsupported for a tokenizer that can't be loaded, or takes too much to load."""
        try:
            found = (Path(model.files_path) / TOKENIZER).stat()
        except OSError:
            return
        stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
        if self._proven.get(model.files_path) == stamp:
            return

        def refuse(why: str) -> ModelUnsupported:
            return ModelUnsupported(f"{TOKENIZER} of model {model.id} {why}; take it from the model's own repo.")

        job = {"files_path": model.files_path}
        await self._confinement.call(prove_loading, job, refuse=refuse, limits=_LIMITS)
        self._proven[model.files_path] = stamp
        while len(self._proven) > _MAX_KEPT:
            self._proven.pop(next(iter(self._proven)))
