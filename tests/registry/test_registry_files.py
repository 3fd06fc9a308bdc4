"""Inspection of model folders, and architectures from config.json."""

from __future__ import annotations

import hashlib
import json
import os
import struct

import pytest

from fix_registry import LLAMA, write_model, write_safetensors
from headrace_models.folder import INDEX
from headrace_registry.errors import DigestMismatch, ModelUnsupported
from headrace_registry.models.files import ReadProgress, Stopped, architecture_from, inspect_folder
from headrace_registry.sizing.headers import read_headers


def test_counts_and_bytes_are_exact(tmp_path):
    tensors = {"a": ("F32", (3, 5)), "b": ("BF16", (7,)), "c": ("BF16", ()), "d": ("I64", (2,))}
    inspection = inspect_folder(write_model(tmp_path / "m", tensors=tensors), reading=ReadProgress())

    assert inspection.weights.n_parameters == 15 + 7 + 1 + 2
    assert inspection.weights.weight_bytes == 60 + 14 + 2 + 16
    assert inspection.weights.parameters_by_dtype == {"F32": 15, "BF16": 8, "I64": 2}
    assert inspection.architecture.n_layers == 2
    assert inspection.tokenizer_digest == hashlib.sha256(b'{"version": "1.0"}').hexdigest()


def test_the_digest_changes_with_any_byte_and_not_with_other_files(tmp_path):
    first = inspect_folder(write_model(tmp_path / "a"), reading=ReadProgress())
    (tmp_path / "a" / "README.md").write_text("notes")
    again = inspect_folder(tmp_path / "a", reading=ReadProgress())
    other = inspect_folder(write_model(tmp_path / "b", seed=1), reading=ReadProgress())

    assert first.digest == again.digest
    assert first.digest.startswith("sha256:")
    assert first.digest != other.digest


def test_shards_are_summed_and_a_missing_one_is_named(tmp_path):
    folder = write_model(tmp_path / "m", tensors={"a": ("F32", (2,))})
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"b": ("F32", (3,))})
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    assert inspect_folder(folder, reading=ReadProgress()).weights.n_parameters == 5
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelUnsupported, match="00002-of-00002"):
        inspect_folder(folder, reading=ReadProgress())


@pytest.mark.parametrize("damage", [b"", b"\x01", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0[]", b"\x08\0\0\0\0\0\0\0not json"])
def test_a_damaged_file_is_named(tmp_path, damage):
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(damage)

    with pytest.raises(DigestMismatch, match=r"model\.safetensors"):
        inspect_folder(folder, reading=ReadProgress())


def test_a_cut_file_is_found_by_its_length(tmp_path):
    folder = write_model(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])

    with pytest.raises(DigestMismatch, match="fetch it again"):
        inspect_folder(folder, reading=ReadProgress())


@pytest.mark.parametrize(
    ("name", "content", "error", "match"),
    [
        ("model.safetensors", b"\xff" * 16, DigestMismatch, r"model\.safetensors is cut.*fetch it again"),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]", DigestMismatch, "no safetensors header; fetch it again"),
        ("config.json", b"{", ModelUnsupported, "m can't be loaded: config.json is no JSON.*fetch it again"),
        ("config.json", b"[]", ModelUnsupported, "m can't be loaded: config.json is no JSON object; fetch it again"),
        (INDEX, b"[]", ModelUnsupported, "index.json is no JSON object; fetch it again"),
        (INDEX, b'{"weight_map": {"a": "b.safetensors"}}', ModelUnsupported, r"lacks b\.safetensors, which .* names"),
        (INDEX, b'{"weight_map": {"a": "\\u0000"}}', ModelUnsupported, f"lacks safetensors files that {INDEX} names"),
    ],
)
def test_files_that_the_estimator_can_not_read_are_named(tmp_path, name, content, error, match):
    folder = write_model(tmp_path / "m")
    (folder / name).write_bytes(content)
    if name == INDEX:
        (folder / "model.safetensors").unlink()

    with pytest.raises(error, match=match):
        read_headers(folder)


def test_parameters_are_those_of_the_files_that_are_loaded(tmp_path):
    folder = write_model(tmp_path / "m")
    alone = inspect_folder(folder, reading=ReadProgress())
    write_safetensors(folder / "model.fp16.safetensors", {"model.norm.weight": ("F16", (80,))})
    write_safetensors(folder / "consolidated.safetensors", {"norm.weight": ("BF16", (80,))})
    beside = inspect_folder(folder, reading=ReadProgress())

    assert beside.weights == alone.weights
    assert read_headers(folder).profile().tally.n_kept == 336
    assert beside.digest != alone.digest


