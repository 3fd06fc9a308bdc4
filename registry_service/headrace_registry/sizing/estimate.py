"""Estimates the bytes of a model in each form: weights, buffers, an empty runner, a workload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace_registry.models.models import Architecture, Quantization
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.sizing.shapes import shapes_of
from headrace_registry.sizing.tensors import ITEM_BYTES, NEVER_QUANTIZED, Form, Tally
from headrace_registry.sizing.workload import Workload, workload_bytes

# An empty runner, until the node has measured its own: interpreter, torch and transformers in main memory; on a GPU the
# context, kernels and workspaces.
_RUNTIME_BYTES = {DeviceKind.CPU: 400_000_000, DeviceKind.CUDA: 600_000_000, DeviceKind.MPS: 400_000_000}

# A load also leaves the family's code in main memory, and the quantization library; both sizes were measured.
_CODE_BYTES = 10_000_000
_QUANTIZER_BYTES = 80_000_000

# The most exact first. Of the two half-precision dtypes, the more exact one is the dtype of the files.
FORMS = (
    Form(quantization=Quantization.NONE, dtype="float32"),
    Form(quantization=Quantization.NONE, dtype="bfloat16"),
    Form(quantization=Quantization.NONE, dtype="float16"),
    Form(quantization=Quantization.INT8, dtype="bfloat16"),
    Form(quantization=Quantization.INT4, dtype="bfloat16"),
)

_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
# Queries, keys, values, output and a gated MLP.
_MATRICES_PER_LAYER = 7
_NO_ROTARY = {"gpt2", "gpt_neo", "gpt_bigcode", "gptj", "opt", "bloom"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Facts about a model for its estimates; `exact` if they come from the names and shapes of its tensors."""

    network: Architecture
    tally: Tally
    exact: bool
    stored_dtype: str = ""
    eager: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """An estimate in parts."""

    weight_bytes: int
    buffer_bytes: int
    load_bytes: int  # Code and copies that a load leaves in main memory.
    runtime_bytes: int
    workload_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return self.weight_bytes + self.buffer_bytes + self.load_bytes + self.runtime_bytes + self.workload_bytes

    def corrected(self, measured_bytes: int) -> Bytes:
        """Fits weights, buffers and runtime to their measured sum; the runtime is the remainder."""
        weight_bytes = min(self.weight_bytes, measured_bytes)
        buffer_bytes = min(self.buffer_bytes, measured_bytes - weight_bytes)
        return Bytes(
            weight_bytes=weight_bytes,
            buffer_bytes=buffer_bytes,
            load_bytes=0,
            runtime_bytes=measured_bytes - weight_bytes - buffer_bytes,
            workload_bytes=self.workload_bytes,
        )


def estimate(
    profile: Profile, form: Form, *, kind: DeviceKind, workload: Workload | None = None, runtime_bytes: int = 0
) -> Bytes:
    """Estimates one form on one kind of device; without a workload, the model at rest.

    `runtime_bytes` is the size of an empty runner as the node measured it; 0 stands for the usual size.
    """
    work = 0
    if workload is not None:
        work = workload_bytes(profile.network, profile.tally, form, workload, kind=kind, eager=profile.eager)
    load_bytes = _CODE_BYTES if kind is DeviceKind.CPU else 0
    if kind is DeviceKind.CPU and form.quantization is not Quantization.NONE:
        # Quantized weights stay mapped, and so do numbers of the same file that were converted to another dtype.
        stored = _STORED.get(profile.stored_dtype, form.dtype)
        copies = 0 if stored == form.dtype else profile.tally.n_kept * ITEM_BYTES[stored]
        load_bytes += _QUANTIZER_BYTES + copies
    return Bytes(
        weight_bytes=profile.tally.weight_bytes(form),
        buffer_bytes=buffer_bytes(profile.network),
        load_bytes=load_bytes,
        runtime_bytes=runtime_bytes or _RUNTIME_BYTES[kind],
        workload_bytes=work,
    )


def buffer_bytes(network: Architecture) -> int:
    """Bytes of the tables that a runner computes: frequencies of rotary embeddings, masks, positions."""
    window = network.context_window
    if network.model_type == "gpt_bigcode":
        return window * window
    if network.model_type == "gpt_neo":
        return network.n_layers * window * window
    if network.model_type == "gptj":
        return network.n_layers * window * min(64, network.d_head) * 4
    if network.model_type in _NO_ROTARY:
        return 0
    tables = 2 if network.model_type.startswith("gemma3") else 1
    return tables * 4 * network.d_head + (4 if network.model_type.startswith("gemma") else 0)


def profile_of(network: Architecture, parameters_by_dtype: Mapping[str, int]) -> Profile:
    """Makes a profile without tensor names: from the family's shapes if known, else from the embeddings' size."""
    stored = {dtype: n for dtype, n in parameters_by_dtype.items() if dtype in _FLOATS}
    n_stored, dtype = sum(stored.values()), max(stored, key=lambda name: stored[name], default="")
    fixed_bytes = sum(n for dtype, n in parameters_by_dtype.items() if dtype not in _FLOATS)
    shapes = shapes_of(network)
    head = network.vocab_size * network.d_model
    # Files with fewer numbers than the family has, and no packed ones, do not belong to their config.
    if shapes is None or not (fixed_bytes or n_stored + head >= shapes.n_parameters):
        tally = _rough_tally(network, n_stored, fixed_bytes)
        return Profile(network=network, tally=tally, exact=False, stored_dtype=dtype)
    # Further numbers in the files are loaded too, such as a vision tower; masks, which are computed anew, and a copy of
    # the tied head are not.
    n_other = n_stored - shapes.n_parameters
    masks = network.n_layers * network.context_window**2 if network.model_type == "gpt2" else 0
    for n_not_held in (masks, head):
        if n_not_held and n_other >= n_not_held:
            n_other -= n_not_held
    return Profile(network=network, tally=shapes.tally(max(0, n_other)), exact=False, stored_dtype=dtype)


def _rough_tally(network: Architecture, n_floats: int, fixed_bytes: int) -> Tally:
    """Counts all numbers but the embeddings as linear weights of equal size."""
    embedding = network.vocab_size * network.d_model
    n_held = n_floats - (0 if network.tied_embeddings or 2 * embedding > n_floats else embedding)
    n_matrices = _MATRICES_PER_LAYER * network.n_layers
    has_linear = embedding and n_matrices and network.model_type not in NEVER_QUANTIZED
    elements = max(0, n_held - embedding) // n_matrices if has_linear else 0
    matrices = {(elements, network.d_model): n_matrices} if elements else {}
    return Tally(matrices=matrices, n_kept=n_held - elements * n_matrices, fixed_bytes=fixed_bytes)
