from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
from safetensors.numpy import save_file

from fix_extractor import model_info
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.errors import FieldInvalid, HookpointNotFound
from headrace_extractor.hookpoints.catalogue import (
    SITES,
    Catalogue,
    catalogue_of,
    check_isolation,
    forward_order,
    layer_of,
)
from headrace_models.config import Network

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
}


def catalogue(**changes):
    return Catalogue(Network.of_config(LLAMA | changes))


def names(*asked, **changes):
    return [point.name for point in catalogue(**changes).resolve(asked)]


def test_a_llama_offers_every_site_of_every_layer_in_forward_order():
    offered = catalogue().offered

    assert len(offered) == 30 * len(SITES) + 2
    assert offered[0].name == "hook_embed"
    assert [point.name for point in offered[1:12]] == [f"blocks.0.{site}" for site in SITES]
    assert offered[-1].name == "ln_final.hook_normalized"
    assert not any(point.unavailable for point in offered)
    assert sorted(offered, key=lambda point: forward_order(point.name)) == list(offered)


def test_shapes_and_modules_come_from_the_config():
    points = {point.name: point for point in catalogue().offered}

    assert points["blocks.3.attn.hook_q"].shape == (9, 64)
    assert points["blocks.3.attn.hook_k"].shape == points["blocks.3.attn.hook_v"].shape == (3, 64)
    assert points["blocks.3.attn.hook_z"].shape == (9, 64)
    assert points["blocks.3.mlp.hook_post"].shape == (1536,)
    assert points["blocks.3.hook_resid_post"].shape == (576,)
    assert points["blocks.3.attn.hook_k"].width == 192
    assert points["blocks.3.attn.hook_z"].module == "layers.3.self_attn.o_proj:in"
    assert points["blocks.3.hook_resid_mid"].module == "layers.3.post_attention_layernorm:in"


def test_names_come_in_forward_order_once_each():
    asked = ["blocks.10.hook_resid_post", "hook_embed", "blocks.2.hook_resid_post", "blocks.2.hook_resid_pre"]

    assert names(*asked, *asked) == [asked[1], asked[3], asked[2], asked[0]]


def test_no_name_at_all_is_refused():
    with pytest.raises(FieldInvalid, match="at least one"):
        names()


def test_requests_are_bounded():
    with pytest.raises(FieldInvalid, match="at most 4096"):
        names(*(f"name-{number}" for number in range(5000)))
    with pytest.raises(FieldInvalid, match="wildcards"):
        names(*(f"blocks.*.hook_{number}*" for number in range(65)))
    with pytest.raises(FieldInvalid, match="at most 4096"):
        names("*", num_hidden_layers=500)


@pytest.mark.parametrize(
    ("asked", "canonical"),
    [
        ("blocks.4.hook_in", "blocks.4.hook_resid_pre"),
        ("blocks.4.hook_out", "blocks.4.hook_resid_post"),
        ("blocks.4.ln2.hook_in", "blocks.4.hook_resid_mid"),
        ("blocks.4.attn.hook_out", "blocks.4.hook_attn_out"),
        ("blocks.4.attn.q.hook_out", "blocks.4.attn.hook_q"),
        ("blocks.4.attn.o.hook_in", "blocks.4.attn.hook_z"),
        ("blocks.4.mlp.gate.hook_out", "blocks.4.mlp.hook_pre"),
        ("blocks.4.mlp.out.hook_in", "blocks.4.mlp.hook_post"),
        ("blocks.4.mlp.hook_out", "blocks.4.hook_mlp_out"),
        ("embed.hook_out", "hook_embed"),
        ("blocks.-1.hook_resid_post", "blocks.29.hook_resid_post"),
        ("layers.4:out", "blocks.4.hook_resid_post"),
        ("model.layers.4:in", "blocks.4.hook_resid_pre"),
        ("model.layers.4.self_attn.o_proj:in", "blocks.4.attn.hook_z"),
        ("model.layers.-2.mlp:out", "blocks.28.hook_mlp_out"),
        ("model.embed_tokens:out", "hook_embed"),
    ],
)
def test_other_spellings_become_the_canonical_name(asked, canonical):
    assert names(asked) == [canonical]


@pytest.mark.parametrize(
    ("asked", "canonical"),
    [
        ("blocks.*.hook_resid_post", [f"blocks.{layer}.hook_resid_post" for layer in range(30)]),
        ("blocks.4-6.hook_out", [f"blocks.{layer}.hook_resid_post" for layer in (4, 5, 6)]),
        ("blocks.28-29.attn.hook_*", [f"blocks.{n}.attn.hook_{s}" for n in (28, 29) for s in "qkvz"]),
        ("blocks.7.*", [f"blocks.7.{site}" for site in SITES]),
        ("model.layers.0-1.mlp:out", ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]),
        ("layers.*:in", [f"blocks.{layer}.hook_resid_pre" for layer in range(30)]),
    ],
)
def test_wildcards_and_ranges_stand_for_what_there_is(asked, canonical):
    assert set(names(asked)) >= set(canonical)
    assert [name for name in names(asked) if not name.endswith((":in", ":out"))] == canonical


