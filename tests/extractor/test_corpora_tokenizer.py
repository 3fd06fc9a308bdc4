from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from headrace_extractor.corpora import tokenizer as room
from headrace_extractor.corpora.documents import BLOCK_DOCUMENTS, TokenizedDocuments
from headrace_extractor.corpora.packing import Packer, SpecialTokens, count_rows
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.corpora.spec import CorpusFormat, CorpusSpec
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.corpora.tokenizer import Tokenizer
from headrace_extractor.errors import CorpusMalformed, FieldInvalid, ModelUnsupported

LINES = ["The water drives the wheel.", "A headrace carries water to the wheel, and the wheel turns."]


@pytest.fixture(scope="module")
def byte_level():
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(LINES, trainer)
    return inner


@pytest.fixture
def folder(tmp_path, byte_level):
    byte_level.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 320, "bos_token_id": 7}))
    return tmp_path


def test_text_round_trips_without_special_tokens(folder):
    tokenizer = Tokenizer.load(folder)
    texts = [*LINES, "", "Grüße, 水車 🛞"]

    ids = tokenizer.encode_batch(texts)

    assert all(part.dtype == np.int32 for part in ids)
    assert ids[2].tolist() == []
    assert [tokenizer._inner.decode(part.tolist()) for part in ids] == texts
    assert not {0, 1, 2} & set(np.concatenate(ids).tolist())


def test_special_tokens_written_out_are_recognised(folder):
    assert Tokenizer.load(folder).encode_batch(["<s>"])[0].tolist() == [0]


def test_digest_vocabulary_and_special_ids_come_from_the_folder(folder):
    tokenizer = Tokenizer.load(str(folder))

    assert tokenizer.digest == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert tokenizer.vocab_size == 320
    assert tokenizer.special == SpecialTokens(bos_id=0, eos_id=1, ids=frozenset({0, 1, 2}))


def test_truncation_and_padding_of_the_file_are_ignored(folder, byte_level):
    limited = tokenizers.Tokenizer.from_str(byte_level.to_str())
    limited.enable_truncation(4)
    limited.enable_padding(length=64)
    limited.save(str(folder / "tokenizer.json"))

    (ids,) = Tokenizer.load(folder).encode_batch(["The water drives the wheel. " * 10])

    assert ids.size > 64
    assert 2 not in ids


def test_a_text_too_large_for_one_go_is_tokenized_in_slices(folder, monkeypatch):
    whole = Tokenizer.load(folder).encode_batch(["\n".join(LINES * 20), "a" * 500, "", "wheel " * 50])
    monkeypatch.setattr(room, "SLICE_CHARACTERS", 100)

    sliced = Tokenizer.load(folder).encode_batch(["\n".join(LINES * 20), "a" * 500, "", "wheel " * 50])

    assert [part.tolist() for part in sliced] == [part.tolist() for part in whole]


def test_a_null_in_the_tokenizer_config_means_no_such_token(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": None}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<pad>"}))

    special = Tokenizer.load(folder).special

    assert (special.bos_id, special.eos_id) == (None, 2)


def test_without_texts_the_configs_name_the_ids(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 10]}))

    special = Tokenizer.load(folder).special

    assert (special.bos_id, special.eos_id) == (7, 9)


def test_a_multimodal_config_nests_its_vocabulary(folder):
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 4000}}))

    assert Tokenizer.load(folder).vocab_size == 4000


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{}"), ("tokenizer.json", "nonsense"), ("config.json", "{"), ("tokenizer_config.json", "[]")],
)
def test_files_that_can_not_be_read_are_unsupported(folder, name, content):
    (folder / name).write_text(content)

    with pytest.raises(ModelUnsupported, match=name):
        Tokenizer.load(folder)


def test_a_model_without_tokenizer_serves_token_ids_alone(folder):
    (folder / "tokenizer.json").unlink()

    with pytest.raises(ModelUnsupported, match="save_pretrained"):
        Tokenizer.load(folder)
    tokenizer = Tokenizer.load(folder, ids_only=True)

    assert (tokenizer.special.bos_id, tokenizer.vocab_size, tokenizer.digest) == (7, 320, "")
    with pytest.raises(ModelUnsupported):
        tokenizer.encode_batch(["a"])
    with pytest.raises(ModelUnsupported):
        tokenizer.decode_each([1])


