"""A model's tokenizer and its special tokens, read from the model's folder with the `tokenizers` library alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from headrace_extractor.corpora.packing import Int32Array, SpecialTokens
from headrace_extractor.errors import FieldInvalid, ModelUnsupported
from headrace_models.errors import JsonInvalid
from headrace_models.json_files import read_object

TOKENIZER = "tokenizer.json"
MAX_TOKEN_ID = 2**31 - 1
# The largest published tokenizers have a quarter of it.
MAX_FILE_BYTES = 128 * 1024 * 1024
# The library takes about 500 bytes a token while it works, and for one text of this size more than twice the time that
# it takes for many short texts. Longer texts are tokenized in slices, cut after a line end if possible.
SLICE_CHARACTERS = 1024 * 1024
# Parsed tokenizers kept: parsing takes a tenth of a second, as long as a batch or two; each takes tens of megabytes.
KEPT = 4

# Files that name special tokens by their text; the first that has the key decides, even if it says null.
_TEXT_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# Files that name special tokens by their id; they count if none of the former has the key.
_ID_FILES = ("config.json", "generation_config.json")
# Texts that show which tokens a tokenizer puts around a text; a small vocabulary may know none of their characters.
_PROBES = ("a", "e", "0", ".", "the")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerFailed(ModelUnsupported):
    """The library fails on a text; the message is a sentence about the tokenizer."""


class Tokenizer:
    """Text to token ids and back. No special tokens are added; such tokens written out in a text are recognised.

    A text of more than SLICE_CHARACTERS is tokenized in slices: the tokens next to a cut may differ from those of the
    whole text.

    `special` says which tokens the tokenizer itself puts around one text: those of its post-processor, as in
    transformers, which asks no other setting where there is a tokenizer.json.

    `vocab_size` is the model's from config.json if known, else the tokenizer's: all token ids are below it.
    `digest` is the sha256 of tokenizer.json, hex.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer | None, *, special: SpecialTokens, vocab_size: int, digest: str
    ) -> None:
        self._inner = inner
        self._anchor: tuple[list[int], str] | None = None
        self.special = special
        self.vocab_size = vocab_size
        self.digest = digest

    @classmethod
    def load(cls, files_path: Path | str, *, ids_only: bool = False) -> Tokenizer:
        """Reads the tokenizer in a model's folder; raises ModelUnsupported if the folder has none.

        With `ids_only`, for corpora of token ids, the folder needs no tokenizer: special tokens and vocabulary size
        then come from config.json, and the digest is empty.
        """
        folder = Path(files_path)
        path = folder / TOKENIZER
        inner, digest = None, ""
        try:
            stat = path.stat()
            inner, digest = _parsed(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)
        except (FileNotFoundError, NotADirectoryError) as exc:
            if not ids_only:
                raise ModelUnsupported(
                    f"{folder} has no {TOKENIZER}; open the model with transformers' AutoTokenizer and save_pretrained"
                    " into the folder, or extract from a corpus of token ids."
                ) from exc
        texts = [_read_json(folder / name) for name in _TEXT_FILES]
        configs = [_read_json(folder / name) for name in _ID_FILES]
        # The rows of the embedding; multimodal models nest their text model's config.
        text_config = configs[0].get("text_config")
        nested = text_config.get("vocab_size") if isinstance(text_config, dict) else None
        vocab_size = configs[0].get("vocab_size", nested)
        if not isinstance(vocab_size, int) or vocab_size <= 0:
            vocab_size = inner.get_vocab_size() if inner else MAX_TOKEN_ID + 1
        named = {name: _named_id(name, inner, texts, configs) for name in _NAMED}
        # Some models name a token behind the rows of their embedding, which no pass can read.
        named = {name: token for name, token in named.items() if token is None or token < vocab_size}
        added = inner.get_added_tokens_decoder().items() if inner else ()
        ids = {token for token in named.values() if token is not None}
        ids |= {token for token, info in added if info.special and token < vocab_size}
        prefix, suffix = _around(inner, path) if inner else ((), ())
        special = SpecialTokens(
            bos_id=named.get("bos_token"),
            eos_id=named.get("eos_token"),
            ids=frozenset(ids),
            prefix=prefix,
            suffix=suffix,
        )
        return cls(inner, special=special, vocab_size=vocab_size, digest=digest)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        """Returns each text's own token ids; raises ModelUnsupported if the model's folder has no tokenizer.

        Raises TokenizerFailed if the library fails on a text.
        """
        if self._inner is None:
            raise ModelUnsupported(f"The model has no {TOKENIZER}, so only corpora of token ids can be used with it.")
        if all(len(text) <= SLICE_CHARACTERS for text in texts):
            encodings = _encoded(self._inner, list(texts))
            return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        encoded = []
        for text in texts:
            parts = [np.array(_encoded(self._inner, [part])[0].ids, dtype=np.int32) for part in _slices(text)]
            encoded.append(np.concatenate(parts))
        return encoded

    def is_added(self, token_id: int) -> bool:
        """Returns whether a token was added to the tokenizer's own vocabulary, as special tokens are."""
        return self._inner is not None and token_id in self._inner.get_added_tokens_decoder()

    def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """Returns the text of each token by itself, as it reads in the middle of a text.

        Bytes that are no whole character become U+FFFD, and ids that the tokenizer does not know the empty text.
        """
        if self._inner is None:
            raise ModelUnsupported(f"The model has no {TOKENIZER}, so its token ids have no text.")
        if any(not 0 <= token <= MAX_TOKEN_ID for token in token_ids):
            raise FieldInvalid("A token id is negative or beyond int32.", field="token_ids")
        if self._anchor is None:
            # Every token is decoded after another one, since decoders drop the space of a first token.
            self._anchor = [], ""
            for text in ("a", "e", "0", "."):
                token = self._inner.token_to_id(text)
                if token is not None and self._inner.decode([token]) == text:
                    self._anchor = [token], text
                    break
        before, text_before = self._anchor
        distinct = sorted(set(token_ids))
        texts = self._inner.decode_batch([[*before, token] for token in distinct], skip_special_tokens=False)
        by_id = {token: text.removeprefix(text_before) for token, text in zip(distinct, texts, strict=True)}
        return [by_id[token] for token in token_ids]


