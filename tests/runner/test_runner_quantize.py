"""Quantized weights: made once, loaded from then on, and compared with the full weights."""

from __future__ import annotations

import json

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from transformers import AutoModel

from fix_runner import N_LAYERS, load
from headrace_extractor.errors import ExtraMissing, FieldInvalid, LoadFailed, ModelUnsupported
from headrace_extractor.node.runner_protocol import Quantize
from headrace_extractor.runner.models import quantizers
from headrace_extractor.runner.models.probe import residuals, sample_ids
from headrace_extractor.runner.models.quantize import FIDELITY, quantize

QUANTIZATIONS = ("int8", "int4")


def quantize_to(target, source, quantization="int8", on_progress=lambda *_: None, **fields):
    command = Quantize(
        source_path=str(source),
        target_path=str(target),
        quantization=quantization,
        **({"dtype": "float32"} | fields),
    )
    return quantize(command, on_progress)


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory):
    """Folder and fidelity by quantization."""
    made = {}
    for quantization in QUANTIZATIONS:
        folder = tmp_path_factory.mktemp("quantized") / quantization
        made[quantization] = folder, quantize_to(folder, tiny_llama, quantization)
    return made


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_saved_weights_are_small_and_give_what_quantizing_gives(tiny_model, tmp_path, quantization):
    quantize_to(tmp_path / "q", tiny_model, quantization)
    saved = load(tmp_path / "q", quantization=quantization).model
    config = quantizers._BUILT_IN[quantization]().config()
    fresh = AutoModel.from_pretrained(tiny_model, quantization_config=config, dtype=torch.float32).eval()
    for module in fresh.modules():
        module.support_avx512bf16_for_cpu = False
    token_ids = sample_ids(tiny_model)

    assert {torch.int8, torch.uint8} & {parameter.dtype for parameter in saved.parameters()}
    assert (tmp_path / "q" / "model.safetensors").stat().st_size < (tiny_model / "model.safetensors").stat().st_size
    pairs = zip(residuals(saved, token_ids), residuals(fresh, token_ids), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_of_int8_does_not_depend_on_outliers_of_other_rows(quantized, dtype):
    model = load(quantized["int8"][0], quantization="int8", dtype=dtype).model
    layer = next(module for module in model.modules() if isinstance(module, Linear8bitLt))
    rows = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    rows[2:, ::7] *= 40
    with torch.inference_mode():
        together = layer(rows)
        alone = [layer(row.unsqueeze(0)).squeeze(0) for row in rows]
        weights = layer.weight.double() * layer.state.SCB.double().unsqueeze(1) / 127
    exact = rows.double() @ weights.T

    assert all(torch.equal(*pair) for pair in zip(together[:2], alone[:2], strict=True))
    torch.testing.assert_close(together, torch.stack(alone))
    errors = (together - exact).norm(dim=1) / exact.norm(dim=1)
    assert errors.max() < 0.02


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_fidelity_has_a_line_for_each_layer_and_is_kept_with_the_files(quantized, quantization):
    folder, fidelity = quantized[quantization]

    assert fidelity == json.loads((folder / FIDELITY).read_text())
    assert [line["layer"] for line in fidelity["layers"]] == list(range(N_LAYERS))
    assert fidelity["reference_dtype"] == "float32"
    assert fidelity["n_tokens"] == 384
    assert all(0.8 < line["cosine"] < 1 and 0 < line["relative_error"] < 0.6 for line in fidelity["layers"])


def test_more_bits_are_more_exact(quantized):
    errors = {q: [line["relative_error"] for line in quantized[q][1]["layers"]] for q in QUANTIZATIONS}

    assert all(int8 < int4 for int8, int4 in zip(errors["int8"], errors["int4"], strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_everything_else_is_in_the_dtype_of_the_load(quantized, quantization, dtype):
    loaded = load(quantized[quantization][0], quantization=quantization, dtype=dtype)
    floats = {parameter.dtype for parameter in loaded.model.parameters() if parameter.is_floating_point()}

    assert floats == {getattr(torch, dtype)}
    assert {acts.dtype for acts in residuals(loaded.model, [1, 2, 3])} == {getattr(torch, dtype)}


def test_scales_are_measured(quantized):
    loaded = load(quantized["int4"][0], quantization="int4")
    seen = sum(t.numel() * t.element_size() for t in (*loaded.model.parameters(), *loaded.model.buffers()))

    assert loaded.measured_bytes > seen


def test_progress_counts_the_source_twice(tiny_llama, tmp_path):
    seen = []
    quantize_to(tmp_path / "q", tiny_llama, on_progress=lambda done, total: seen.append((done, total)))

    total = 2 * (tiny_llama / "model.safetensors").stat().st_size
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == ((0, total), (total, total))
    assert len({done for done, _ in seen}) > 10


def test_finished_folder_is_only_read(quantized, tmp_path):
    folder, fidelity = quantized["int8"]

    assert quantize_to(folder, tmp_path / "gone") == fidelity


def test_tokenizer_and_names_come_along(tiny_llama, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "tokenizer_config.json").write_text("{}")
    (source / "model.gguf").write_text("not needed")
    quantize_to(tmp_path / "q", source)

    names = {path.name for path in (tmp_path / "q").iterdir()}
    assert {"tokenizer_config.json", "config.json", "model.safetensors", FIDELITY} <= names
    assert "model.gguf" not in names
    assert json.loads((tmp_path / "q" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_damaged_source_leaves_nothing_behind(tiny_llama, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes()[:40_000])
    with pytest.raises(LoadFailed):
        quantize_to(tmp_path / "q", source)

    assert list(tmp_path.iterdir()) == [source]


def test_quantized_files_are_not_quantized_again(quantized, tmp_path):
    with pytest.raises(ModelUnsupported, match="already"):
        quantize_to(tmp_path / "q", quantized["int8"][0], "int4")


def test_unquantized_files_are_not_taken_for_quantized_ones(tiny_llama):
    with pytest.raises(ModelUnsupported, match="prepare"):
        load(tiny_llama, quantization="int8")


def test_two_bits_need_a_plug_in(tiny_llama, tmp_path):
    with pytest.raises(ExtraMissing, match="entry point int2") as caught:
        quantize_to(tmp_path / "q", tiny_llama, "int2")
    assert caught.value.metadata["extra"] == "headrace.quantizers:int2"


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(quantizers, "find_spec", lambda _: None)

    with pytest.raises(ExtraMissing, match="bitsandbytes"):
        quantizers.quantizer_for("int8")


def test_unknown_quantization_is_refused():
    with pytest.raises(FieldInvalid, match="int3"):
        quantizers.quantizer_for("int3")


def test_plug_in_is_found_by_its_entry_point(tiny_llama, tmp_path, monkeypatch):
    """A plug-in makes and loads the files; this one is the built-in int8 under another name."""
    entry = type("Entry", (), {"load": lambda _: quantizers.Int8})()
    monkeypatch.setattr(quantizers, "entry_points", lambda **wanted: [entry] if wanted["name"] == "int2" else [])
    fidelity = quantize_to(tmp_path / "q", tiny_llama, "int2")

    assert len(fidelity["layers"]) == N_LAYERS
    assert load(tmp_path / "q", quantization="int2").measured_bytes > 0
