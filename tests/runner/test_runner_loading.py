from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fix_runner import load
from headrace_extractor.errors import DeviceOom, FieldInvalid, LoadFailed, ModelUnsupported, NotImplementedYet
from headrace_extractor.runner.models import loading

WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_progress_counts_every_byte_of_the_weights(tiny_model):
    seen = []
    load(tiny_model, on_progress=lambda done, total: seen.append((done, total)))

    total = (tiny_model / WEIGHTS).stat().st_size
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_warming_stops_at_half_of_the_free_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(loading.psutil, "virtual_memory", type("Memory", (), {"available": 5000}))
    path, seen = tmp_path / "weights", []
    path.write_bytes(bytes(10_000))
    loading.warm_page_cache([path], 10_000, lambda done, _: seen.append(done))

    assert seen[-1] == 3000


def test_model_is_for_inference_and_measured(tiny_llama):
    loaded = load(tiny_llama, dtype="bfloat16")

    parameters = list(loaded.model.parameters())
    assert not any(parameter.requires_grad for parameter in parameters)
    assert not loaded.model.training
    assert not hasattr(loaded.model, "lm_head")
    assert loaded.measured_bytes >= sum(parameter.numel() * 2 for parameter in parameters)


def test_sharded_weights_are_loaded(tiny_llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    ours, theirs = load(tmp_path / "m").model.state_dict(), load(tiny_llama).model.state_dict()

    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"dtype": "float16"}, "dtype"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "cuda:7"}, "device"),
        ({"device": "abacus"}, "device"),
        ({"load_options": {"abacus": True}}, "load_options"),
        ({"load_options": {"attn_implementation": "flash_attention_2"}}, "load_options.attn_implementation"),
    ],
)
def test_bad_option_names_its_field(tiny_llama, options, field):
    with pytest.raises(FieldInvalid) as caught:
        load(tiny_llama, **options)

    assert caught.value.field == field


def test_missing_weight_is_an_error_instead_of_a_random_number(copied):
    tensors = load_file(copied / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})

    with pytest.raises(LoadFailed, match="up_proj"):
        load(copied)


def test_weight_of_another_shape_is_an_error(copied):
    change_config(copied, intermediate_size=48)

    with pytest.raises((LoadFailed, ModelUnsupported)):
        load(copied)


@pytest.mark.parametrize("n_bytes", [4, 100, 50_000])
def test_cut_weight_file_is_an_error(copied, n_bytes):
    data = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(data[:n_bytes])

    with pytest.raises(LoadFailed, match="damaged"):
        load(copied)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_missing_file_is_named(copied, name):
    (copied / name).unlink()

    with pytest.raises(ModelUnsupported, match=name):
        load(copied)


def test_pickled_weights_are_not_loaded(copied):
    torch.save(load_file(copied / WEIGHTS), copied / "pytorch_model.bin")
    (copied / WEIGHTS).unlink()

    with pytest.raises(ModelUnsupported, match="only safetensors"):
        load(copied)


def test_unknown_architecture_is_unsupported(copied):
    change_config(copied, model_type="abacus", architectures=["AbacusModel"])

    with pytest.raises(ModelUnsupported, match="abacus"):
        load(copied)


def test_code_in_the_folder_does_not_run(copied, tmp_path):
    change_config(copied, model_type="abacus", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"})
    (copied / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    with pytest.raises(ModelUnsupported):
        load(copied)
    assert not (tmp_path / "ran").exists()


def test_quantized_weights_are_not_implemented(copied):
    change_config(copied, quantization_config={"quant_method": "bitsandbytes"})

    with pytest.raises(NotImplementedYet):
        load(copied)


def test_model_beyond_the_free_memory_is_refused_before_loading(tiny_llama, monkeypatch):
    monkeypatch.setattr(loading.psutil, "virtual_memory", type("Memory", (), {"available": 5000}))

    with pytest.raises(DeviceOom) as caught:
        load(tiny_llama)
    assert int(caught.value.metadata["estimated_bytes"]) > int(caught.value.metadata["free_bytes"]) == 5000


def test_running_out_of_memory_is_typed():
    with (
        pytest.raises(DeviceOom, match="batch_size"),
        loading.out_of_memory_as_typed(torch.device("cpu"), 1, "batch_size"),
    ):
        torch.empty(1 << 60)
