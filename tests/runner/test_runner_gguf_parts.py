"""GGUF files, whole and in parts: every tensor of every part is in the converted model, or there is none."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from fix_runner import load
from headrace_extractor.errors import LoadFailed, ModelUnsupported
from headrace_extractor.runner.models.convert import convert_gguf
from headrace_extractor.runner.models.gguf_files.settings import settings_left_out

VOCAB = 300
WIDTH = 32
N_LAYERS = 3


def tensors_of_llama():
    """Tensors of a small Llama by their names in GGUF files, in numpy's order of dimensions."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    tensors = {"token_embd.weight": random(VOCAB, WIDTH), "output_norm.weight": random(WIDTH)}
    for layer in range(N_LAYERS):
        block = f"blk.{layer}."
        tensors |= {
            f"{block}attn_norm.weight": random(WIDTH),
            f"{block}attn_q.weight": random(WIDTH, WIDTH),
            f"{block}attn_k.weight": random(WIDTH, WIDTH),
            f"{block}attn_v.weight": random(WIDTH, WIDTH),
            f"{block}attn_output.weight": random(WIDTH, WIDTH),
            f"{block}ffn_norm.weight": random(WIDTH),
            f"{block}ffn_gate.weight": random(48, WIDTH),
            f"{block}ffn_up.weight": random(48, WIDTH),
            f"{block}ffn_down.weight": random(WIDTH, 48),
        }
    return tensors


