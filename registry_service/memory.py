"""How many bytes a load will take, before it is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registry_service.nodes import DeviceKind

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_STORED_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
# transformers advises up to a fifth on top of the weights for inference.
_OVERHEAD = 1.2
# Interpreter, torch and its runtime in a fresh process, about; the first load replaces the estimate by a measurement.
_PROCESS_BYTES = 200_000_000


def load_dtype(load_options: Mapping[str, Any], kind: DeviceKind) -> str:
    """The dtype weights get on a device: the model's own option, else fp32 on CPUs and bf16 on GPUs."""
    chosen = load_options.get("dtype")
    if isinstance(chosen, str):
        return chosen
    return "float32" if kind is DeviceKind.CPU else "bfloat16"


def estimated_bytes(parameters_by_dtype: Mapping[str, int], dtype: str) -> int:
    """Bytes of weights in `dtype` plus overhead; integer tensors keep their stored width."""
    weights = sum(
        count * (_ITEM_BYTES[dtype] if stored in _FLOATS else _STORED_BYTES.get(stored, 1))
        for stored, count in parameters_by_dtype.items()
    )
    return int(weights * _OVERHEAD) + _PROCESS_BYTES
