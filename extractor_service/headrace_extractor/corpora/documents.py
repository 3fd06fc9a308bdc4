"""Turns the documents of a corpus into token ids, as the packer reads them."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from headrace_chassis.confined.in_process import IN_PROCESS
from headrace_chassis.confined.ports import Confinement
from headrace_extractor.corpora.chat_template import ChatTemplate, check_chat
from headrace_extractor.corpora.packing import Int32Array, SpecialTokens
from headrace_extractor.corpora.reader import DocumentReader
from headrace_extractor.corpora.recipe import BY_TOKENIZER, Recipe
from headrace_extractor.corpora.spec import DocumentKind
from headrace_extractor.corpora.tokenizer import Tokenizer, TokenizerFailed
from headrace_extractor.errors import CorpusMalformed, ModelUnsupported

logger = logging.getLogger(__name__)

BLOCK_DOCUMENTS = 64  # The tokenizer works on several documents in parallel.
BLOCK_BYTES = 256 * 1024  # The tokenizer needs a hundred bytes of memory for each token.
_SNIPPET_CHARACTERS = 60
_NOTHING = SpecialTokens()
_NO_TOKENS = np.zeros(0, dtype=np.int32)
_USUAL = Recipe()


def open_documents(
    reader: DocumentReader, files_path: Path | str, recipe: Recipe, confinement: Confinement = IN_PROCESS
) -> tuple[TokenizedDocuments, SpecialTokens]:
    """Returns a corpus as token ids of the model in `files_path`, and that model's special tokens.

    Raises FieldInvalid if the recipe asks for a chat template and the corpus holds no conversations, or the reverse,
    and ModelUnsupported if the model lacks the tokenizer or the chat template. The template, a program, runs under
    `confinement`, which ends its child.
    """
    is_chat = reader.kind == DocumentKind.CHAT
    check_chat(recipe, corpus_id=reader.corpus.id, is_chat=is_chat)
    tokenizer = Tokenizer.load(files_path, ids_only=reader.tokenized)
    special, by_tokenizer = tokenizer.special, recipe.bos == BY_TOKENIZER
    if by_tokenizer and (largest := max((*special.prefix, *special.suffix), default=0)) >= tokenizer.vocab_size:
        raise ModelUnsupported(
            f"The tokenizer puts token id {largest} around each text, and the model's end before"
            f" {tokenizer.vocab_size}; set spec.recipe.bos to document or none.",
            metadata={"token_id": str(largest)},
        )
    if not is_chat:
        return TokenizedDocuments(reader, tokenizer, recipe), special
    template = ChatTemplate.load(files_path)
    # As in transformers, the template decides alone what surrounds a conversation.
    written = replace(special, written=True) if by_tokenizer else special
    return ChatDocuments(reader, tokenizer, template, recipe, confinement), written


class TokenizedDocuments:
    """Tokenizes a corpus while it is read, or passes its token ids through; not for several threads at once.

    A document's tokens depend on that document alone, not on the order of reading. A document that the tokenizer fails
    on, or with a token id beyond the model's, raises CorpusMalformed; if the recipe skips bad documents, it counts as
    empty. Documents beyond the recipe's `max_documents` are not there. Where the tokenizer's own special tokens are
    inserted, a document of token ids that begins or ends with them is read without them.
    """

    def __init__(self, reader: DocumentReader, tokenizer: Tokenizer, recipe: Recipe = _USUAL) -> None:
        self._reader = reader
        self._tokenizer = tokenizer
        inserts_all = reader.tokenized and recipe.bos == BY_TOKENIZER
        self._around = tokenizer.special if inserts_all else _NOTHING
        self._skip_bad = recipe.skip_bad_documents
        self._n_documents = min(len(reader), recipe.max_documents or len(reader))
        self._block_start = 0
        self._block: list[Int32Array | CorpusMalformed] = []
        self._skipped: list[int] = []  # in order

    def __len__(self) -> int:
        return self._n_documents

    def __getitem__(self, index: int, /) -> Int32Array:
        """Returns a document's own token ids, to be read only."""
        try:
            return self._document(index)
        except CorpusMalformed as exc:
            if not self._skip_bad:
                raise
            logger.debug("skipped: %s", exc.message)
            if self.n_skipped_before(index + 1) == self.n_skipped_before(index):
                bisect.insort(self._skipped, index)
            return _NO_TOKENS

    def n_skipped_before(self, index: int) -> int:
        """Returns how many of the documents read so far and before `index` were skipped."""
        return bisect.bisect_left(self._skipped, index)

    def _document(self, index: int) -> Int32Array:
        if self._reader.tokenized:
            own = self._checked(self._reader.token_ids(index), index)
            prefix, suffix = self._around.prefix, self._around.suffix
            if prefix and tuple(own[: len(prefix)]) == prefix:
                own = own[len(prefix) :]
            return own[: -len(suffix)] if suffix and tuple(own[-len(suffix) :]) == suffix else own
        if not 0 <= index - self._block_start < len(self._block):
            self._read_block(index)
        found = self._block[index - self._block_start]
        if isinstance(found, CorpusMalformed):
            raise found
        return self._checked(found, index)

    def _read_block(self, start: int) -> None:
        """Tokenizes a document together with the next few: reading is mostly sequential."""
        self._block, self._block_start = [], start
        texts = [self._text_or_error(start)]
        size = self._reader.size_bytes(start)
        for index in range(start + 1, min(start + BLOCK_DOCUMENTS, self._n_documents)):
            size += self._reader.size_bytes(index)
            if size > BLOCK_BYTES:
                break
            texts.append(self._text_or_error(index))
        good = [text for text in texts if isinstance(text, str)]
        try:
            encoded: Iterator[Int32Array | CorpusMalformed] = iter(self._tokenizer.encode_batch(good))
        except TokenizerFailed:  # On one of them: each by itself tells on which.
            encoded = (
                self._encoded(text, start + number) for number, text in enumerate(texts) if isinstance(text, str)
            )
        self._block = [next(encoded) if isinstance(text, str) else text for text in texts]

    def _encoded(self, text: str, index: int) -> Int32Array | CorpusMalformed:
        try:
            return self._tokenizer.encode_batch([text])[0]
        except TokenizerFailed as exc:
            return _malformed(f"Document {index} can't be tokenized: {exc}", index, self._snippet(index))

    def _text_or_error(self, index: int) -> str | CorpusMalformed:
        """Returns a text, or the error that it makes: it must not keep the documents before it from being read."""
        try:
            return self.text(index)
        except CorpusMalformed as exc:
            return exc

    @property
    def tokenized(self) -> bool:
        """True if the corpus holds token ids and no text."""
        return self._reader.tokenized

    def text(self, index: int) -> str:
        """Returns the text that is tokenized."""
        return self._reader.text(index)

    def _snippet(self, index: int) -> str:
        """Returns the beginning of a document as people know it."""
        return self._reader.content(index)[: 4 * _SNIPPET_CHARACTERS].decode(errors="ignore")[:_SNIPPET_CHARACTERS]

    def _checked(self, token_ids: Int32Array, index: int) -> Int32Array:
        largest = int(token_ids.max(initial=0))
        if largest < self._tokenizer.vocab_size:
            return token_ids
        what = f"token id {largest}, and the model's end before {self._tokenizer.vocab_size}"
        if self._reader.tokenized:
            raise _malformed(
                f"Document {index} holds {what}; tokenize the corpus with this model's tokenizer.",
                index,
                token_id=str(largest),
            )
        if not self._tokenizer.is_added(largest):
            raise ModelUnsupported(f"The tokenizer gives {what}; the tokenizer is not this model's.")
        snippet = self._snippet(index)
        raise _malformed(
            f"Document {index} ({snippet!r} …) gives {what}: it spells a token that was added to the tokenizer and"
            " not to the model. Take the text out, or have skip_bad_documents leave out such documents.",
            index,
            snippet,
            token_id=str(largest),
        )