def write_gguf(path, tensors, *, split=0, merge="t 1", rope_base=10000.0, settings=lambda _writer: None):
    """Writes a file as llama.cpp's converter does; with `split`, parts of so many tensors."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(N_LAYERS)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_rope_freq_base(rope_base)
    settings(writer)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"t0123456789", *(f"t{index}" for index in range(VOCAB - 11))])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges([merge])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (file,) = write_gguf(folder / "tiny.gguf", tensors_of_llama())
    convert_gguf(file, folder / "out", lambda *_: None)
    return load_file(folder / "out" / "model.safetensors")


@pytest.fixture
def parts(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", tensors_of_llama(), split=8)


def test_a_file_in_parts_converts_to_the_numbers_of_the_whole_file(whole, parts, tmp_path):
    seen = []
    convert_gguf(parts[0], tmp_path / "out", lambda done, total: seen.append((done, total)))
    found = load_file(tmp_path / "out" / "model.safetensors")

    assert len(parts) == 4
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert seen[-1][0] == seen[-1][1] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", *(part.name for part in parts)]


def test_a_part_that_is_absent_is_named(parts, tmp_path):
    parts[2].unlink()

    with pytest.raises(ModelUnsupported, match=r"tiny-00003-of-00004.gguf"):
        convert_gguf(parts[0], tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_not_the_first_names_the_first(parts, tmp_path):
    with pytest.raises(ModelUnsupported, match=r"give tiny-00001-of-00004.gguf"):
        convert_gguf(parts[1], tmp_path / "out", lambda *_: None)


def test_parts_under_other_names_are_refused_with_the_names_they_need(parts, tmp_path):
    renamed = shutil.move(parts[0], tmp_path / "first.gguf")

    with pytest.raises(ModelUnsupported, match="one of 4 parts; name them NAME-00001-of-00004"):
        convert_gguf(renamed, tmp_path / "out", lambda *_: None)


def test_a_part_of_another_place_is_refused(parts, tmp_path):
    shutil.copyfile(parts[1], parts[2])

    with pytest.raises(ModelUnsupported, match=r"tiny-00003-of-00004.gguf is not part 3 of 4"):
        convert_gguf(parts[0], tmp_path / "out", lambda *_: None)


def test_a_vocabulary_that_contradicts_itself_is_refused(tmp_path):
    """The library of tokenizers raises no narrower error than Exception."""
    (file,) = write_gguf(tmp_path / "tiny.gguf", tensors_of_llama(), merge="nowhere 1")

    with pytest.raises(ModelUnsupported, match="out of vocabulary"):
        convert_gguf(file, tmp_path / "out", lambda *_: None)


def test_a_tensor_that_the_file_lacks_is_an_error_with_its_name(tmp_path):
    tensors = tensors_of_llama()
    del tensors["blk.1.ffn_up.weight"]
    (file,) = write_gguf(tmp_path / "tiny.gguf", tensors)

    with pytest.raises(LoadFailed, match=r"model.layers.1.mlp.up_proj.weight"):
        convert_gguf(file, tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("held", "absent"), [("gate", "up"), ("up", "gate")])
def test_half_of_an_expert_is_an_error_with_the_name_of_the_other_half(tmp_path, held, absent):
    """transformers puts both halves into one weight, and zeros in place of an absent one."""
    whole = {f"blk.0.ffn_{half}_exps.weight": np.ones((2, 4, WIDTH), np.float32) for half in ("gate", "up")}
    half = {f"blk.1.ffn_{held}_exps.weight": np.ones((2, 4, WIDTH), np.float32)}
    (file,) = write_gguf(tmp_path / "tiny.gguf", tensors_of_llama() | whole | half)

    with pytest.raises(LoadFailed, match=rf"lacks 1 weight \(blk\.1\.ffn_{absent}_exps\.weight\)"):
        convert_gguf(file, tmp_path / "out", lambda *_: None)


def test_a_tensor_that_transformers_leaves_out_is_refused(tmp_path):
    (file,) = write_gguf(tmp_path / "tiny.gguf", tensors_of_llama() | {"blk.0.attn_q.bias": np.ones(WIDTH, np.float32)})

    with pytest.raises(ModelUnsupported, match=r"leaves out 1 weight \(blk.0.attn_q.bias\)"):
        convert_gguf(file, tmp_path / "out", lambda *_: None)


def test_the_scaled_rotations_of_newer_llamas_are_those_of_their_safetensors(tmp_path):
    """Their GGUF files hold the factors as a tensor, and no setting tells of them."""
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    (plain,) = write_gguf(tmp_path / "plain.gguf", tensors_of_llama())
    convert_gguf(plain, tmp_path / "reference", lambda *_: None)
    shutil.copytree(tmp_path / "reference", tmp_path / "unscaled")
    config = json.loads((tmp_path / "reference" / "config.json").read_text())
    (tmp_path / "reference" / "config.json").write_text(json.dumps(config | {"rope_parameters": scaling}))
    reference = AutoModel.from_pretrained(tmp_path / "reference").eval()
    unscaled = 1.0 / 10000.0 ** (np.arange(0, 8, 2) / 8)
    factors = (unscaled / reference.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() > 4
    (tmp_path / "scaled").mkdir()
    (file,) = write_gguf(tmp_path / "scaled" / "tiny.gguf", tensors_of_llama() | {"rope_freqs.weight": factors})
    convert_gguf(file, tmp_path / "out", lambda *_: None)
    ours = load(tmp_path / "out").model

    torch.testing.assert_close(ours.rotary_emb.inv_freq, reference.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    ids = torch.arange(60)[None]
    with torch.inference_mode():
        found, expected, without = (
            model(input_ids=ids).last_hidden_state for model in (ours, reference, load(tmp_path / "unscaled").model)
        )
    # Weights of such size make attention jump at the least change of an angle.
    assert (found - expected).abs().max() < 0.01 * (without - expected).abs().max()


def test_rotations_of_another_width_are_refused(tmp_path):
    factors = {"rope_freqs.weight": np.ones(7, np.float32)}
    (file,) = write_gguf(tmp_path / "tiny.gguf", tensors_of_llama() | factors)

    with pytest.raises(ModelUnsupported, match=r"leaves out 1 weight \(rope_freqs.weight\)"):
        convert_gguf(file, tmp_path / "out", lambda *_: None)


def scaled(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def unscaled(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_rope_scaling_factor(1.0)
    writer.add_sliding_window(64)  # As long as the context: it leaves out nothing.


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (scaled, r"rope\.scaling\.factor = 4"),
        (lambda writer: writer.add_float32("llama.rope.scale_linear", 2.0), r"rope\.scaling\.factor = 2"),
        (lambda writer: writer.add_sliding_window(8), r"attention\.sliding_window = 8"),
        (lambda writer: writer.add_float32("llama.residual_scale", 0.25), r"residual_scale = 0\.25"),
        (lambda writer: writer.add_causal_attention(value=False), r"attention\.causal = False"),
    ],
)
def test_a_setting_that_transformers_leaves_out_is_refused(tmp_path, settings, named):
    (file,) = write_gguf(tmp_path / "tiny.gguf", tensors_of_llama(), settings=settings)

    with pytest.raises(ModelUnsupported, match=rf"leaves out settings of tiny\.gguf \({named}\)"):
        convert_gguf(file, tmp_path / "out", lambda *_: None)


def test_settings_that_the_config_has_or_that_change_nothing_are_no_reason(tmp_path):
    (file,) = write_gguf(tmp_path / "tiny.gguf", tensors_of_llama(), rope_base=500_000.0, settings=unscaled)

    convert_gguf(file, tmp_path / "out", lambda *_: None)

    assert AutoModel.from_pretrained(tmp_path / "out").config.rope_parameters["rope_theta"] == 500_000.0


@pytest.mark.parametrize(
    ("model_type", "settings", "left_out"),
    [
        ("starcoder2", {"rope.freq_base": 1e6, "attention.layer_norm_epsilon": 1e-5}, ["rope.freq_base"]),
        ("starcoder2", {"rope.freq_base": 10_000.0, "attention.layer_norm_epsilon": 1e-6}, ["layer_norm_epsilon"]),
        ("phi3", {"context_length": 4096, "attention.sliding_window": 2047}, ["attention.sliding_window"]),
        ("phi3", {"rope.dimension_count": 96}, []),
        ("phi3", {"rope.dimension_count": 72}, ["rope.dimension_count"]),
        ("stablelm", {"rope.dimension_count": 20}, []),
        ("gemma3_text", {"rope.freq_base": 1e6, "attention.sliding_window": 4096}, []),
        ("gemma3_text", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, ["rope.scaling.factor"]),
        ("gemma2", {"attn_logit_softcapping": 50.0}, []),
        ("gemma2", {"attn_logit_softcapping": 30.0}, ["attn_logit_softcapping"]),
    ],
)
def test_settings_are_looked_for_under_the_names_that_each_architecture_has(tmp_path, model_type, settings, left_out):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", model_type)
    for name, value in settings.items():
        kind = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)]
        kind(f"{model_type}.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()

    found = settings_left_out(AutoConfig.for_model(model_type), tmp_path / "tiny.gguf")

    assert [name.split(" = ")[0].removeprefix("attention.") for name in found] == [
        name.removeprefix("attention.") for name in left_out
    ]


def test_the_largest_gemma_2_is_refused_since_its_file_does_not_tell_its_scale_of_attention(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    config = AutoConfig.for_model(
        "gemma2", num_hidden_layers=46, hidden_size=4608, num_attention_heads=32, head_dim=128
    )

    assert settings_left_out(config, tmp_path / "tiny.gguf") == ["query_pre_attn_scalar = 144"]
