"""Tokenizers in older forms: made into a tokenizer.json that gives the ids which transformers gives."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from fix_runner import load, save_model
from headrace_extractor.corpora.tokenizer import Tokenizer
from headrace_extractor.errors import ModelUnsupported
from headrace_extractor.node.runner_protocol import Convert, Converted
from headrace_extractor.runner.models.pickles import convert_pickled
from headrace_extractor.runner.models.tokenizer_files import convert_tokenizer
from headrace_models.folder import files_read, has_older_tokenizer

TEXTS = ["the mill", "a headrace carries water", "  two  spaces\nand a line", "ünïcode 東京"]


def bytes_to_letters():
    """The letters that GPT-2's files write for bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(256))
    return [chr(byte if byte in printable else 256 + next(shifted)) for byte in range(256)]


@pytest.fixture
def opt(tmp_path):
    """A small OPT as its repos publish it: words and merges, special tokens in the tokenizer's config."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_letters(), "th", "the", "Ġm", "Ġmill"]
    config = OPTConfig(
        vocab_size=len(words),
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    )
    folder = save_model(OPTForCausalLM, config, tmp_path / "opt")
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ m\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    settings = {**special, "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_tokenizer_of_words_and_merges_gives_the_ids_that_transformers_gives(opt, tmp_path):
    convert_tokenizer(opt, tmp_path / "made")
    ours, theirs = Tokenizer.load(tmp_path / "made"), AutoTokenizer.from_pretrained(opt)

    expected = [theirs(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert [ids.tolist() for ids in ours.encode_batch(TEXTS)] == expected
    assert len(expected[0]) < len(TEXTS[0])
    assert (ours.special.bos_id, ours.special.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (2, 2)


def test_the_model_is_loaded_through_links_and_its_own_files_stay_untouched(opt, tmp_path):
    (opt / "model.safetensors").chmod(0o400)
    before = {path.name: path.stat() for path in opt.iterdir()}
    convert_tokenizer(opt, tmp_path / "made")
    made = tmp_path / "made"

    assert {path.name for path in made.iterdir() if path.is_symlink()} == {path.name for path in files_read(opt)}
    assert load(made).model is not None
    assert {path.name: path.stat().st_mode for path in opt.iterdir()} == {
        name: found.st_mode for name, found in before.items()
    }
    shutil.rmtree(made)
    assert {path.name for path in opt.iterdir()} == set(before)


def test_pickled_weights_come_with_a_tokenizer(opt, tmp_path):
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    torch.save(load_file(opt / "model.safetensors"), opt / "pytorch_model.bin")
    (opt / "model.safetensors").unlink()
    convert_pickled(opt, tmp_path / "made", lambda *_: None)

    assert Tokenizer.load(tmp_path / "made").encode_batch(["the"])[0].tolist() == [261]
    assert load(tmp_path / "made").model is not None


def test_a_tokenizer_that_contradicts_itself_is_refused_with_the_reason(opt, tmp_path):
    (opt / "merges.txt").write_text("#version: 0.2\nnowhere to\n")

    with pytest.raises(ModelUnsupported, match="tokenizer can't be converted"):
        convert_tokenizer(opt, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_runner_converts_a_tokenizer(opt, tmp_path, start_runner):
    runner = start_runner()
    runner.send(Convert(source_path=str(opt), target_path=str(tmp_path / "made"), tokenizer=True))
    runner.until(Converted)

    assert (tmp_path / "made" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("names", "older"),
    [
        ({"vocab.json", "merges.txt"}, True),
        ({"vocab.json", "merges.txt", "tokenizer.json"}, False),
        ({"vocab.json"}, False),
        ({"tokenizer.model"}, True),
        ({"spiece.model"}, True),
        ({"sentencepiece.bpe.model"}, True),
        ({"vocab.txt"}, True),
        ({"qwen.tiktoken"}, False),
        (set(), False),
    ],
)
def test_older_forms_are_known_by_their_names(names, older):
    assert has_older_tokenizer({"config.json", *names}) == older
