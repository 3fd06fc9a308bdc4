from __future__ import annotations

import pytest

from extractor_service.errors import FieldInvalid, HookpointNotFound, NotImplementedYet
from extractor_service.hookpoints import SITES, available, check, depth, forward_order, parse

LLAMA = available("llama", 30, 576)


def test_a_llama_offers_four_sites_a_layer_in_forward_order():
    assert len(LLAMA) == 30 * len(SITES)
    assert [hookpoint.name for hookpoint in LLAMA[:4]] == [f"blocks.0.{site}" for site in SITES]
    assert {hookpoint.width for hookpoint in LLAMA} == {576}
    assert not any(hookpoint.unavailable for hookpoint in LLAMA)
    assert sorted(LLAMA, key=lambda hookpoint: forward_order(hookpoint.name)) == list(LLAMA)


def test_check_puts_names_in_forward_order_once_each():
    names = [
        "blocks.10.hook_resid_post",
        "blocks.2.hook_resid_post",
        "blocks.2.hook_resid_pre",
        "blocks.2.hook_resid_post",
    ]

    assert check(names, LLAMA) == ("blocks.2.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.10.hook_resid_post")


def test_no_name_at_all_is_refused():
    with pytest.raises(FieldInvalid, match="at least one"):
        check([], LLAMA)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("blocks.14.resid_post", "blocks.14.hook_resid_post"),
        ("block.3.hook_mlp_out", "blocks.3.hook_mlp_out"),
        ("model.layers.7.mlp", "blocks.7.hook_mlp_out"),
        ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_pre"),
        ("blocks.01.hook_resid_pre", "blocks.1.hook_resid_pre"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong, right):
    with pytest.raises(HookpointNotFound, match=right) as caught:
        check(["blocks.0.hook_resid_pre", wrong], LLAMA)

    assert right in caught.value.metadata["nearest"].split(",")[:2]
    assert caught.value.metadata["hookpoint"] == wrong


def test_a_layer_out_of_range_is_answered_with_the_range():
    with pytest.raises(HookpointNotFound, match="layers 0 to 29") as caught:
        check(["blocks.30.hook_attn_out"], LLAMA)

    assert caught.value.metadata["nearest"] == "blocks.29.hook_attn_out"


@pytest.mark.parametrize("name", ["", "\0", "9" * 10_000, "blocks.-1.hook_resid_pre", "blocks.1.hook_resid_pre\n"])
def test_odd_names_are_not_found_rather_than_a_crash(name):
    with pytest.raises(HookpointNotFound):
        check([name], LLAMA)


def test_a_block_with_norms_behind_its_modules_offers_the_residual_stream_only():
    gemma2 = {hookpoint.name: hookpoint for hookpoint in available("gemma2", 2, 8)}

    assert not gemma2["blocks.1.hook_resid_post"].unavailable
    assert "normalise" in gemma2["blocks.1.hook_mlp_out"].unavailable
    with pytest.raises(NotImplementedYet, match="normalise"):
        check(["blocks.1.hook_mlp_out"], list(gemma2.values()))


def test_an_unknown_architecture_lists_its_hookpoints_as_unavailable():
    offered = available("gpt_neox", 2, 8)

    assert all("gpt_neox" in hookpoint.unavailable for hookpoint in offered)
    with pytest.raises(NotImplementedYet):
        check(["blocks.0.hook_resid_pre"], offered)
    with pytest.raises(HookpointNotFound, match="offers none"):
        check(["blocks.2.hook_resid_pre"], offered)


def test_parse_and_depth_read_the_layer():
    assert parse("blocks.14.hook_resid_post") == (14, "hook_resid_post")
    assert depth("blocks.14.hook_resid_pre") == 14
    with pytest.raises(ValueError, match="not a hookpoint"):
        parse("blocks.14")
