"""Each weight of the files is in the network and each weight of the network is in the files, or the load is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, MixtralForCausalLM

from fix_runner import load, save_model
from fix_zoo import zoo_config
from headrace_extractor.errors import LoadFailed
from headrace_extractor.node.runner_protocol import Quantize, Validate
from headrace_extractor.runner.models.quantize import quantize
from headrace_extractor.runner.models.validate import validate

WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


def change_tensors(folder, **changes):
    """Adds tensors to the file; None removes one. Dots in names are written as two underscores."""
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_bias_that_the_config_does_not_know_is_an_error_with_its_name(copied):
    """A network with biases, registered under a config of one without, would compute other numbers."""
    change_tensors(copied, model__layers__1__self_attn__q_proj__bias=torch.ones(32))

    with pytest.raises(LoadFailed, match=r"1 weight \(model.layers.1.self_attn.q_proj.bias\) of the files have no"):
        load(copied)


def test_layers_beyond_those_of_the_config_are_an_error(copied):
    change_config(copied, num_hidden_layers=3)

    with pytest.raises(LoadFailed, match=r"9 weights \(model.layers.3.input_layernorm.weight"):
        load(copied)


def test_several_kinds_of_mistakes_are_told_at_once(copied):
    change_tensors(
        copied,
        model__norm__weight=None,
        model__embed_tokens__weight=torch.ones(97, 16),
        model__layers__0__extra=torch.ones(3),
    )

    with pytest.raises(LoadFailed) as caught:
        load(copied)
    message = caught.value.message
    assert "1 weight (norm.weight) are missing" in message
    assert "1 weight (embed_tokens.weight) have another shape" in message
    assert "1 weight (model.layers.0.extra) of the files have no place" in message


@pytest.mark.parametrize("prefix", ["_orig_mod", "module"])
def test_weights_with_a_prefix_too_many_are_told_by_the_names_in_the_files(copied, prefix):
    """torch.compile and DataParallel leave such names behind."""
    tensors = load_file(copied / WEIGHTS)
    renamed = {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, copied / WEIGHTS, metadata={"format": "pt"})

    with pytest.raises(LoadFailed) as caught:
        load(copied)
    assert "38 weights (embed_tokens.weight, " in caught.value.message
    assert f"38 weights ({prefix}.model.embed_tokens.weight, " in caught.value.message
    assert "of the files have no place in the network" in caught.value.message


@pytest.mark.parametrize(
    "name", ["score.weight", "v_head.summary.bias", "model.vision_tower.patch.weight", "mtp.0.weight"]
)
def test_heads_and_other_parts_may_be_in_the_files(copied, name):
    change_tensors(copied, **{name: torch.ones(3)})

    assert not hasattr(load(copied).model, "lm_head")


def test_old_tables_that_the_family_computes_anew_may_be_in_the_files(copied):
    change_tensors(copied, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))

    assert load(copied).model is not None


def test_the_pooler_that_no_load_builds_may_be_in_the_files(tmp_path):
    config = BertConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    folder = save_model(BertForMaskedLM, config, tmp_path / "bert")
    change_tensors(folder, bert__pooler__dense__weight=torch.ones(32, 32), bert__pooler__dense__bias=torch.ones(32))

    assert load(folder).model.pooler is None


def test_files_of_the_base_model_alone_are_loaded_and_accounted_for(copied):
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(copied / WEIGHTS).items()}
    tensors.pop("lm_head.weight", None)
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
    assert load(copied).model is not None
    change_tensors(copied, layers__2__self_attn__q_proj__bias=torch.ones(32))

    with pytest.raises(LoadFailed, match=r"layers.2.self_attn.q_proj.bias"):
        load(copied)


def test_a_file_that_the_index_names_beside_the_shards_is_loaded(copied):
    """As repos do that keep the prediction of further tokens in a file of its own."""
    tensors = load_file(copied / WEIGHTS)
    names = sorted(tensors)
    parts = {"model-00001-of-00001.safetensors": names[1:], "mtp.safetensors": names[:1]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, copied / file, metadata={"format": "pt"})
    table = {name: file for file, held in parts.items() for name in held}
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    loaded = load(copied).model.state_dict()
    (copied / WEIGHTS).unlink()
    again = load(copied).model.state_dict()

    assert all(torch.equal(loaded[name], again[name]) for name in loaded)


@pytest.fixture
def experts(tmp_path):
    """A mixture of four experts, each with tensors of its own in the file."""
    folder = save_model(MixtralForCausalLM, zoo_config("mixtral"), tmp_path / "mixtral")
    assert len([name for name in load_file(folder / WEIGHTS) if ".experts.1." in name]) > 1
    return folder


@pytest.mark.parametrize("expert", [0, 1, 3])
def test_an_expert_that_the_files_lack_is_an_error_with_the_name_of_its_weight(experts, expert):
    names = sorted(name for name in load_file(experts / WEIGHTS) if "layers.1." in name)
    gone = next(name for name in names if f".experts.{expert}." in name)
    change_tensors(experts, **{gone: None})

    with pytest.raises(LoadFailed, match=r"layers\.1\..*experts"):
        load(experts)


def test_experts_beyond_those_of_the_config_are_an_error(experts):
    change_config(experts, num_local_experts=3)

    with pytest.raises(LoadFailed, match=r"layers\.0\..*experts"):
        load(experts)


def test_no_quantized_weights_are_made_of_random_numbers(copied, tmp_path):
    change_tensors(copied, model__layers__1__mlp__up_proj__weight=None)
    command = Quantize(
        source_path=str(copied), target_path=str(tmp_path / "q"), quantization="int8", dtype="float32", load_options={}
    )

    with pytest.raises(LoadFailed, match="up_proj"):
        quantize(command, lambda *_: None)
    assert not (tmp_path / "q").exists()


def test_a_dry_load_names_the_weight(copied):
    change_tensors(copied, model__layers__0__mlp__gate_proj__bias=torch.ones(64))
    steps = []
    validate(Validate(files_path=str(copied), device="cpu", dtype="float32"), steps.append)

    failed = next(step for step in steps if step.state == "FAILED")
    assert (failed.name, failed.reason) == ("dry_load", "LOAD_FAILED")
    assert "model.layers.0.mlp.gate_proj.bias" in failed.message
