"""A registered folder whose files change: no row of one model is ever among those of another."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from fix_system import PATIENCE_S, eventually, texts
from headrace_client import Recipe
from headrace_client.errors import LoadFailed, ModelChanged, ModelInUse

WEIGHTS = "model.safetensors"
FIRST, SECOND = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"
ALONE = Recipe(context_size=64, batch_size=1, packing="one_document")


@pytest.fixture
def folder(text_llama):
    """A model of this test, in a folder of its own."""
    made = shutil.copytree(text_llama, text_llama.with_name(f"own-{time.monotonic_ns()}"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def model_id(system, folder):
    system.add_model(folder.name, folder)
    yield folder.name
    system.client.models.delete(folder.name, force=True)


def other_weights(folder):
    """Writes other numbers into the file, which keeps its name, its size and its inode."""
    path = folder / WEIGHTS
    tensors = {name: tensor * 1.5 for name, tensor in load_file(path).items()}
    scratch = path.with_name("scratch")
    save_file(tensors, scratch, metadata={"format": "pt"})
    written = scratch.read_bytes()
    scratch.unlink()
    assert len(written) == path.stat().st_size
    with path.open("r+b") as file:
        file.write(written)


def prepared_again(system, model_id, folder):
    """Registers and prepares as `headrace models add` does; None while an extraction still holds a lease."""
    try:
        model = system.client.models.register(folder=folder, id=model_id)
    except ModelInUse:
        return None
    assert model.state == "REGISTERED"
    system.client.models.prepare(model_id)
    return system.client.models.wait_ready(model_id, deadline_s=PATIENCE_S)


def start(system, model_id, corpus_id, hookpoint):
    return system.client.extractions.start(model_id, corpus_id, hookpoint, recipe=ALONE)


def extracted(system, model_id, corpus_id, hookpoint):
    started = start(system, model_id, corpus_id, hookpoint)
    return system.client.extractions.wait(started.id, deadline_s=PATIENCE_S)


def rows_of(system, extraction, hookpoint):
    with system.client.chunks(extraction, ("token_id", "document", hookpoint)) as stream:
        parts = [{name: np.array(values) for name, values in chunk.arrays.items()} for chunk in stream]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_no_set_holds_rows_of_two_models(system, folder, model_id):
    corpus_id = system.variant(texts(20))
    first = extracted(system, model_id, corpus_id, FIRST)
    commit = system.client.models.get(model_id).commit_sha
    other_weights(folder)
    # Neither the cached rows of the old weights nor rows of the new ones belong to this commit now.
    for hookpoint in (FIRST, SECOND):
        with pytest.raises(ModelChanged, match=WEIGHTS):
            start(system, model_id, corpus_id, hookpoint)
    again = eventually(lambda: prepared_again(system, model_id, folder), "the last lease has ended")
    assert again.commit_sha != commit
    second = extracted(system, model_id, corpus_id, SECOND)
    third = extracted(system, model_id, corpus_id, FIRST)

    assert second.set_id == third.set_id != first.set_id
    left, right = rows_of(system, third, FIRST), rows_of(system, second, SECOND)
    assert np.array_equal(left[FIRST], right[SECOND])
    reference = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    here = left["document"] == 0
    with torch.inference_mode():
        ids = torch.from_numpy(left["token_id"][here].astype(np.int64))[None]
        states = reference(input_ids=ids, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(left[FIRST][here], states[2][0].numpy(), rtol=1e-4, atol=1e-4)


def test_weights_that_could_not_be_loaded_load_once_they_are_mended_and_prepared(system, folder):
    whole = (folder / WEIGHTS).read_bytes()
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    system.add_model(folder.name, folder)
    corpus_id = system.variant(texts(3))
    try:
        with pytest.raises(LoadFailed, match=r"up_proj.*prepare the model again"):
            extracted(system, folder.name, corpus_id, FIRST)
        (folder / WEIGHTS).write_bytes(whole)
        eventually(lambda: prepared_again(system, folder.name, folder), "the last lease has ended")

        assert extracted(system, folder.name, corpus_id, FIRST).n_rows > 0
    finally:
        system.client.models.delete(folder.name, force=True)


def test_a_changed_tokenizer_is_noticed_before_a_text_becomes_other_tokens(system, folder, model_id):
    corpus_id = system.variant(texts(5))
    extracted(system, model_id, corpus_id, FIRST)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"</s>"', '"</S>"'))

    with pytest.raises(ModelChanged, match=r"tokenizer\.json"):
        start(system, model_id, corpus_id, FIRST)
