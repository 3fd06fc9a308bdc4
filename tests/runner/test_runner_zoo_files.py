"""Every architecture from files, as a hub repository holds them: the model with its head, loaded without."""

from __future__ import annotations

import pytest
import torch
from fix_runner import documents, load
from fix_zoo import ZOO, zoo_batch, zoo_config
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from extractor_service.hookpoints import Catalogue
from extractor_service.network import Network
from extractor_service.places import FINAL
from extractor_service.runner.forward import forward_rows
from extractor_service.runner.hookpoints import anatomy_of, resolve
from extractor_service.runner.loading import stored_config

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
    rows = forward_rows(loaded, zoo_batch([document]), resolve(loaded, wanted))
    with torch.inference_mode():
        out = model.base_model(input_ids=torch.from_numpy(document)[None].long(), output_hidden_states=True)

    final = rows[LAST] if name == "bert" else anatomy_of(loaded).catalogue.family.final
    if name != "bert":
        final = loaded.get_submodule(final)(rows[LAST])
    assert not hasattr(loaded, "lm_head")
    torch.testing.assert_close(final, out.last_hidden_state[0])


@pytest.mark.parametrize("name", ZOO)
def test_the_config_file_tells_what_the_loaded_model_has(name, saved):
    """ListHookpoints has no more to go by."""
    path, _ = saved(name)
    by_file = Catalogue(Network.of_config(stored_config(path))).offered
    points = anatomy_of(load(path).model).points

    assert {point.name: point for point in by_file} == points
