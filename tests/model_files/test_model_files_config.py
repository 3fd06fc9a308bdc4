"""Shapes of networks from config.json: every family of the zoo, spellings that only one service once knew, nonsense."""

# ruff: noqa: PLC0415 -- transformers is imported by the tests that need it, not by every run

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fix_zoo import ZOO
from headrace_models.config import Network
from headrace_models.errors import ConfigInvalid, JsonInvalid
from headrace_models.json_files import MAX_JSON_BYTES, read_object

# Key/value heads, width of a head, width of the MLP, positions, whether embeddings are tied. All networks have 3 layers
# of 4 heads, 32 numbers in the residual stream, and 97 tokens.
KNOWN = {
    "arcee": (2, 8, 48, 64, False),
    "bert": (4, 8, 48, 64, True),
    "bloom": (4, 8, 128, 0, True),
    "falcon": (1, 8, 128, 2048, True),
    "falcon-alibi": (4, 8, 128, 2048, True),
    "falcon-new": (2, 8, 128, 2048, True),
    "falcon-serial": (4, 8, 128, 2048, True),
    "gemma": (2, 16, 48, 64, True),
    "gemma2": (2, 16, 48, 64, True),
    "gemma3": (2, 16, 48, 64, True),
    "glm4": (2, 8, 48, 64, False),
    "gpt2": (4, 8, 128, 64, True),
    "gpt_neo": (4, 8, 48, 64, True),
    "gpt_neox": (4, 8, 48, 64, False),
    "gpt_neox-serial": (4, 8, 48, 64, False),
    "gptj": (4, 8, 128, 64, False),
    "granite": (2, 8, 48, 64, False),
    "helium": (2, 8, 48, 64, False),
    "llama": (2, 8, 48, 64, False),
    "ministral": (2, 8, 48, 64, False),
    "mistral": (2, 8, 48, 64, False),
    "mixtral": (2, 8, 48, 64, False),
    "olmo": (2, 8, 48, 64, False),
    "olmo2": (2, 8, 48, 64, False),
    "olmo3": (2, 8, 48, 64, False),
    "opt": (4, 8, 48, 64, True),
    "phi": (4, 8, 48, 64, False),
    "phi3": (2, 8, 48, 64, False),
    "qwen2": (2, 8, 48, 64, False),
    "qwen2_moe": (2, 8, 48, 64, False),
    "qwen3": (2, 16, 48, 64, False),
    "qwen3_moe": (2, 16, 48, 64, False),
    "seed_oss": (2, 8, 48, 64, False),
    "smollm3": (2, 8, 48, 64, True),
    "starcoder2": (2, 8, 48, 64, True),
}


@pytest.mark.parametrize("name", ZOO)
def test_a_saved_config_tells_the_numbers_of_its_family(name, tmp_path):
    from fix_zoo import zoo_config

    zoo_config(name).save_pretrained(tmp_path)
    found = Network.of_config(read_object(tmp_path / "config.json"))

    assert found.model_type == ZOO[name][0]
    assert (found.n_layers, found.n_heads, found.d_model, found.vocab_size) == (3, 4, 32, 97)
    assert (
        found.n_kv_heads,
        found.d_head,
        found.d_mlp,
        found.context_window,
        found.tied_embeddings,
    ) == KNOWN[name]


def test_attention_heads_of_xglm_are_found():
    found = Network.of_config({"model_type": "xglm", "d_model": 1024, "num_layers": 24, "attention_heads": 16})

    assert (found.n_layers, found.n_heads, found.n_kv_heads, found.d_head) == (24, 16, 16, 64)


def test_the_width_of_a_head_of_t5_is_its_own():
    found = Network.of_config({"model_type": "t5", "d_model": 512, "num_heads": 6, "d_kv": 64, "d_ff": 1024})

    assert (found.d_head, found.d_mlp) == (64, 1024)


def test_a_published_falcon_has_one_key_for_all_heads():
    found = Network.of_config({"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 8})

    assert (found.n_kv_heads, found.d_mlp) == (1, 256)
    assert found.fields["parallel_attn"] is True


def test_a_falcon_of_the_new_architecture_has_the_keys_it_names():
    config = {"model_type": "falcon", "num_attention_heads": 8, "num_kv_heads": 2, "new_decoder_architecture": True}

    assert Network.of_config(config).n_kv_heads == 2


def test_a_published_gemma3_has_the_heads_of_its_config_class():
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34}
    found = Network.of_config({"model_type": "gemma3", "text_config": text})

    assert (found.d_model, found.n_heads, found.n_kv_heads, found.d_head) == (2560, 8, 4, 256)
    assert Network.of_config({"model_type": "gemma3", "text_config": text | {"head_dim": 128}}).d_head == 128


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "gpt_neo", "gpt_bigcode", "bloom", "falcon", "codegen"])
def test_an_mlp_is_four_times_as_wide_where_the_family_does_so(model_type):
    assert Network.of_config({"model_type": model_type, "hidden_size": 32, "n_inner": None}).d_mlp == 128
    assert Network.of_config({"model_type": model_type, "hidden_size": 32, "n_inner": 40}).d_mlp == 40
    assert Network.of_config({"model_type": "llama", "hidden_size": 32}).d_mlp == 0


NAMES = (
    *("model_type", "architectures", "text_config", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "n_inner", "vocab_size", "multi_query", "new_decoder_architecture", "tie_word_embeddings"),
    *("is_causal", "use_bidirectional_attention", "layer_types", "use_sliding_window", "sliding_window"),
    *("rope_parameters", "rope_type", "original_max_position_embeddings"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["gpt2", "falcon", "longrope"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=8))
def test_any_json_object_gives_numbers_in_range_or_is_refused(config):
    try:
        found = Network.of_config(config)
    except ConfigInvalid:
        return

    for number in (found.n_layers, found.d_model, found.n_heads, found.n_kv_heads, found.d_head, found.vocab_size):
        assert 0 <= number < 2**31
    assert found.has_window in (True, False)
    assert found.looks_ahead in (True, False)
    assert all(limit >= 0 for limit in found.rotation_limits)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is no JSON"),
        (b"{'a': 1}", "is no JSON"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b"[1]", "is no JSON object"),
        (b'{"a":' * 100_000, "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is no JSON"),
    ],
    ids=["empty", "python", "bytes", "list", "deep-object", "deep-list", "long-number"],
)
def test_a_file_that_holds_no_json_object_is_named(tmp_path, content, problem):
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(JsonInvalid, match=rf"config\.json {problem}"):
        read_object(tmp_path / "config.json")


def test_a_json_file_beyond_the_limit_is_not_parsed(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)

    with pytest.raises(JsonInvalid, match="is larger than"):
        read_object(tmp_path / "config.json")


def test_a_json_object_is_read_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"a": [1, None]}))

    assert read_object(tmp_path / "config.json") == {"a": [1, None]}
