"""Facts of a model's card: kept from the hub's answer, or from the README of a local folder."""

from __future__ import annotations

import asyncio
import json

import pytest

from fix_registry import LLAMA, register_folder, until_state, write_model
from headrace.registry.v1 import model_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace_registry.models.cards import CARD_FILE, card_of
from headrace_registry.models.models import ModelCard

README = """---
license: other
license_name: "my-licence"
license_link: https://example.org/licence  # see there
tags: [text]
---
# A model
license: gpl-3.0
"""


@pytest.mark.parametrize(
    ("readme", "card"),
    [
        (README, ModelCard(license="my-licence", license_link="https://example.org/licence")),
        ("---\nlicense: apache-2.0\n---\n", ModelCard(license="apache-2.0")),
        ("# no block\nlicense: mit\n", ModelCard()),
        ("---\nlicense: |\n---\n", ModelCard(license="|")),
        ("", ModelCard()),
    ],
)
def test_the_readme_of_a_folder_names_its_licence(tmp_path, readme, card):
    (tmp_path / "README.md").write_text(readme)

    assert card_of(tmp_path, {}) == card


def test_the_hub_s_answer_comes_before_the_readme(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / CARD_FILE).write_text(json.dumps({"license": "llama3", "license_link": None}))

    assert card_of(tmp_path, {}) == ModelCard(license="llama3")


@pytest.mark.parametrize("content", ["[]", "null", "{", "[" * 100_000, "\x00"])
def test_a_damaged_card_is_no_card(tmp_path, content):
    (tmp_path / CARD_FILE).write_text(content)

    assert card_of(tmp_path, {}) == ModelCard()


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": 7}, ""),
        ({}, ""),
    ],
)
def test_the_config_names_the_dtype_it_was_published_in(tmp_path, config, dtype):
    assert card_of(tmp_path, config).dtype == dtype


async def test_a_ready_model_has_its_card(registry, tmp_path):
    folder = tmp_path / "tiny"
    await asyncio.to_thread(write_model, folder, config=LLAMA | {"torch_dtype": "bfloat16"})
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    registered = await register_folder(registry.stubs, folder, "tiny")
    await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="tiny"), timeout=20)
    model = await until_state(registry.stubs, "tiny", model_pb2.MODEL_STATE_READY)

    assert not registered.HasField("card")
    assert (model.card.license, model.card.dtype, model.architecture.context_window) == ("apache-2.0", "bfloat16", 64)
