"""The bytes that admission reserves for a load before the load is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace_registry.models.models import Architecture, Quantization
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.sizing.estimate import estimate, profile_of
from headrace_registry.sizing.tensors import Form
from headrace_registry.sizing.workload import Workload

# The defaults of a recipe.
USUAL_WORKLOAD = Workload(batch_size=4, context_size=256, n_hookpoints=1)


def load_dtype(load_options: Mapping[str, Any], kind: DeviceKind) -> str:
    """The dtype weights get on a device: the model's own option, else fp32 on CPUs and bf16 on GPUs."""
    chosen = load_options.get("dtype")
    if isinstance(chosen, str):
        return chosen
    return "float32" if kind is DeviceKind.CPU else "bfloat16"


def estimated_bytes(
    parameters_by_dtype: Mapping[str, int],
    dtype: str,
    *,
    architecture: Architecture | None = None,
    quantization: Quantization = Quantization.NONE,
    kind: DeviceKind = DeviceKind.CPU,
    runtime_bytes: int = 0,
) -> int:
    """Bytes of weights, buffers, an empty runner and the usual workload.

    `runtime_bytes` is the size of an empty runner as the node measured it; 0 stands for the usual size.
    """
    parts = estimate(
        profile_of(architecture or Architecture(), parameters_by_dtype),
        Form(quantization=quantization, dtype=dtype),
        kind=kind,
        workload=USUAL_WORKLOAD,
        runtime_bytes=runtime_bytes,
    )
    return parts.total_bytes
