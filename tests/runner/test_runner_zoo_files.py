"""Every architecture from files as in a hub repository: saved with its head, loaded without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from fix_runner import documents, load, read_rows, run_command
from fix_zoo import ZOO, zoo_batch, zoo_config
from headrace_extractor.errors import FieldInvalid
from headrace_extractor.hookpoints.catalogue import Catalogue
from headrace_extractor.hookpoints.places import FINAL
from headrace_extractor.node.runner_protocol import Extract
from headrace_extractor.runner.hooks.binding import anatomy_of, bind
from headrace_extractor.runner.models.loading import stored_config
from headrace_extractor.runner.passes.forward import forward_rows
from headrace_models.config import Network

LAST = "blocks.2.hook_resid_post"


@pytest.fixture
def saved(tmp_path):
    def save(name):
        torch.manual_seed(0)
        kind = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
        model = kind.from_config(zoo_config(name), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return save


@pytest.mark.parametrize("name", ZOO)
def test_files_with_a_head_are_loaded_without(name, saved):
    path, model = saved(name)
    loaded = load(path).model
    document = documents(1, longest=20)[0]
    wanted = [LAST] if name == "bert" else [LAST, FINAL]
    rows = forward_rows(loaded, zoo_batch([document]), bind(loaded, wanted))
    with torch.inference_mode():
        out = model.base_model(input_ids=torch.from_numpy(document)[None].long(), output_hidden_states=True)

    final = rows[LAST] if name == "bert" else anatomy_of(loaded).catalogue.family.final
    if name != "bert":
        final = loaded.get_submodule(final)(rows[LAST])
    assert not hasattr(loaded, "lm_head")
    torch.testing.assert_close(final, out.last_hidden_state[0])


@pytest.mark.parametrize("name", ZOO)
def test_the_config_file_tells_what_the_loaded_model_has(name, saved):
    """ListHookpoints knows nothing but the files."""
    path, _ = saved(name)
    by_file = Catalogue(Network.of_config(stored_config(path))).offered
    points = anatomy_of(load(path).model).points

    assert {point.name: point for point in by_file} == points


def test_rows_of_an_encoder_are_its_hidden_states_document_by_document(saved, make_set, make_corpus):
    path, model = saved("bert")
    corpus = documents(12, longest=15)
    wanted = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(3))]
    folder = make_set(wanted, context_size=32, bos="none")
    command = Extract(set_id="x", set_path=str(folder), corpus_path=str(make_corpus(corpus)))
    rows = read_rows(folder, run_command(command, load(path))[-1].n_rows)

    starts = np.flatnonzero((np.diff(rows["position"], prepend=-9) != 1) | (np.arange(len(rows["position"])) % 32 == 0))
    assert len(starts) > len(corpus)
    for start, end in zip(starts, [*starts[1:], len(rows["token_id"])], strict=True):
        with torch.inference_mode():
            ids = torch.from_numpy(rows["token_id"][start:end])[None].long()
            states = model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
        for name, state in zip(wanted, states, strict=True):
            np.testing.assert_allclose(rows[name][start:end], state[0].numpy(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def multimodal(tmp_path):
    """Folder of a model whose text half has 64 positions."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**ZOO["gemma3"][1], "vocab_size": 97, "max_position_embeddings": 64},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=96,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).eval().save_pretrained(tmp_path / "multimodal")
    return tmp_path / "multimodal"


def test_the_text_half_of_a_multimodal_model_is_captured(multimodal):
    model = load(multimodal).model
    document = documents(1, longest=20)[0] % 90
    sites = bind(model, ["blocks.1.attn.hook_k", "blocks.1.hook_resid_pre"])
    rows = forward_rows(model, zoo_batch([document]), sites)
    with torch.inference_mode():
        ids = torch.from_numpy(document)[None].long()
        states = model(input_ids=ids, output_hidden_states=True).hidden_states

    assert rows["blocks.1.attn.hook_k"].shape[1] == 2 * 16
    assert torch.equal(rows["blocks.1.hook_resid_pre"], states[1][0])


def test_a_context_longer_than_the_text_half_has_positions_is_refused(multimodal, make_set, make_corpus):
    folder = make_set(["blocks.1.hook_resid_post"], context_size=65, batch_size=1)
    command = Extract(set_id="x", set_path=str(folder), corpus_path=str(make_corpus(documents(3))))

    with pytest.raises(FieldInvalid, match="the model has 64 positions") as caught:
        run_command(command, load(multimodal))
    assert caught.value.field == "spec.recipe.context_size"