@pytest.mark.parametrize(
    ("changes", "asked", "canonical"),
    [
        ({"model_type": "gemma2"}, "blocks.1.ln1_post.hook_out", "blocks.1.hook_attn_out"),
        ({"model_type": "olmo2"}, "blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"),
        ({"model_type": "olmo2"}, "blocks.1.mlp.hook_in", "blocks.1.hook_resid_mid"),
        ({"model_type": "bloom"}, "blocks.1.attn.o.hook_out", "blocks.1.hook_attn_out"),
        ({"model_type": "bloom"}, "embed_ln.hook_out", "hook_embed"),
        ({"model_type": "gpt2"}, "transformer.h.1.attn:out", "blocks.1.hook_attn_out"),
        ({"model_type": "gpt2"}, "blocks.1.mlp.in.hook_out", "blocks.1.mlp.hook_pre"),
        ({"model_type": "opt"}, "model.decoder.layers.1.fc2:in", "blocks.1.mlp.hook_post"),
    ],
)
def test_spellings_follow_the_architecture(changes, asked, canonical):
    assert names(asked, **changes) == [canonical]


def test_what_a_sparse_layer_has_not_is_left_out_of_a_wildcard():
    sparse = {"model_type": "qwen3_moe", "num_experts": 4, "mlp_only_layers": [2, 5]}

    assert names("blocks.*.mlp.hook_pre", **sparse) == ["blocks.2.mlp.hook_pre", "blocks.5.mlp.hook_pre"]
    with pytest.raises(HookpointNotFound, match="experts"):
        names("blocks.3.mlp.hook_pre", **sparse)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("blocks.14.resid_post", "blocks.14.hook_resid_post"),
        ("block.3.hook_mlp_out", "blocks.3.hook_mlp_out"),
        ("model.layers.7.mlp", "blocks.7.hook_mlp_out"),
        ("blocks.1.hook_q", "blocks.1.attn.hook_q"),
        ("blocks.01.hook_resid_pre", "blocks.1.hook_resid_pre"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong, right):
    with pytest.raises(HookpointNotFound, match=right) as caught:
        names("blocks.0.hook_resid_pre", wrong)

    assert right in caught.value.metadata["nearest"].split(",")[:2]
    assert caught.value.metadata["hookpoint"] == wrong


def test_a_layer_out_of_range_is_answered_with_the_range():
    with pytest.raises(HookpointNotFound, match="layers 0 to 29") as caught:
        names("blocks.30.hook_attn_out")

    assert caught.value.metadata["nearest"] == "blocks.29.hook_attn_out"


@pytest.mark.parametrize(
    "name",
    [
        *("", "\0", "9" * 10_000, "blocks.-31.hook_resid_pre", "blocks.1.hook_resid_pre\n", "blocks.28-30.hook_out"),
        *("blocks.5-3.hook_out", "layers.30:out", "layers.1.nothing:out", "*:out", ":in", "a.*" * 120),
    ],
)
def test_odd_names_are_not_found_rather_than_a_crash(name):
    with pytest.raises(HookpointNotFound):
        names(name)


def test_a_parallel_block_says_why_it_has_no_middle():
    neox = catalogue(model_type="gpt_neox")
    missing = [point for point in neox.offered if point.unavailable]

    assert {point.name.split(".", 2)[2] for point in missing} == {"hook_resid_mid"}
    with pytest.raises(HookpointNotFound, match="same residual stream"):
        neox.resolve(["blocks.1.hook_resid_mid"])
    assert not any(point.unavailable for point in catalogue(model_type="gpt_neox", use_parallel_residual=False).offered)


def test_a_post_norm_opt_offers_the_residual_stream_alone():
    post_norm = catalogue(model_type="opt", do_layer_norm_before=False)
    stream = [point for point in post_norm.offered if ".hook_resid_p" in point.name]

    assert not any(point.unavailable for point in stream)
    assert all("normalise" in point.unavailable for point in post_norm.offered if point not in stream)
    assert [point.module for point in post_norm.resolve(["blocks.0.hook_resid_post"])] == ["decoder.layers.0:out"]
    with pytest.raises(HookpointNotFound, match="normalise"):
        post_norm.resolve(["blocks.0.attn.hook_z"])


def test_an_unknown_architecture_offers_what_loading_can_prove():
    points = {point.name: point for point in catalogue(model_type="abacus").offered}

    assert not points["blocks.1.hook_mlp_out"].unavailable
    assert not points["blocks.1.attn.hook_z"].unavailable
    assert points["blocks.1.hook_mlp_out"].module == ""
    assert "abacus" in points["blocks.1.attn.hook_q"].unavailable


def test_a_width_that_the_config_does_not_tell_is_said():
    bare = Catalogue(Network(model_type="llama", n_layers=1, d_model=8))
    points = {point.name: point for point in bare.offered}

    assert not points["blocks.0.hook_resid_post"].unavailable
    assert "width" in points["blocks.0.attn.hook_q"].unavailable


