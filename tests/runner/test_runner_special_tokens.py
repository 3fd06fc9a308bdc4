"""The tokens around a text are those of the model's own tokenizer, as transformers calls it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer

from fix_runner import load, read_rows, run_command, save_model
from fix_zoo import zoo_config
from headrace_extractor.corpora.documents import open_documents
from headrace_extractor.corpora.packing import Packer
from headrace_extractor.corpora.reader import DocumentReader
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.corpora.tokenizer import Tokenizer
from headrace_extractor.corpora.writer import DocumentWriter
from headrace_extractor.errors import ModelUnsupported
from headrace_extractor.node.runner_protocol import Extract
from headrace_extractor.runner.passes.own_tokens import _tokenizer_in

NAMED = ("[CLS]", "[SEP]", "[gMASK]", "<sop>", "<s>", "</s>")
WORDS = ("the", "water", "drives", "wheel")
VOCAB = {word: number for number, word in enumerate((*NAMED, *WORDS))}
SITE = "blocks.1.hook_resid_post"
TEXTS = ["the water drives the wheel", "water"]
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"


def template(single):
    names = [name for name in NAMED if name in single]
    return processors.TemplateProcessing(single=single, special_tokens=[(name, VOCAB[name]) for name in names])


# Model type, post-processor, and the tokens around a text.
TOKENIZERS = {
    "bert": ("bert", template("[CLS] $A [SEP]"), ["[CLS]"], ["[SEP]"]),
    "roberta": ("roberta", processors.RobertaProcessing(("</s>", 5), ("<s>", 4)), ["<s>"], ["</s>"]),
    "glm4": (
        "glm4",
        processors.Sequence([processors.ByteLevel(), template("[gMASK] <sop> $A")]),
        ["[gMASK]", "<sop>"],
        [],
    ),
    "llama": ("llama", template("<s> $A"), ["<s>"], []),
    "gpt2": ("gpt2", processors.ByteLevel(), [], []),
    "t5": ("t5", template("$A </s>"), [], ["</s>"]),
}


@pytest.fixture(params=TOKENIZERS)
def kind(request):
    return TOKENIZERS[request.param]


def make_folder(folder, kind):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind[0], "vocab_size": len(VOCAB)}))
    return add_tokenizer(folder, kind)


def add_tokenizer(folder, kind):
    _, post_processor, *_ = kind
    inner = tokenizers.Tokenizer(models.WordLevel(VOCAB))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(list(NAMED))
    inner.post_processor = post_processor
    inner.save(str(folder / "tokenizer.json"))
    # A setting that transformers passes over where there is a tokenizer.json.
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, "add_bos_token": True}))
    return folder


def corpus_of(folder, documents, **fields):
    with DocumentWriter(folder, **fields) as writer:
        for document in documents:
            writer.add(document)
        writer.finish(corpus_id=folder.name, origin="test", create_time=0.0)
    return folder


def token_ids(corpus, folder, **recipe):
    """The packed tokens of each document."""
    recipe = Recipe(**{"packing": "one_document", **recipe})
    with DocumentReader(corpus) as reader:
        documents, special = open_documents(reader, folder, recipe)
        return [batch.token_ids[0].tolist() for batch in Packer(documents, recipe, special).batches()]


def test_a_document_has_the_tokens_of_the_tokenizers_own_call(tmp_path, kind):
    folder = make_folder(tmp_path / "model", kind)
    corpus = corpus_of(tmp_path / "corpus", [text.encode() for text in TEXTS], tokenized=False)
    theirs = AutoTokenizer.from_pretrained(folder)

    assert token_ids(corpus, folder) == theirs(TEXTS).input_ids
    assert token_ids(corpus, folder, bos="none") == theirs(TEXTS, add_special_tokens=False).input_ids
    assert token_ids(corpus, folder, bos="document") == [
        [VOCAB["<s>"], *ids] for ids in theirs(TEXTS, add_special_tokens=False).input_ids
    ]


def test_a_truncated_document_is_the_tokenizers_truncated_one(tmp_path, kind):
    folder = make_folder(tmp_path / "model", kind)
    corpus = corpus_of(tmp_path / "corpus", [text.encode() for text in TEXTS], tokenized=False)
    theirs = AutoTokenizer.from_pretrained(folder)

    assert token_ids(corpus, folder, context_size=4) == theirs(TEXTS, truncation=True, max_length=4).input_ids


def test_the_tokens_around_a_text_are_known_and_special(tmp_path, kind):
    _, _, prefix, suffix = kind

    special = Tokenizer.load(make_folder(tmp_path / "model", kind)).special

    assert special.prefix == tuple(VOCAB[name] for name in prefix)
    assert special.suffix == tuple(VOCAB[name] for name in suffix)
    assert {*special.prefix, *special.suffix} <= special.ids


def test_token_ids_that_begin_with_the_prefix_are_not_given_it_twice(tmp_path):
    folder = make_folder(tmp_path / "model", TOKENIZERS["bert"])
    whole = AutoTokenizer.from_pretrained(folder)(TEXTS[0]).input_ids
    documents = [np.array(ids, "<i4").tobytes() for ids in (whole, whole[1:-1], [])]
    corpus = corpus_of(tmp_path / "corpus", documents, tokenized=True)

    assert token_ids(corpus, folder) == [whole, whole]
    assert token_ids(corpus, folder, bos="none") == [whole, whole[1:-1]]


@pytest.fixture(params=["bert", "glm4", "llama", "gpt2"])
def model_and_kind(request, tmp_path):
    config = zoo_config(request.param, vocab_size=len(VOCAB))
    folder = save_model(AutoModel.from_config, config, tmp_path / "model")
    return add_tokenizer(folder, TOKENIZERS[request.param]), TOKENIZERS[request.param]


@pytest.mark.parametrize("packing", ["packed", "one_document"])
def test_rows_are_those_of_the_text_as_the_tokenizer_writes_it(model_and_kind, make_set, tmp_path, packing):
    folder, _ = model_and_kind
    corpus = corpus_of(tmp_path / "corpus", [text.encode() for text in TEXTS], tokenized=False)
    set_path = make_set([SITE], bos="tokenizer", packing=packing)
    n_rows = run_command(Extract(set_id="x", set_path=str(set_path), corpus_path=str(corpus)), load(folder))[-1].n_rows
    rows, (entry,) = read_rows(set_path, n_rows), receipts(set_path)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)

    for number, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            expected = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0].numpy()
        here = rows["document"] == number
        assert rows["token_id"][here].tolist() == ids[0].tolist()
        np.testing.assert_allclose(rows[SITE][here], expected, rtol=1e-4, atol=1e-5)
    assert entry["max_relative_error"] < 1e-5


@pytest.mark.parametrize("recipe", [{"bos": "tokenizer"}, {"bos": "document", "eos": "document"}, {"bos": "none"}])
def test_tokens_that_are_not_the_tokenizers_own_end_the_run(model_and_kind, make_set, tmp_path, monkeypatch, recipe):
    folder, _ = model_and_kind
    corpus = corpus_of(tmp_path / "corpus", [TEXTS[0].encode()], tokenized=False)
    command = Extract(set_id="x", set_path=str(make_set([SITE], **recipe)), corpus_path=str(corpus))
    run_command(replace(command, set_path=str(make_set([SITE], **recipe))), load(folder))
    real = Tokenizer.encode_batch

    def with_another_token(self, texts):
        return [np.where(np.arange(len(ids)) == 2, VOCAB["wheel"], ids) for ids in real(self, texts)]

    monkeypatch.setattr(Tokenizer, "encode_batch", with_another_token)

    with pytest.raises(ModelUnsupported, match="tokens of document 0") as caught:
        run_command(command, load(folder))
    assert caught.value.metadata["token_id"] == str(VOCAB["wheel"])


def receipts(set_path):
    return json.loads((set_path / "manifest.json").read_text())["receipt"].values()


def test_a_model_with_code_of_its_own_is_never_asked_about(monkeypatch, tiny_llama, tmp_path):
    """transformers asks at the terminal whether to run such code, and standard input is where commands come from."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    path.write_text(json.dumps(config))
    plain = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "model" / "tokenizer.json").write_text(plain.to_str())
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))

    assert _tokenizer_in(tmp_path / "model")("a a").input_ids == [0, 0]
