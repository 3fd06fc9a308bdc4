"""The most exact quantization with which a model fits into so many bytes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace_registry.errors import ModelTooLarge
from headrace_registry.models.models import Quantization
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.sizing.estimate import Profile, estimate
from headrace_registry.sizing.reservation import USUAL_WORKLOAD, load_dtype
from headrace_registry.sizing.tensors import Form

# The most exact first. Two bits need a plug-in on the node, so they are never chosen for a caller.
_FALLBACKS = (Quantization.NONE, Quantization.INT8, Quantization.INT4)


def fitting_quantization(
    profile: Profile,
    load_options: Mapping[str, Any],
    fit_bytes: int,
    kind: DeviceKind,
    *,
    wanted: Quantization = Quantization.NONE,
) -> Quantization:
    """Returns `wanted`, or the first coarser quantization that fits with the usual workload. Raises ModelTooLarge."""
    tried: list[str] = []
    for quantization in _FALLBACKS[_FALLBACKS.index(wanted) :] if wanted in _FALLBACKS else (wanted,):
        form = Form(quantization=quantization, dtype=load_dtype(load_options, kind))
        total_bytes = estimate(profile, form, kind=kind, workload=USUAL_WORKLOAD).total_bytes
        if total_bytes <= fit_bytes:
            return quantization
        tried.append(f"{total_bytes} bytes as {quantization.lower()}")
    raise ModelTooLarge(
        f"the model takes {', '.join(tried)}, more than {fit_bytes}; choose a smaller model, or more memory",
        metadata={"fit_bytes": str(fit_bytes)},
    )
