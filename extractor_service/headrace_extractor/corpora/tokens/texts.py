"""Texts of token ids, from tokenizers that child processes hold: a server's memory has no place for them."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace_chassis.confined.limits import Limits
from headrace_chassis.confined.ports import Confinement, Talk
from headrace_chassis.errors import ServiceError
from headrace_extractor.corpora.tokenizer import TOKENIZER, Tokenizer
from headrace_extractor.errors import ModelUnsupported

# Parsing takes a second for a large vocabulary, so the children of the last few models stay.
_KEPT = 2
_LIMITS = Limits(memory_bytes=2 * 1024**3, cpu_s=30, wall_s=30.0, output_bytes=32 * 1024 * 1024)


class TokenTexts:
    """Decodes token ids of models."""

    def __init__(self, confinement: Confinement) -> None:
        self._confinement = confinement
        self._kept: dict[tuple[object, ...], _Decoder] = {}
        # One: children answer one question at a time, and the least recently used of them gives way.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="token-texts")

    async def decode(self, files_path: str, token_ids: Sequence[int]) -> list[str]:
        """Returns the text of each token, as `Tokenizer.decode_each` does; raises its errors and ModelUnsupported."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._decode, files_path, list(token_ids))

    def _decode(self, files_path: str, token_ids: list[int]) -> list[str]:
        try:
            found = (Path(files_path) / TOKENIZER).stat()
            key: tuple[object, ...] = (files_path, found.st_ino, found.st_mtime_ns, found.st_size)
        except OSError:
            key = (files_path,)
        decoder = self._kept.pop(key, None)
        if decoder is None:
            stack = ExitStack()
            opened = self._confinement.open(decode_each, {"files_path": files_path}, refuse=_refuse, limits=_LIMITS)
            decoder = _Decoder(talk=stack.enter_context(opened), stack=stack)
        try:
            texts: list[str] = decoder.talk.ask(token_ids)
        except ServiceError:
            decoder.stack.close()
            raise
        self._kept[key] = decoder
        while len(self._kept) > _KEPT:
            self._kept.pop(next(iter(self._kept))).stack.close()
        return texts


@dataclass(frozen=True, slots=True)
class _Decoder:
    talk: Talk
    stack: ExitStack = field(repr=False)


def decode_each(files_path: str) -> Generator[Any, Any, None]:
    """Answers each list of token ids with their texts."""
    tokenizer = Tokenizer.load(files_path)
    token_ids = yield None
    while True:
        token_ids = yield tokenizer.decode_each(token_ids)


def _refuse(why: str) -> ModelUnsupported:
    return ModelUnsupported(f"The model's {TOKENIZER} {why}; take it from the model's own repo.")