class ChatDocuments(TokenizedDocuments):
    """Conversations as token ids, written by the model's chat template.

    Templates write special tokens themselves. If the recipe inserts BOS or EOS tokens by itself, a BOS at the beginning
    or an EOS at the end of the template's output is left out, so that each occurs once.
    """

    def __init__(
        self,
        reader: DocumentReader,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        recipe: Recipe,
        confinement: Confinement,
    ) -> None:
        # Imported here: only conversations need Jinja.
        from headrace_extractor.corpora.chat import ConfinedRenderer  # noqa: PLC0415

        super().__init__(reader, tokenizer, recipe)
        self._renderer = ConfinedRenderer(template, confinement)
        self._bos = tokenizer.special.bos_id if recipe.bos == "document" else None
        self._eos = tokenizer.special.eos_id if recipe.eos == "document" else None

    def __getitem__(self, index: int, /) -> Int32Array:
        """Returns a conversation's tokens, to be read only."""
        own = super().__getitem__(index)
        if own.size and own[0] == self._bos:
            own = own[1:]
        return own[:-1] if own.size and own[-1] == self._eos else own

    def text(self, index: int) -> str:
        """Returns the conversation as its template writes it."""
        messages = self._reader.messages(index)
        return self._renderer.render(messages, index) if messages else ""


def _malformed(message: str, index: int, snippet: str = "", **metadata: str) -> CorpusMalformed:
    begins = {"begins": snippet} if snippet else {}
    return CorpusMalformed(message, metadata={"document": str(index), **begins, **metadata})