def test_a_quantized_folder_is_refused_by_its_config(tmp_path):
    folder = write_model(tmp_path / "m", config={**LLAMA, "quantization_config": {"quant_method": "gptq"}})

    with pytest.raises(ModelUnsupported, match=r"GPTQ.*full weights"):
        inspect_folder(folder, reading=ReadProgress(), full=True)


@pytest.mark.parametrize(("name", "match"), [("config.json", "transformers"), ("model.safetensors", "save_pretrained")])
def test_a_folder_without_config_or_weights_is_unsupported(tmp_path, name, match):
    folder = write_model(tmp_path / "m")
    (folder / name).unlink()

    with pytest.raises(ModelUnsupported, match=match):
        inspect_folder(folder, reading=ReadProgress())


def test_a_file_whose_name_is_no_text_is_named(tmp_path):
    folder = write_model(tmp_path / "m")
    (folder / os.fsdecode(b"tokenizer\xff.json")).write_text("{}")

    with pytest.raises(ModelUnsupported, match=r"'tokenizer\\udcff.json' is no UTF-8"):
        inspect_folder(folder, reading=ReadProgress())


@pytest.mark.parametrize("dtype", ["F\x0032", "F\ud800", "f32", "", "F" * 40])
def test_a_dtype_that_no_database_can_hold_is_no_header(tmp_path, dtype):
    folder = write_model(tmp_path / "m")
    header = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))

    with pytest.raises(DigestMismatch, match="no safetensors header"):
        inspect_folder(folder, reading=ReadProgress())


def test_a_header_of_many_dtypes_is_refused(tmp_path):
    folder = write_model(tmp_path / "m")
    entries = {f"t{n}": {"dtype": f"F{n}", "shape": [0], "data_offsets": [0, 0]} for n in range(65)}
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)

    with pytest.raises(ModelUnsupported, match="65 dtypes"):
        inspect_folder(folder, reading=ReadProgress())


def test_names_in_a_config_that_no_database_can_hold_count_as_none():
    found = architecture_from({**LLAMA, "model_type": "ll\x00ama", "architectures": ["Llama\ud800"]})

    assert (found.model_type, found.class_name) == ("", "")


@pytest.mark.parametrize("with_config", [False, True])
def test_a_folder_of_an_adapter_alone_is_refused_with_the_way_out(tmp_path, with_config):
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    if not with_config:
        (folder / "config.json").unlink()

    with pytest.raises(ModelUnsupported, match="it holds an adapter: merge it into its base model"):
        inspect_folder(folder, reading=ReadProgress())


def test_reading_stops_when_told(tmp_path):
    reading = ReadProgress()
    reading.stop.set()

    with pytest.raises(Stopped):
        inspect_folder(write_model(tmp_path / "m"), reading=reading)


def test_llama_names():
    found = architecture_from(LLAMA)

    assert (found.model_type, found.class_name) == ("llama", "LlamaForCausalLM")
    assert (found.n_layers, found.d_model, found.n_heads, found.n_kv_heads, found.d_head) == (2, 8, 4, 2, 2)
    assert (found.d_mlp, found.vocab_size, found.context_window, found.tied_embeddings) == (16, 32, 64, True)


def test_gpt2_names():
    config = {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    }
    found = architecture_from(config)

    assert (found.n_layers, found.d_model, found.n_heads, found.n_kv_heads, found.d_head) == (12, 768, 12, 12, 64)
    assert (found.d_mlp, found.context_window, found.tied_embeddings) == (3072, 1024, True)


def test_opt_and_neox_names():
    opt = {"model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    neox = {"model_type": "gpt_neox", "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}

    assert architecture_from(opt).d_mlp == 3072
    assert architecture_from(neox).d_head == 64
    assert architecture_from(neox).tied_embeddings is False
    assert architecture_from({"model_type": "bloom", "n_embed": 1024, "n_layer": 24}).d_model == 1024


def test_a_multimodal_config_is_read_through_its_text_part():
    config = {"model_type": "gemma3", "text_config": {"hidden_size": 640, "head_dim": 256, "num_attention_heads": 4}}

    assert architecture_from(config).d_head == 256


def test_nonsense_in_a_config_counts_as_nothing():
    config = {"model_type": None, "hidden_size": "big", "num_hidden_layers": -3, "architectures": [], "vocab_size": 1e9}

    assert architecture_from(config).d_model == 0
