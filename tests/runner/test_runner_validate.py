"""Validation of a model, in this process and in a runner of its own."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_runner_quantize import quantize_to
from transformers import MistralConfig, MistralForCausalLM

from headrace_extractor.node.runner_protocol import Load, Loaded, Step, Validate, Validated
from headrace_extractor.runner.models import validate as profile
from headrace_extractor.runner.models.validate import validate

STEPS = ["dry_load", "load", "forward", "finite", "parity"]


def run(path, **fields):
    """Returns the last event of each step, by name."""
    seen = []
    command = Validate(files_path=str(path), **({"device": "cpu", "dtype": "float32"} | fields))
    validated = validate(command, seen.append)
    assert [step.name for step in seen if step.state == "RUNNING"] == STEPS[: len(STEPS) - _skipped(seen)]
    assert validated.versions["torch"]
    return {step.name: step for step in seen}


def _skipped(seen):
    return sum(step.state == "SKIPPED" for step in seen)


def states(steps):
    return [steps[name].state for name in STEPS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_good_model_passes_with_figures(tiny_model, dtype):
    steps = run(tiny_model, dtype=dtype)

    assert states(steps) == ["PASSED"] * 5
    assert steps["dry_load"].figures["n_parameters"] > 10_000
    assert steps["load"].figures["measured_bytes"] > 10_000
    assert steps["forward"].figures["n_tokens"] == 128
    assert steps["finite"].figures["n_non_finite"] == 0
    assert steps["parity"].figures["min_cosine"] > 0.999
    assert "max_abs_difference" in steps["parity"].figures


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_model_passes(tiny_llama, tmp_path, quantization):
    quantize_to(tmp_path / "q", tiny_llama, quantization)

    assert states(run(tmp_path / "q", quantization=quantization)) == ["PASSED"] * 5


def test_missing_weight_fails_the_dry_load_and_skips_the_rest(tiny_llama, tmp_path):
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    steps = run(path)

    assert states(steps) == ["FAILED"] + ["SKIPPED"] * 4
    assert steps["dry_load"].reason == "LOAD_FAILED"
    assert "up_proj" in steps["dry_load"].message


def test_missing_weight_of_quantized_files_fails_the_dry_load(tiny_llama, tmp_path):
    quantize_to(tmp_path / "q", tiny_llama)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})

    assert states(run(tmp_path / "q", quantization="int8"))[0] == "FAILED"


def test_option_that_the_model_does_not_have_fails_before_the_load(tiny_llama):
    steps = run(tiny_llama, load_options={"sliding_window": 4})

    assert states(steps)[:2] == ["FAILED", "SKIPPED"]
    assert steps["dry_load"].reason == "FIELD_INVALID"


def test_values_that_are_not_finite_are_found(tiny_llama, tmp_path):
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"].fill_(1e30)
    tensors["model.layers.2.mlp.up_proj.weight"].fill_(1e30)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    steps = run(path)

    assert states(steps) == ["PASSED", "PASSED", "PASSED", "FAILED", "SKIPPED"]
    assert steps["finite"].reason == "NON_FINITE"
    assert steps["finite"].figures["n_non_finite"] > 0


def test_difference_from_plain_transformers_is_found(tiny_llama, monkeypatch):
    real = profile.residuals
    monkeypatch.setattr(profile, "residuals", lambda *given: [acts + 0.01 for acts in real(*given)])
    steps = run(tiny_llama)

    assert states(steps) == ["PASSED"] * 4 + ["FAILED"]
    assert steps["parity"].figures["max_abs_difference"] == pytest.approx(0.01, rel=0.1)


def test_figures_are_numbers_that_json_knows(tiny_llama, monkeypatch):
    monkeypatch.setattr(profile, "residuals", lambda *_: [torch.full((128, 32), torch.nan)] * 4)

    json.dumps({name: dict(step.figures) for name, step in run(tiny_llama).items()}, allow_nan=False)


def test_runner_answers_step_by_step_and_holds_nothing_afterwards(tiny_llama, start_runner):
    runner = start_runner()
    runner.send(Validate(files_path=str(tiny_llama), device="cpu", dtype="float32"))
    runner.until(Validated, deadline_s=60)

    assert [event.name for event in runner.seen if isinstance(event, Step) and event.state == "PASSED"] == STEPS
    runner.send(Load(files_path=str(tiny_llama), device="cpu", dtype="float32"))
    runner.until(Loaded)


def test_load_options_are_tried_as_a_load_takes_them(tmp_path):
    """Numbers come as floats through the contract."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=64,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "m")
    steps = run(tmp_path / "m", load_options={"sliding_window": 8.0})

    assert steps["dry_load"].state == steps["load"].state == "PASSED"


def test_an_unknown_load_option_fails_the_first_step(tiny_llama):
    assert run(tiny_llama, load_options={"unheard_of": 1})["dry_load"].state == "FAILED"
