"""Each load option takes effect or is refused with the reason."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from fix_runner import load, save_model
from fix_zoo import zoo_config
from headrace_extractor.errors import DeviceOom, FieldInvalid
from headrace_extractor.runner.models import load_options
from headrace_extractor.runner.models.probe import residuals

IDS = list(range(3, 60))


@pytest.fixture(scope="module")
def tiny_mistral(tmp_path_factory):
    config = MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=256,
    )
    return save_model(MistralForCausalLM, config, tmp_path_factory.mktemp("mistral"))


def rows(path, **options):
    return residuals(load(path, load_options=options).model, IDS)[-1]


def test_scaled_rope_changes_what_comes_out(tiny_llama):
    plain = rows(tiny_llama)
    scaled = rows(tiny_llama, rope_scaling={"rope_type": "linear", "factor": 4.0})

    assert torch.equal(plain[0], scaled[0])  # Position 0 is not rotated.
    assert not torch.allclose(plain, scaled, atol=1e-3)
    assert torch.equal(plain, rows(tiny_llama, rope_scaling=None))
    assert torch.equal(scaled, rows(tiny_llama, rope_scaling={"type": "linear", "factor": 4.0}))


@pytest.mark.parametrize("name", ["gpt_neox", "glm4", "phi"])
def test_a_rotation_of_some_dimensions_stays_one_whatever_the_scaling(name, tmp_path):
    path = save_model(AutoModelForCausalLM.from_config, zoo_config(name), tmp_path / name)
    plain = rows(path)

    assert torch.equal(plain, rows(path, rope_scaling=None))
    assert torch.equal(plain, rows(path, rope_scaling={"rope_type": "linear", "factor": 1.0}))
    assert not torch.allclose(plain, rows(path, rope_scaling={"rope_type": "linear", "factor": 4.0}), atol=1e-3)


def test_sliding_window_changes_rows_behind_it_only(tiny_mistral):
    plain, windowed = rows(tiny_mistral), rows(tiny_mistral, sliding_window=8)

    assert torch.allclose(plain[:8], windowed[:8], atol=1e-4)
    assert not torch.allclose(plain[8:], windowed[8:], atol=1e-3)


def test_window_can_be_taken_away(tiny_mistral):
    assert torch.equal(rows(tiny_mistral), rows(tiny_mistral, sliding_window=None))


def test_options_that_say_what_is_the_case_change_nothing(tiny_llama):
    same = {
        "device_map": "auto",
        "max_memory": {"cpu": "1GiB"},
        "low_cpu_mem_usage": True,
        "use_fast": True,
        "trust_remote_code": False,
        "attn_implementation": "sdpa",
    }

    assert torch.equal(rows(tiny_llama), rows(tiny_llama, **same))


def test_code_is_trusted_only_if_the_options_say_so(tiny_llama, monkeypatch):
    seen = []
    real = load_options.AutoConfig.from_pretrained
    monkeypatch.setattr(
        load_options.AutoConfig,
        "from_pretrained",
        lambda *given, **named: seen.append(named["trust_remote_code"]) or real(*given, **named),
    )
    load(tiny_llama)
    load(tiny_llama, load_options={"trust_remote_code": True})

    assert seen == [False, True]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_fast", False),
        ("low_cpu_mem_usage", False),
        ("device_map", "cuda:1"),
        ("device_map", {"": "cpu", "layers": 0}),
        ("max_memory", {"0": "1GiB"}),
        ("max_memory", {"cpu": "a lot"}),
        ("sliding_window", 8),
        ("rope_scaling", {"rope_type": "yarn"}),
        ("attn_implementation", "flash_attention_2"),
    ],
)
def test_option_that_can_not_take_effect_is_refused_by_name(tiny_llama, option, value):
    with pytest.raises(FieldInvalid, match=option) as caught:
        load(tiny_llama, load_options={option: value})
    assert caught.value.field == f"load_options.{option}"


def test_rope_of_a_model_without_is_refused(tiny_gpt2):
    with pytest.raises(FieldInvalid, match="no rotary"):
        load(tiny_gpt2, load_options={"rope_scaling": {"rope_type": "linear", "factor": 2.0}})


def test_max_memory_below_the_weights_is_out_of_memory(tiny_llama):
    with pytest.raises(DeviceOom, match="max_memory allows 1000"):
        load(tiny_llama, load_options={"max_memory": {"cpu": "1KB"}})


@pytest.mark.parametrize(
    ("text", "n_bytes"), [(7, 7), ("7", 7), ("7B", 7), ("2KB", 2000), ("2 KiB", 2048), ("1.5GiB", 3 * 2**29)]
)
def test_sizes_are_read_as_transformers_writes_them(text, n_bytes):
    assert load_options.max_bytes_of({"max_memory": {"cpu": text}}, torch.device("cpu")) == n_bytes
