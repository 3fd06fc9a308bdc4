"""A model's tokenizer, over the `tokenizers` library alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from extractor_service.packing import Int32Array, SpecialTokens


class Tokenizer:
    """Text to token ids and back. No special tokens are added; such tokens written out in a text are recognised."""

    special: SpecialTokens
    vocab_size: int  # token ids are below it: `vocab_size` of config.json, else the tokenizer's own
    digest: str  # sha256 of tokenizer.json, hex

    @classmethod
    def load(cls, files_path: Path | str) -> Self:
        """Reads the tokenizer in a model's folder; raises ModelUnsupported when there is none."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        """Returns each text's own token ids."""
        raise NotImplementedError

    def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """Returns the text of each token by itself."""
        raise NotImplementedError