# Decoding


def test_tokens_decode_by_themselves_and_in_order(folder):
    tokenizer = Tokenizer.load(folder)
    (ids,) = tokenizer.encode_batch(["The water drives ä the wheel."])

    texts = tokenizer.decode_each(ids.tolist())

    assert "".join(texts).replace("\ufffd\ufffd", "ä") == "The water drives ä the wheel."
    assert tokenizer.decode_each([0, 1, 0]) == ["<s>", "</s>", "<s>"]
    assert tokenizer.decode_each([]) == []


def test_a_word_keeps_its_space_under_decoders_that_strip_the_first(tmp_path):
    vocab = {"<unk>": 0, "a": 1, "▁": 2, "▁the": 3, "the": 4, "<0xC3>": 5}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.save(str(tmp_path / "tokenizer.json"))

    assert Tokenizer.load(tmp_path).decode_each([3, 4, 5, 1]) == [" the", "the", "\ufffd", "a"]


def test_ids_that_no_token_has_decode_to_nothing(folder):
    assert Tokenizer.load(folder).decode_each([319, 2**31 - 1]) == ["", ""]


@pytest.mark.parametrize("token", [-1, 2**31])
def test_ids_beyond_int32_are_refused(folder, token):
    with pytest.raises(FieldInvalid) as caught:
        Tokenizer.load(folder).decode_each([token])

    assert caught.value.field == "token_ids"


# Documents


@pytest.fixture
def store(tmp_path):
    return CorpusStore(tmp_path / "corpora")


def text_corpus(store, texts):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    store.ingest(CorpusSpec(id="c", format=CorpusFormat.JSONL), io.BytesIO(lines))
    return store.open("c")


def test_documents_are_tokenized_alike_in_any_order(folder, store):
    tokenizer = Tokenizer.load(folder)
    texts = [LINES[i % 2] * (i % 5) for i in range(3 * BLOCK_DOCUMENTS)]
    expected = [part.tolist() for part in tokenizer.encode_batch(texts)]
    documents = TokenizedDocuments(text_corpus(store, texts), tokenizer)

    assert len(documents) == len(texts)
    assert [documents[i].tolist() for i in range(len(texts))] == expected
    assert [documents[i].tolist() for i in reversed(range(len(texts)))] == expected[::-1]


def test_large_documents_are_tokenized_in_smaller_blocks(folder, store):
    asked = []

    class Watched(Tokenizer):
        def encode_batch(self, texts):
            asked.append(len(texts))
            return super().encode_batch(texts)

    tokenizer = Tokenizer.load(folder)
    watched = Watched(tokenizer._inner, special=tokenizer.special, vocab_size=320, digest="")
    texts = [LINES[0] * 6000, LINES[0] * 6000, *["x"] * 10]
    documents = TokenizedDocuments(text_corpus(store, texts), watched)

    sizes = [documents[i].size for i in range(12)]

    assert sizes[0] == sizes[1] > 6000
    assert sizes[2:] == [1] * 10
    assert asked == [1, 11]


def test_packing_a_corpus_restores_its_text(folder, store):
    tokenizer = Tokenizer.load(folder)
    documents = TokenizedDocuments(text_corpus(store, LINES), tokenizer)
    recipe = Recipe(context_size=8, batch_size=2, drop_special_tokens=True)

    kept = [batch.token_ids[batch.keep] for batch in Packer(documents, recipe, tokenizer.special).batches()]

    assert tokenizer._inner.decode(np.concatenate(kept).tolist()) == "".join(LINES)
    assert count_rows(documents, recipe, tokenizer.special)[0] == sum(part.size for part in kept)


def test_token_ids_pass_through_and_are_checked_against_the_vocabulary(folder, store):
    store.ingest_tokens("c", [[3, 319], [320]])
    documents = TokenizedDocuments(store.open("c"), Tokenizer.load(folder))

    assert documents[0].tolist() == [3, 319]
    with pytest.raises(CorpusMalformed) as caught:
        documents[1]
    assert caught.value.metadata == {"document": "1", "token_id": "320"}


