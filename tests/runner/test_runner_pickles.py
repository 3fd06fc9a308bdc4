"""Pickled weights become safetensors with the same numbers; a pickle that is more than tensors never runs."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from headrace_extractor.errors import LoadFailed, ModelUnsupported
from headrace_extractor.runner.models.pickles import convert_pickled


class Evil:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def tiny() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=64)).eval()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    model = tiny()
    model.config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


@pytest.mark.parametrize("form", ["one file", "shards", "before torch 1.6"])
def test_the_numbers_are_the_same_and_no_pickle_is_left(source, tmp_path, form):
    target = tmp_path / "target"
    state = tiny().state_dict()
    if form == "shards":
        names = sorted(state)
        for number, part in enumerate((names[::2], names[1::2]), 1):
            shard = source / f"pytorch_model-{number:05d}-of-00002.bin"
            torch.save({name: state[name].clone() for name in part}, shard)
        (source / "pytorch_model.bin").unlink()
        (source / "pytorch_model.bin.index.json").write_text("{}")
    elif form == "before torch 1.6":
        torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    told = []
    convert_pickled(source, target, lambda *progress: told.append(progress))
    loaded = AutoModelForCausalLM.from_pretrained(target, local_files_only=True).eval()

    assert torch.equal(logits_of(loaded), logits_of(tiny()))
    assert not list(target.glob("*.bin*"))
    assert (target / "tokenizer.json").read_text() == "{}"
    assert told[-1][0] == told[-1][1] > 0


def test_a_tied_head_is_stored_once_and_an_untied_one_stays(source, tmp_path):
    convert_pickled(source, tmp_path / "tied", lambda *_: None)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    convert_pickled(source, tmp_path / "untied", lambda *_: None)

    assert "lm_head.weight" not in names_in(tmp_path / "tied")
    assert "lm_head.weight" in names_in(tmp_path / "untied")


def names_in(folder) -> set[str]:
    raw = (folder / "model.safetensors").read_bytes()
    return set(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))


@pytest.mark.parametrize("protocol", ["plain", "torch"])
def test_a_pickle_that_runs_code_is_refused_and_runs_none(source, tmp_path, protocol):
    proof = tmp_path / "proof"
    if protocol == "plain":
        (source / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil(proof)}, protocol=2))
    else:
        torch.save({"a": Evil(proof)}, source / "pytorch_model.bin")
    with pytest.raises(ModelUnsupported, match="save_pretrained"):
        convert_pickled(source, tmp_path / "target", lambda *_: None)

    assert not proof.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"not a pickle at all"])
def test_a_damaged_file_is_typed_and_leaves_nothing(source, tmp_path, content):
    (source / "pytorch_model.bin").write_bytes(content)
    with pytest.raises((LoadFailed, ModelUnsupported)):
        convert_pickled(source, tmp_path / "target", lambda *_: None)

    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_what_is_no_table_of_tensors_or_has_no_config_is_unsupported(source, tmp_path):
    torch.save([torch.zeros(2)], source / "pytorch_model.bin")
    with pytest.raises(ModelUnsupported, match="no table"):
        convert_pickled(source, tmp_path / "target", lambda *_: None)
    (source / "config.json").unlink()
    with pytest.raises(ModelUnsupported, match=r"config\.json"):
        convert_pickled(source, tmp_path / "target", lambda *_: None)


def test_a_disk_that_maps_no_files_is_read_all_the_same(source, tmp_path, monkeypatch):
    load = torch.load

    def refuses(path, *, mmap=False, **options):
        if mmap:
            raise RuntimeError("unable to mmap 4096 bytes from file <pytorch_model.bin>: No such device (19)")
        return load(path, **options)

    monkeypatch.setattr(torch, "load", refuses)
    convert_pickled(source, tmp_path / "target", lambda *_: None)

    assert (tmp_path / "target" / "model.safetensors").is_file()