@pytest.mark.parametrize(
    ("config", "k_shape"),
    [
        ({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}, (4, 8)),
        ({"model_type": "bloom", "n_embed": 32, "n_layer": 1, "num_attention_heads": 4}, (4, 8)),
        ({"model_type": "gpt_neo", "hidden_size": 32, "num_layers": 1, "num_heads": 4}, (4, 8)),
        ({"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}, (1, 8)),
        (
            {
                "model_type": "gemma3",
                "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34},
            },
            (4, 256),
        ),
    ],
)
def test_numbers_are_found_under_the_names_of_each_family(config, k_shape):
    points = {point.name: point for point in Catalogue(Network.of_config(config)).offered}

    assert points["blocks.0.attn.hook_k"].shape == k_shape


def test_alibi_without_a_way_to_isolate_refuses_packing_and_names_the_remedy():
    falcon = catalogue(model_type="falcon", alibi=True)

    with pytest.raises(FieldInvalid, match="one_document") as caught:
        check_isolation(Recipe(), falcon)
    assert caught.value.field == "spec.recipe.packing"
    check_isolation(Recipe(packing="one_document"), falcon)
    check_isolation(Recipe(attend_across_documents=True), falcon)
    check_isolation(Recipe(), catalogue())


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, False),
        ({"sliding_window": 4096}, True),
        ({"sliding_window": 4096, "use_sliding_window": False}, False),
        ({"sliding_window": 4096, "layer_types": ["full_attention"] * 30}, False),
        ({"layer_types": ["full_attention", "sliding_attention"] * 15}, True),
        ({"model_type": "gpt_neo", "window_size": 256}, True),
        ({"model_type": "opt"}, False),
    ],
)
def test_windows_that_look_both_ways_refuse_packing_and_name_the_remedy(changes, refused):
    both_ways = catalogue(**{"is_causal": False} | changes)

    with pytest.raises(FieldInvalid, match="one_document") if refused else nullcontext():
        check_isolation(Recipe(), both_ways)
    check_isolation(Recipe(), catalogue(**changes))
    check_isolation(Recipe(packing="one_document"), both_ways)


def test_layers_are_read_off_any_name():
    assert layer_of("blocks.14.hook_resid_pre") == layer_of("layers.14.self_attn.q_norm:out") == 14
    assert layer_of("transformer.h.3:in") == 3
    assert layer_of("hook_embed") is None


@pytest.fixture
def files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 2}))
    weights = {
        "model.layers.1.self_attn.q_norm.weight": (64,),
        "model.layers.1.self_attn.q_proj.weight": (576, 576),
        "model.layers.1.mlp.up_proj.weight": (1536, 576),
        "model.norm.weight": (576,),
    }
    tensors = {name: np.zeros(shape, np.float16) for name, shape in weights.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "name", "shape"),
    [
        ("model.layers.1.mlp.up_proj:out", "layers.1.mlp.up_proj:out", (1536,)),
        ("layers.1.mlp.up_proj:in", "layers.1.mlp.up_proj:in", (576,)),
        ("layers.1.self_attn.q_norm:out", "layers.1.self_attn.q_norm:out", (9, 64)),
        ("layers.1.mlp:in", "layers.1.mlp:in", (576,)),
        ("model.norm:out", "norm:out", (576,)),
    ],
)
def test_any_module_is_a_hookpoint_whose_width_its_weights_tell(files, asked, name, shape):
    (point,) = catalogue_of(model_info(files)).resolve([asked])

    assert (point.name, point.shape) == (name, shape)
    assert catalogue_of(model_info(files)).shapes([name]) == {name: shape}


def test_what_a_module_returns_is_no_other_name_of_what_is_added_after_a_norm_or_a_factor(files):
    for model_type in ("gemma2", "granite"):
        config = json.loads((files / "config.json").read_text()) | {"model_type": model_type}
        (files / "config.json").write_text(json.dumps(config))
        (point,) = catalogue_of(model_info(files)).resolve(["blocks.1.attn.hook_out"])

        assert point.name == "layers.1.self_attn:out"


@pytest.mark.parametrize("damage", [b"", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_damaged_file_tells_no_width(files, damage):
    (files / "model.safetensors").write_bytes(damage)

    with pytest.raises(HookpointNotFound, match="no such module"):
        catalogue_of(model_info(files)).resolve(["model.norm:out"])


@pytest.mark.parametrize("content", [None, b"{", b"[]"])
def test_without_a_config_the_registry_tells_what_is_offered(files, content):
    (files / "config.json").unlink()
    if content is not None:
        (files / "config.json").write_bytes(content)
    model = model_info(files)

    assert catalogue_of(model).network == Network(
        model_type=model.model_type, n_layers=model.n_layers, d_model=model.d_model
    )


@pytest.mark.parametrize("name", ["layers.1.mlp.act_fn:out", "mlp:out", "1.mlp:out", "up_proj:in"])
def test_a_module_that_the_files_do_not_have_is_not_found(files, name):
    with pytest.raises(HookpointNotFound):
        catalogue_of(model_info(files)).resolve([name])
