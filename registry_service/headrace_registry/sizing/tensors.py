"""The tensors of a model's files that a runner loads, and their bytes in each form.

A runner loads the network without its language-model head. bitsandbytes quantizes the weights of linear layers;
embeddings, norms, biases and stacked experts stay in the compute dtype. The figures are exact for such a load:

- int8: one byte a weight and an fp32 scale for each output;
- int4 (NF4, double quantization): half a byte a weight; for each block of 64 weights a byte of scale; for each 256 of
  these an fp32 scale; and 1092 bytes of tables a matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from headrace_registry.models.models import Quantization

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}

_HEADS = {"lm_head", "score", "classifier", "qa_outputs"}
# Masks and frequencies that files of older versions contain; newer code computes them.
_COMPUTED = (".masked_bias", ".inv_freq")
# Scales and tables that bitsandbytes stores beside a matrix; they are counted with it.
_BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
# Falcon has a linear layer of its own class, which bitsandbytes leaves alone.
NEVER_QUANTIZED = {"falcon"}
# GPT-2 stores its matrices as [inputs, outputs].
_TRANSPOSED = {"gpt2", "openai-gpt"}

_BLOCK = 64
_SCALE_BLOCK = 256
# 16 values of the NF4 code, 256 of the scales' code and their offset, all fp32.
_TABLE_BYTES = 4 * (16 + 256 + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A way to load a model; `dtype` is the dtype of the unquantized numbers."""

    quantization: Quantization
    dtype: str

    @property
    def item_bytes(self) -> int:
        """Bytes of one number of the dtype."""
        return ITEM_BYTES[self.dtype]

    def matrix_bytes(self, elements: int, outputs: int) -> int:
        """Bytes of one linear weight, with its scales."""
        if self.quantization is Quantization.INT8:
            return elements + 4 * outputs
        blocks = _ceil(elements, _BLOCK)
        if self.quantization is Quantization.INT4:
            return _ceil(elements, 2) + blocks + 4 * _ceil(blocks, _SCALE_BLOCK) + _TABLE_BYTES
        if self.quantization is Quantization.INT2:
            # Two bits a weight, and for each block a scale and a zero point of two bytes each.
            return _ceil(elements, 4) + 4 * blocks
        return elements * self.item_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One entry of a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_elements(self) -> int:
        """Product of the shape."""
        product = 1
        for extent in self.shape:
            product *= extent
        return product


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """The tensors that a runner loads, counted: linear weights by (elements, outputs), other numbers, integer bytes."""

    matrices: Mapping[tuple[int, int], int] = field(default_factory=dict)
    n_kept: int = 0
    fixed_bytes: int = 0

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest linear weight."""
        return max((elements for elements, _ in self.matrices), default=0)

    def weight_bytes(self, form: Form) -> int:
        """Bytes of all weights in a form, with scales."""
        quantized = sum(n * form.matrix_bytes(*matrix) for matrix, n in self.matrices.items())
        return quantized + self.n_kept * form.item_bytes + self.fixed_bytes


def tally_of(tensors: Iterable[Tensor], model_type: str = "") -> Tally:
    """Counts the tensors of a model's files; a quantized matrix counts as the matrix that it was made from."""
    every = {tensor.name: tensor for tensor in tensors}
    matrices: Counter[tuple[int, int]] = Counter()
    n_kept = fixed_bytes = 0
    for tensor in every.values():
        if not is_held(tensor):
            continue
        matrix = _matrix(tensor, every, model_type)
        if matrix is not None:
            matrices[matrix] += 1
        elif tensor.dtype in _FLOATS:
            n_kept += tensor.n_elements
        else:
            fixed_bytes += tensor.n_elements * _STORED_BYTES.get(tensor.dtype, 1)
    return Tally(matrices=dict(matrices), n_kept=n_kept, fixed_bytes=fixed_bytes)


def is_held(tensor: Tensor) -> bool:
    """False for heads, for tensors that are computed anew, and for scales that are counted with their matrix."""
    parts = tensor.name.split(".")
    if _HEADS.intersection(parts) or parts[0] == "embed_out":
        return False
    if tensor.name.endswith((*_COMPUTED, *_BESIDE)) or ".weight.quant_state." in tensor.name:
        return False
    is_mask = parts[-1] == "bias" and len(tensor.shape) > 2
    return not is_mask


def _matrix(tensor: Tensor, every: Mapping[str, Tensor], model_type: str) -> tuple[int, int] | None:
    """Returns (elements, outputs) of a linear weight; None for any other tensor."""
    if tensor.dtype == "U8" and f"{tensor.name}.absmax" in every:
        elements = 2 * tensor.n_elements
        bias = every.get(tensor.name.removesuffix("weight") + "bias")
        # Packed matrices have lost their shape; a square one is as good a guess as any for the scales of int8.
        return elements, bias.n_elements if bias is not None else int(elements**0.5)
    if len(tensor.shape) != 2 or not tensor.name.endswith(".weight") or model_type in NEVER_QUANTIZED:
        return None
    parts = tensor.name.split(".")
    if any("embed" in part or part in ("wte", "wpe", "experts") for part in parts):
        return None
    return tensor.n_elements, tensor.shape[1 if model_type in _TRANSPOSED else 0]


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
