"""Configs whose registration is refused, since no hookpoint of their models can be captured."""

from __future__ import annotations

import json

import pytest

from fix_registry import LLAMA, write_model
from headrace_models.unsupported import why_unsupported
from headrace_registry.errors import ModelUnsupported
from headrace_registry.hub.choice import choose
from headrace_registry.hub.faults import Unusable
from headrace_registry.models.files import ReadProgress, inspect_folder
from headrace_registry.models.registration import problem_in


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_type": "t5"}, "an encoder with a decoder"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "an encoder with a decoder"),
        ({"model_type": "gemma3n"}, "several streams"),
        ({"model_type": "gemma3n_text"}, "several streams"),
        ({"model_type": "longformer"}, "multiple of its window"),
        ({"model_type": "xlnet"}, "tokens before sequences"),
        ({"model_type": "vit"}, "no text"),
        ({"model_type": "wav2vec2"}, "no text"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_registration_of_what_can_not_be_captured_is_refused_with_the_reason(config, match, tmp_path):
    folder = write_model(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))

    with pytest.raises(ModelUnsupported, match=match) as caught:
        inspect_folder(folder, reading=ReadProgress())
    assert repr(config["model_type"]) in caught.value.message


def test_the_call_that_registers_a_folder_and_the_choice_of_a_repos_files_refuse_it_too(tmp_path):
    folder = write_model(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({**LLAMA, "model_type": "xlnet"}))

    assert "tokens before sequences" in problem_in(str(folder))
    with pytest.raises(Unusable, match="owner/t5 can't be loaded: no hookpoint of a model of type 't5'"):
        choose("owner/t5", {"model.safetensors", "config.json"}, {"model_type": "t5"}, {})


@pytest.mark.parametrize("model_type", ["llama", "bert", "mamba", "modernbert", "gpt2", "opt", "abacus", ""])
def test_nothing_is_held_against_other_configs(model_type):
    assert why_unsupported({"model_type": model_type, "is_encoder_decoder": False}) == ""
