"""Compares a document's token ids with those that the model's own tokenizer gives, called as transformers calls it."""

# ruff: noqa: N803 -- capital suffixes are shapes: S tokens of a sequence

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from headrace_extractor.corpora.documents import TokenizedDocuments
from headrace_extractor.corpora.packing import SpecialTokens
from headrace_extractor.corpora.recipe import BY_TOKENIZER, TRUNCATE, Recipe
from headrace_extractor.corpora.tokenizer import SLICE_CHARACTERS, TOKENIZER
from headrace_extractor.errors import ModelUnsupported


class OwnTokens:
    """The tokens of a corpus' documents as transformers' tokenizer of the model gives them."""

    def __init__(self, files_path: Path, documents: TokenizedDocuments, recipe: Recipe, special: SpecialTokens) -> None:
        self._files_path = files_path
        self._documents = documents
        self._recipe = recipe
        self._special = special

    def check(self, document: int, token_ids_S: np.ndarray) -> None:
        """Raises ModelUnsupported unless the document begins with these tokens, as far as the recipe leaves it."""
        # Longer texts are tokenized in slices, and their tokens next to a cut may be others.
        if self._documents.tokenized or len(text := self._documents.text(document)) > SLICE_CHARACTERS:
            return
        found, expected = token_ids_S.tolist(), self._of(text)
        if expected[: len(found)] == found:
            return
        place = next(
            (at for at, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), len(expected)
        )
        raise ModelUnsupported(
            f"The tokens of document {document} are not those that transformers' tokenizer of this model gives for it: "
            f"at position {place} stands {found[place]} and not {expected[place : place + 1]}; tokenize the corpus "
            "yourself and extract from its token ids.",
            metadata={"document": str(document), "position": str(place), "token_id": str(found[place])},
        )

    def _of(self, text: str) -> list[int]:
        """Returns the tokens of a text under the recipe, as far as one sequence holds them where it truncates."""
        recipe, bos_id, eos_id = self._recipe, self._special.bos_id, self._special.eos_id
        whole = recipe.bos == BY_TOKENIZER and not recipe.chat_template
        expected = list(_tokenizer_in(self._files_path)(text, add_special_tokens=whole).input_ids)
        n_suffix = len(self._special.suffix) if whole else 0
        if recipe.long_documents == TRUNCATE and len(expected) > recipe.context_size:  # The suffix stays.
            expected[recipe.context_size - n_suffix : len(expected) - n_suffix] = []
        # What the recipe inserts stands once, also if a chat template or the tokenizer writes it.
        if recipe.bos == "document" and bos_id is not None and not (recipe.chat_template and expected[:1] == [bos_id]):
            expected.insert(0, bos_id)
        ends_so = recipe.chat_template or (whole and n_suffix > 0)
        if recipe.eos == "document" and eos_id is not None and not (ends_so and expected[-1:] == [eos_id]):
            expected.append(eos_id)
        return expected


@lru_cache(maxsize=1)
def _tokenizer_in(files_path: Path) -> Any:
    """Loads a model's tokenizer as transformers does; in its plainest class where the folder names one of its own."""
    try:
        return AutoTokenizer.from_pretrained(files_path, local_files_only=True, trust_remote_code=False)
    except Exception:  # noqa: BLE001 -- of many types: classes that need other packages, or code that is not run
        return PreTrainedTokenizerFast(tokenizer_file=str(files_path / TOKENIZER))