def prove_loading(files_path: str) -> int:
    """Loads the tokenizer of a model's folder, if it has one, and returns its vocabulary's size."""
    return Tokenizer.load(files_path, ids_only=True).vocab_size


def _around(inner: tokenizers.Tokenizer, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the token ids that a tokenizer puts before and behind one text; raises ModelUnsupported."""
    if not inner.num_special_tokens_to_add(is_pair=False):
        return (), ()
    for text in (*_PROBES, *sorted(inner.get_vocab(with_added_tokens=False))[:100]):
        with suppress(TokenizerFailed), library_errors(TokenizerFailed, "A word is not in its vocabulary"):
            encoding = inner.encode(text)
            own = [place for place, is_added in enumerate(encoding.special_tokens_mask) if not is_added]
            if own:
                return tuple(encoding.ids[: own[0]]), tuple(encoding.ids[own[-1] + 1 :])
    raise ModelUnsupported(f"{path} gives no text tokens, so those that it puts around texts are unknown.")


@lru_cache(maxsize=KEPT)
def _parsed(path: Path, *_of: int) -> tuple[tokenizers.Tokenizer, str]:
    """Parses a tokenizer file, once for each version of it, which inode, mtime and size identify."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelUnsupported(f"{path} is larger than {MAX_FILE_BYTES} bytes; take it from the model's own repo.")
    data = path.read_bytes()
    with library_errors(ModelUnsupported, f"{path} can't be read"):
        inner = tokenizers.Tokenizer.from_buffer(data)
    inner.no_truncation()
    inner.no_padding()
    return inner, hashlib.sha256(data).hexdigest()


def _encoded(inner: tokenizers.Tokenizer, texts: list[str]) -> list[Any]:
    with library_errors(TokenizerFailed, f"The model's {TOKENIZER} fails"):
        found: list[Any] = inner.encode_batch_fast(texts, add_special_tokens=False)
        return found


@contextmanager
def library_errors(kind: type[Exception], what: str) -> Iterator[None]:
    """Turns errors of the library, which raises nothing narrower than Exception, and its panics into `kind`."""
    try:
        yield
    except BaseException as exc:
        # A panic, as of a regular expression that gives up, is no Exception, and its class can't be imported.
        if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
            raise
        raise kind(f"{what} ({str(exc)[:300]}); take the file from the model's own repo.") from exc


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except JsonInvalid as exc:
        raise ModelUnsupported(f"{path} {exc.problem}.") from exc


def _named_id(
    name: str,
    inner: tokenizers.Tokenizer | None,
    texts: Sequence[Mapping[str, Any]],
    configs: Sequence[Mapping[str, Any]],
) -> int | None:
    if inner is not None:
        for source in texts:
            if name in source:
                content = source[name]
                content = content.get("content") if isinstance(content, dict) else content
                token: int | None = inner.token_to_id(content) if isinstance(content, str) else None
                return token
    for source in configs:
        value = source.get(f"{name}_id")
        value = value[0] if isinstance(value, list) and value else value  # some models end at several tokens
        if isinstance(value, int) and 0 <= value <= MAX_TOKEN_ID:
            return value
    return None


def _slices(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > SLICE_CHARACTERS:
        # After a line end or before a space, where pre-tokenizers cut anyway.
        end = start + SLICE_CHARACTERS
        cut = text.rfind("\n", start, end) + 1 or text.rfind(" ", start + 1, end)
        cut = cut if cut > start else end
        yield text[start:cut]
        start = cut
    yield text[start:]
