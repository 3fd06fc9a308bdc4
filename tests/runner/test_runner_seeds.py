"""The models that the project's seeds name, by their published configs: registered, resolved, loaded, captured."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from fix_runner import load, read_rows, run_command
from fix_seeds import N_LAYERS, SEEDS, save_seed
from headrace_extractor.corpora.tokenizer import Tokenizer
from headrace_extractor.errors import HookpointNotFound
from headrace_extractor.hookpoints.catalogue import Catalogue
from headrace_extractor.node.runner_protocol import Extract
from headrace_extractor.runner.hooks.binding import anatomy_of, bind
from headrace_models.config import Network
from headrace_registry.models.files import ReadProgress, inspect_folder

TEXT = "The weather in the north is colder than the weather in the other towns.\nSo they say: 12 < 13, é."
STREAM = tuple(f"blocks.{layer}.hook_resid_{side}" for layer in range(N_LAYERS) for side in ("pre", "post"))


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("seeds") / name
            made[name] = (folder, *save_seed(name, folder))
        return made[name]

    return make


@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_is_inspected_as_it_was_published(name, seed):
    folder, model, _ = seed(name)
    found = inspect_folder(folder, reading=ReadProgress())

    assert found.architecture.model_type == SEEDS[name][0]["model_type"]
    assert found.architecture.n_layers == N_LAYERS
    assert found.weights.n_parameters == model.num_parameters()
    assert found.tokenizer_digest


@pytest.mark.parametrize("name", SEEDS)
def test_rows_of_a_seed_are_its_hidden_states_on_its_own_tokens(name, seed, make_set, make_corpus):
    folder, model, _ = seed(name)
    ids = Tokenizer.load(folder).encode_batch([TEXT])[0]
    loaded = load(folder)
    width = model.config.hidden_size
    target = make_set(STREAM, width=width, context_size=128, packing="one_document", bos="none")
    command = Extract(set_id="x", set_path=str(target), corpus_path=str(make_corpus([ids])))
    rows = read_rows(target, run_command(command, loaded)[-1].n_rows)

    assert ids.tolist() == AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False).input_ids
    assert rows["token_id"].tolist() == ids.tolist()
    with torch.inference_mode():
        states = model(torch.from_numpy(ids)[None].long(), output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS):
        assert torch.equal(torch.from_numpy(rows[f"blocks.{layer}.hook_resid_pre"]), states[layer][0])
        if layer + 1 < N_LAYERS:
            assert torch.equal(torch.from_numpy(rows[f"blocks.{layer}.hook_resid_post"]), states[layer + 1][0])


@pytest.mark.parametrize("name", SEEDS)
def test_the_config_of_a_seed_tells_the_hookpoints_that_its_model_has(name, seed):
    folder, _, _ = seed(name)
    by_file = Catalogue(Network.of_config(json.loads((folder / "config.json").read_text()))).offered

    assert {point.name: point for point in by_file} == anatomy_of(load(folder).model).points


def test_opt_350m_has_the_residual_stream_alone(seed):
    folder, _, _ = seed("opt-350m")
    model = load(folder).model
    offered = {name for name, point in anatomy_of(model).points.items() if not point.unavailable}

    assert offered == set(STREAM)
    with pytest.raises(HookpointNotFound, match="normalise the residual stream"):
        bind(model, ["blocks.0.hook_attn_out"])
