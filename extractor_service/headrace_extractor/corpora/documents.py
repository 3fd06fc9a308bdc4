"""Turns the documents of a corpus into token ids, as the packer reads them."""

from __future__ import annotations

from pathlib import Path

from headrace_extractor.corpora.chat_template import ChatTemplate, check_chat
from headrace_extractor.corpora.packing import Documents, Int32Array, SpecialTokens
from headrace_extractor.corpora.reader import DocumentReader
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.corpora.spec import DocumentKind
from headrace_extractor.corpora.tokenizer import Tokenizer
from headrace_extractor.errors import CorpusMalformed, ModelUnsupported

BLOCK_DOCUMENTS = 64  # The tokenizer works on several documents in parallel.
BLOCK_BYTES = 256 * 1024  # The tokenizer needs a hundred bytes of memory for each token.


def open_documents(reader: DocumentReader, files_path: Path | str, recipe: Recipe) -> tuple[Documents, SpecialTokens]:
    """Returns a corpus as token ids of the model in `files_path`, and that model's special tokens.

    Raises FieldInvalid if the recipe asks for a chat template and the corpus holds no conversations, or the reverse,
    and ModelUnsupported if the model lacks the tokenizer or the chat template.
    """
    is_chat = reader.kind == DocumentKind.CHAT
    check_chat(recipe, corpus_id=reader.corpus.id, is_chat=is_chat)
    tokenizer = Tokenizer.load(files_path, ids_only=reader.tokenized)
    if not is_chat:
        return TokenizedDocuments(reader, tokenizer), tokenizer.special
    template = ChatTemplate.load(files_path)
    return ChatDocuments(reader, tokenizer, template, recipe), tokenizer.special


class TokenizedDocuments:
    """Tokenizes a corpus while it is read, or passes its token ids through; not for several threads at once.

    A document's tokens depend on that document alone, not on the order of reading. Raises CorpusMalformed for token ids
    beyond the model's vocabulary.
    """

    def __init__(self, reader: DocumentReader, tokenizer: Tokenizer) -> None:
        self._reader = reader
        self._tokenizer = tokenizer
        self._block_start = 0
        self._block: list[Int32Array] = []

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int, /) -> Int32Array:
        """Returns a document's own token ids, to be read only."""
        if self._reader.tokenized:
            return self._checked(self._reader.token_ids(index), index)
        if not 0 <= index - self._block_start < len(self._block):
            self._read_block(index)
        return self._checked(self._block[index - self._block_start], index)

    def _read_block(self, start: int) -> None:
        """Tokenizes a document together with the next few: reading is mostly sequential."""
        texts = [self._text(start)]
        size = self._reader.size_bytes(start)
        for index in range(start + 1, min(start + BLOCK_DOCUMENTS, len(self._reader))):
            size += self._reader.size_bytes(index)
            if size > BLOCK_BYTES:
                break
            texts.append(self._text(index))
        self._block = self._tokenizer.encode_batch(texts)
        self._block_start = start

    def _text(self, index: int) -> str:
        return self._reader.text(index)

    def _checked(self, token_ids: Int32Array, index: int) -> Int32Array:
        largest = int(token_ids.max(initial=0))
        if largest < self._tokenizer.vocab_size:
            return token_ids
        if self._reader.tokenized:
            raise CorpusMalformed(
                f"Document {index} holds token id {largest}, and the model's end before {self._tokenizer.vocab_size};"
                " tokenize the corpus with this model's tokenizer.",
                metadata={"document": str(index), "token_id": str(largest)},
            )
        raise ModelUnsupported(
            f"The tokenizer gives the id {largest} and the model's ids end before {self._tokenizer.vocab_size}; the"
            " tokenizer is not this model's."
        )


class ChatDocuments(TokenizedDocuments):
    """Conversations as token ids, written by the model's chat template.

    Templates write special tokens themselves. If the recipe inserts BOS or EOS tokens, a BOS at the beginning or an EOS
    at the end of the template's output is left out, so that each occurs once.
    """

    def __init__(self, reader: DocumentReader, tokenizer: Tokenizer, template: ChatTemplate, recipe: Recipe) -> None:
        # Imported here: only conversations need Jinja.
        from headrace_extractor.corpora.chat import ChatRenderer  # noqa: PLC0415

        super().__init__(reader, tokenizer)
        self._renderer = ChatRenderer(template)
        self._bos = tokenizer.special.bos_id if recipe.bos == "document" else None
        self._eos = tokenizer.special.eos_id if recipe.eos == "document" else None

    def __getitem__(self, index: int, /) -> Int32Array:
        """Returns a conversation's tokens, to be read only."""
        own = super().__getitem__(index)
        if own.size and own[0] == self._bos:
            own = own[1:]
        return own[:-1] if own.size and own[-1] == self._eos else own

    def _text(self, index: int) -> str:
        messages = self._reader.messages(index)
        return self._renderer.render(messages, index) if messages else ""
