"""Linear layers by oneDNN: the same product, and torch's own as soon as the block is left."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from headrace_extractor.runner.passes import linear
from headrace_extractor.runner.passes.linear import fast_linear_layers, onednn_is_faster

CPU = torch.device("cpu")
OWN = nn.Linear.forward, Conv1D.forward

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)


def counted(monkeypatch):
    """Counts the products that oneDNN computes."""
    calls = []
    by_onednn = torch.ops.mkldnn._linear_pointwise

    def count(*arguments):
        calls.append(arguments)
        return by_onednn(*arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", count)
    return calls


@needs_onednn
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        *product([nn.Linear(48, 24), nn.Linear(48, 24, bias=False), Conv1D(24, 48)], [(48,), (5, 48), (2, 7, 48)]),
        (nn.Linear(48, 24), (0, 48)),
    ],
    ids=str,
)
@torch.inference_mode()
def test_the_product_is_that_of_torch_up_to_rounding(layer, shape, faster, monkeypatch):
    inputs = torch.randn(shape)
    expected = layer(inputs)
    calls = counted(monkeypatch)

    with fast_linear_layers(CPU):
        found = layer(inputs)

    assert len(calls) == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_onednn
@torch.inference_mode()
def test_rows_that_do_not_lie_side_by_side_are_multiplied_as_they_are(faster):
    layer, inputs = nn.Linear(48, 24), torch.randn(5, 96)[:, ::2]

    with fast_linear_layers(CPU):
        torch.testing.assert_close(layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias))


@needs_onednn
@torch.inference_mode()
def test_other_dtypes_are_left_to_torch(faster, monkeypatch):
    layer, inputs = nn.Linear(48, 24).bfloat16(), torch.randn(5, 48).bfloat16()
    calls = counted(monkeypatch)

    with fast_linear_layers(CPU):
        assert torch.equal(layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias))

    assert not calls


class Packed(torch.Tensor):
    """A weight in the form of a quantizer."""


@needs_onednn
@torch.inference_mode()
def test_weights_in_a_form_of_their_own_are_left_to_torch(faster, monkeypatch):
    layer, inputs = nn.Linear(48, 24), torch.randn(5, 48)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    calls = counted(monkeypatch)

    with fast_linear_layers(CPU):
        assert torch.equal(layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias))

    assert not calls


@needs_onednn
@torch.inference_mode()
def test_an_input_of_another_dtype_is_refused_as_torch_refuses_it(faster):
    with fast_linear_layers(CPU), pytest.raises(RuntimeError, match="same dtype"):
        nn.Linear(48, 24)(torch.randn(5, 48).bfloat16())


def test_a_model_on_another_device_keeps_its_layers(faster):
    with fast_linear_layers(torch.device("meta")):
        assert nn.Linear.forward is OWN[0]


def test_behind_the_block_layers_are_as_they_were_also_after_an_error(faster):
    with pytest.raises(KeyError), fast_linear_layers(CPU):
        assert nn.Linear.forward is not OWN[0]
        raise KeyError

    assert (nn.Linear.forward, Conv1D.forward) == OWN


@pytest.mark.parametrize(
    ("vendor", "instructions", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_it_is_taken_where_mkl_leaves_instructions_unused(vendor, instructions, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(linear, "_CPU_INFO", tmp_path / "cpuinfo")
    for backend in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(backend, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)

    assert onednn_is_faster.__wrapped__() is expected


def test_without_it_layers_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(linear, "onednn_is_faster", onednn_is_faster.__wrapped__)

    with fast_linear_layers(CPU):
        assert nn.Linear.forward is OWN[0]