def test_a_tokenizer_that_is_not_the_models_is_unsupported(folder, store):
    (folder / "config.json").write_text(json.dumps({"vocab_size": 10}))
    documents = TokenizedDocuments(text_corpus(store, LINES), Tokenizer.load(folder))

    with pytest.raises(ModelUnsupported, match="not this model's"):
        documents[0]


def test_another_file_is_another_tokenizer(folder):
    before = Tokenizer.load(folder)
    assert Tokenizer.load(folder)._inner is before._inner
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))

    after = Tokenizer.load(folder)

    assert after.digest != before.digest
    assert after.encode_batch(["Wheel"])[0].tolist() == before.encode_batch(["wheel"])[0].tolist()


# Documents that can't be tokenized


@pytest.fixture
def beyond(folder, byte_level):
    """The model's folder, with a token that its embedding of 320 rows lacks."""
    byte_level.add_tokens([f"<more {i}>" for i in range(40)])
    byte_level.save(str(folder / "tokenizer.json"))
    return folder


def test_a_text_that_spells_a_token_beyond_the_embedding_is_named(beyond, store):
    tokenizer = Tokenizer.load(beyond)
    documents = TokenizedDocuments(text_corpus(store, [*LINES, "so it <more 39> goes " * 9]), tokenizer)

    assert documents[0].tolist() == tokenizer.encode_batch(LINES)[0].tolist()
    with pytest.raises(CorpusMalformed, match=r"Document 2 .*so it <more 39> goes") as caught:
        documents[2]
    assert caught.value.metadata["document"] == "2"
    assert caught.value.metadata["begins"].startswith("so it <more 39>")
    assert int(caught.value.metadata["token_id"]) >= 320


def test_bad_documents_are_left_out_and_counted_if_asked(beyond, store):
    texts = ["a", "<more 39>", LINES[0], "b <more 38>", ""]
    documents = TokenizedDocuments(text_corpus(store, texts), Tokenizer.load(beyond), Recipe(skip_bad_documents=True))

    found = [documents[i].tolist() for i in (0, 1, 2, 1, 3, 4)]
    assert [bool(ids) for ids in found] == [True, False, True, False, False, False]
    assert [documents.n_skipped_before(i) for i in (1, 2, 3, 4, 9)] == [0, 1, 1, 2, 2]


def test_token_ids_beyond_the_vocabulary_are_left_out_too(folder, store):
    store.ingest_tokens("ids", [[1, 2], [3, 320], [4]])
    documents = TokenizedDocuments(store.open("ids"), Tokenizer.load(folder), Recipe(skip_bad_documents=True))

    assert [documents[i].tolist() for i in range(3)] == [[1, 2], [], [4]]
    assert documents.n_skipped_before(3) == 1


def test_a_tokenizer_that_panics_names_the_document(folder, store):
    document = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    corpus, tokenizer = text_corpus(store, ["water", "a" * 2000 + "!", "wheel"]), Tokenizer.load(folder)

    documents = TokenizedDocuments(corpus, tokenizer)
    assert documents[0].size
    with pytest.raises(CorpusMalformed, match="Document 1 can't be tokenized"):
        documents[1]
    assert documents[2].size
    skipping = TokenizedDocuments(corpus, tokenizer, Recipe(skip_bad_documents=True))
    assert [bool(skipping[i].size) for i in range(3)] == [True, False, True]


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"{}", b"null", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_a_tokenizer_that_is_none_is_unsupported(folder, content):
    (folder / "tokenizer.json").write_bytes(content)

    with pytest.raises(ModelUnsupported, match="can't be read"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b'{"a":' * 100_000])
def test_a_broken_file_beside_the_tokenizer_is_unsupported(folder, name, content):
    (folder / name).write_bytes(content)

    with pytest.raises(ModelUnsupported, match=name):
        Tokenizer.load(folder)


def test_special_tokens_beyond_the_embedding_are_none(folder):
    (folder / "config.json").write_text(json.dumps({"vocab_size": 320, "eos_token_id": 2**31 - 2, "pad_token_id": 320}))
    (folder / "tokenizer_config.json").write_text("{}")
    special = Tokenizer.load(folder).special

    assert special.eos_id is None
    assert max(special.ids) < 320
