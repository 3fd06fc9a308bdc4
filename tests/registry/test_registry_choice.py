"""The files that are fetched of repos as people publish them: each layout, and what of it a load needs."""

from __future__ import annotations

import pytest

from headrace_registry.hub.choice import choose, index_to_read
from headrace_registry.hub.faults import NotPermitted, Unusable

REPO = "owner/name"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
BASICS = ("config.json", "generation_config.json", *TOKENIZER)
NOTES = (".gitattributes", "README.md", "LICENSE", "USE_POLICY.md")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX = "pytorch_model.bin.index.json"


def shards(n, stem="model-{:05d}-of-{:05d}.safetensors"):
    return tuple(stem.format(number, n) for number in range(1, n + 1))


def index_of(*files):
    return {"metadata": {"total_size": 1}, "weight_map": {f"tensor.{n}": file for n, file in enumerate(files)}}


# Name: (files of the repo beside config.json and the like, index, config, files fetched beside the basics).
LAYOUTS = {
    "a single file": ((SINGLE, *NOTES), {}, {}, (SINGLE,)),
    "shards": ((INDEX, *shards(2), *NOTES), index_of(*shards(2)), {}, (INDEX, *shards(2))),
    "shards, and a file for the prediction of further tokens": (
        (INDEX, *shards(2), "mtp.safetensors"),
        index_of(*shards(2), "mtp.safetensors"),
        {},
        (INDEX, *shards(2), "mtp.safetensors"),
    ),
    "shards, and a file that the index does not name": (
        (INDEX, *shards(2), "extra.safetensors"),
        index_of(*shards(2)),
        {},
        (INDEX, *shards(2)),
    ),
    "shards under names of another form": (
        (INDEX, "model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors"),
        index_of("model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors"),
        {},
        (INDEX, "model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors"),
    ),
    "shards that were merged since, and left behind": (
        (SINGLE, INDEX, *shards(2)),
        index_of(*shards(2)),
        {},
        (SINGLE,),
    ),
    "shards of an earlier upload beside those of the index": (
        (INDEX, *shards(2), *shards(3)),
        index_of(*shards(3)),
        {},
        (INDEX, *shards(3)),
    ),
    "safetensors and pickles": ((SINGLE, "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"), {}, {}, (SINGLE,)),
    "sharded safetensors and sharded pickles": (
        (INDEX, BIN_INDEX, *shards(2), *shards(2, "pytorch_model-{:05d}-of-{:05d}.bin")),
        index_of(*shards(2)),
        {},
        (INDEX, *shards(2)),
    ),
    "a half-precision copy beside the full one": ((SINGLE, "model.fp16.safetensors"), {}, {}, (SINGLE,)),
    "an index of a half-precision copy": (
        (INDEX, "model.safetensors.index.fp16.json", *shards(1), "model.fp16-00001-of-00001.safetensors"),
        index_of(*shards(1)),
        {},
        (INDEX, *shards(1)),
    ),
    "the maker's own copy beside": (
        (INDEX, *shards(3), "consolidated.safetensors", "params.json", "tekken.json"),
        index_of(*shards(3)),
        {},
        (INDEX, *shards(3), "params.json", "tekken.json"),
    ),
    "the maker's own copy in a folder": (
        (INDEX, *shards(2), "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"),
        index_of(*shards(2)),
        {},
        (INDEX, *shards(2)),
    ),
    "exports for other programs": (
        (SINGLE, "onnx/model.onnx", "onnx/model.onnx_data", "openvino/openvino_model.bin", "coreml/weights.bin"),
        {},
        {},
        (SINGLE,),
    ),
    "GGUF files beside": ((SINGLE, "model-q4_k_m.gguf"), {}, {}, (SINGLE,)),
    "a tokenizer as a sentencepiece model alone": (
        (SINGLE, "tokenizer.model", "added_tokens.json"),
        {},
        {},
        (SINGLE, "tokenizer.model", "added_tokens.json"),
    ),
    "a tokenizer as words and merges": (
        (SINGLE, "vocab.json", "merges.txt"),
        {},
        {},
        (SINGLE, "vocab.json", "merges.txt"),
    ),
    "a tokenizer in tiktoken's form": ((SINGLE, "qwen.tiktoken"), {}, {}, (SINGLE, "qwen.tiktoken")),
    "a chat template in a file of its own": (
        (SINGLE, "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
        {},
        {},
        (SINGLE, "chat_template.jinja"),
    ),
    "checkpoints of a training and its logs": (
        (SINGLE, "trainer_state.json", "optimizer.pt", "checkpoint-500/model.safetensors", "runs/12:00:00/events"),
        {},
        {},
        (SINGLE,),
    ),
    "an adapter that was merged": (
        (SINGLE, "adapter_config.json", "adapter_model.safetensors"),
        {},
        {},
        (SINGLE,),
    ),
    "weights under a name that the config gives": (
        ("weights.safetensors", SINGLE),
        {},
        {"transformers_weights": "weights.safetensors"},
        ("weights.safetensors",),
    ),
    "code that nobody allowed": ((SINGLE, "modeling_own.py"), {}, {}, (SINGLE,)),
    "names that no folder can have": ((SINGLE, "figure 12:30.png", "CON", "..\\evil.json.png"), {}, {}, (SINGLE,)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_exactly_the_files_that_a_load_reads_are_fetched(name):
    files, index, config, wanted = LAYOUTS[name]
    choice = choose(REPO, (*BASICS, *files), config, index)

    assert set(choice.names) == {*BASICS, *wanted}
    assert not choice.pickled


PICKLED = {
    "one file": (("pytorch_model.bin",), {}, ("pytorch_model.bin",)),
    "one file, and shards of another upload": (
        ("pytorch_model.bin", *shards(2, "pytorch_model-{:05d}-of-{:05d}.bin")),
        {},
        ("pytorch_model.bin",),
    ),
    "shards": (
        (BIN_INDEX, *shards(2, "pytorch_model-{:05d}-of-{:05d}.bin"), "training_args.bin"),
        index_of(*shards(2, "pytorch_model-{:05d}-of-{:05d}.bin")),
        (BIN_INDEX, *shards(2, "pytorch_model-{:05d}-of-{:05d}.bin")),
    ),
    "one file, and safetensors of another kind": (
        ("pytorch_model.bin", "model.fp16.safetensors"),
        {},
        ("pytorch_model.bin",),
    ),
}


@pytest.mark.parametrize("name", PICKLED)
def test_pickled_weights_are_fetched_only_if_allowed(name):
    files, index, wanted = PICKLED[name]
    with pytest.raises(NotPermitted, match="--allow-pickle owner/name"):
        choose(REPO, (*BASICS, *files), {}, index)
    choice = choose(REPO, (*BASICS, *files), {}, index, allow_pickle=True)

    assert set(choice.names) == {*BASICS, *wanted}
    assert choice.pickled


def test_code_is_fetched_if_allowed():
    choice = choose(REPO, (*BASICS, SINGLE, "modeling_own.py", "train/run.py"), {}, {}, with_code=True)

    assert set(choice.names) == {*BASICS, SINGLE, "modeling_own.py"}


REFUSED = {
    "an adapter alone": (("adapter_config.json", "adapter_model.safetensors"), {}, "merge it into its base model"),
    "a pickled adapter alone": (("adapter_config.json", "adapter_model.bin"), {}, "merge it into its base model"),
    "GGUF files alone": (("model-q4_k_m.gguf",), {}, "register that file"),
    "the maker's own form alone": (("consolidated.safetensors",), {}, "does not load consolidated.safetensors"),
    "a half-precision copy alone": (("model.fp16.safetensors",), {}, "does not load model.fp16.safetensors"),
    "shards without an index": (shards(2), {}, "does not load model-00001-of-00002.safetensors"),
    "TensorFlow's form alone": (("tf_model.h5",), {}, "save_pretrained"),
    "an index that names a file which is not there": (
        (INDEX, *shards(1)),
        index_of(*shards(2)),
        "lacks model-00001-of-00002.safetensors",
    ),
    "an index that leads out of the folder": ((INDEX, SINGLE + "x"), index_of("../m.safetensors"), r"\.\./m"),
    "an index that names no files": ((INDEX, *shards(2)), {"weight_map": 3}, "names"),
    "an index with a name that is no text": ((INDEX, *shards(2)), {"weight_map": {"t": 3}}, "names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_repo_without_weights_to_load_is_refused_with_the_reason_and_a_way_out(name):
    files, index, match = REFUSED[name]

    with pytest.raises(Unusable, match=match):
        choose(REPO, (*BASICS, *files), {}, index, allow_pickle=True)


QUANTIZED = {
    "fp8": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ"),
    "compressed-tensors": ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    "an early form of it": ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    "mxfp4": ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
    "bitsandbytes": ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
    "in the text half": ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "AWQ"),
    "unheard of": ({"quantization_config": {"quant_method": "abacus"}}, "abacus"),
    "without a name": ({"quantization_config": {"bits": 3}}, "unknown"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_checkpoint_is_refused_by_its_config(name):
    config, method = QUANTIZED[name]

    with pytest.raises(Unusable, match=f"quantized by .*{method}.*register the model's full weights"):
        choose(REPO, (*BASICS, SINGLE), config, {})


def test_a_model_that_nothing_can_be_captured_of_is_refused_by_its_config():
    with pytest.raises(Unusable, match=r"type 't5' can be captured: it is an encoder with a decoder"):
        choose(REPO, (*BASICS, SINGLE), {"model_type": "t5"}, {})


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_full_weights_are_not_taken_for_quantized_ones(config):
    assert SINGLE in choose(REPO, (*BASICS, SINGLE), config, {}).names


def test_the_index_is_read_only_where_it_decides():
    assert index_to_read((*BASICS, SINGLE, INDEX), {}) is None
    assert index_to_read((*BASICS, INDEX), {}) == INDEX
    assert index_to_read((*BASICS, BIN_INDEX), {}) == BIN_INDEX
    assert index_to_read((*BASICS, "pytorch_model.bin", BIN_INDEX), {}) is None
