"""How many bytes a model takes in each form: weights, buffers, an empty runner, a workload."""

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

# Beside the weights a load leaves in main memory the family's code, and the library that quantizes; measured.
_CODE_BYTES = 10_000_000
_QUANTIZER_BYTES = 80_000_000

# The most exact first; which of the two half-precision dtypes is, depends on how the files are stored.
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
    """What the estimator knows of a model; `exact` if it saw the tensors' names and shapes."""

    network: Architecture
    tally: Tally
    exact: bool
    stored_dtype: str = ""
    eager: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """An estimate, part by part."""

    weight_bytes: int
    buffer_bytes: int
    load_bytes: int  # What loading leaves behind.
    runtime_bytes: int
    workload_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.buffer_bytes + self.load_bytes + self.runtime_bytes + self.workload_bytes


def estimate(
    profile: Profile, form: Form, *, kind: DeviceKind, workload: Workload | None = None, runtime_bytes: int = 0
) -> Bytes:
    """Adds up what a form takes on a sort of device; no workload: the model at rest.

    `runtime_bytes` is what the node measured of an empty runner; 0 stands for the usual one on such a device.
    """
    work = 0
    if workload is not None:
        work = workload_bytes(profile.network, profile.tally, form, workload, kind=kind, eager=profile.eager)
    return Bytes(
        weight_bytes=profile.tally.weight_bytes(form),
        buffer_bytes=buffer_bytes(profile.network),
        load_bytes=_load_bytes(profile, form, kind),
        runtime_bytes=runtime_bytes or _RUNTIME_BYTES[kind],
        workload_bytes=work,
    )


def _load_bytes(profile: Profile, form: Form, kind: DeviceKind) -> int:
    if kind is not DeviceKind.CPU:
        return 0
    if form.quantization is Quantization.NONE:
        return _CODE_BYTES
    # Quantized weights stay mapped, and with them what was converted from the same file to another dtype.
    stored = _STORED.get(profile.stored_dtype, form.dtype)
    copies = 0 if stored == form.dtype else profile.tally.n_kept * ITEM_BYTES[stored]
    return _CODE_BYTES + _QUANTIZER_BYTES + copies


def buffer_bytes(network: Architecture) -> int:
    """Tables that are held but not stored: frequencies of rotary embeddings, masks, positions."""
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
    """Estimates without names and shapes: by the family's shapes if it is known, else by the sizes of embeddings."""
    stored = {dtype: n for dtype, n in parameters_by_dtype.items() if dtype in _FLOATS}
    n_stored, dtype = sum(stored.values()), max(stored, key=lambda name: stored[name], default="")
    fixed_bytes = sum(n for dtype, n in parameters_by_dtype.items() if dtype not in _FLOATS)
    shapes = shapes_of(network)
    # Fewer numbers than the family has, and none that are packed: the files are not what their config says.
    head = network.vocab_size * network.d_model
    if shapes is not None and (fixed_bytes or n_stored + head >= shapes.n_parameters):
        tally = shapes.tally(_n_unknown(network, n_stored - shapes.n_parameters))
    else:
        tally = _rough_tally(network, n_stored, fixed_bytes)
    return Profile(network=network, tally=tally, exact=False, stored_dtype=dtype)


def _n_unknown(network: Architecture, n_more: int) -> int:
    """Of the numbers that files hold beyond the family's: those that are held too, such as a vision tower."""
    head = network.vocab_size * network.d_model
    masks = network.n_layers * network.context_window**2 if network.model_type == "gpt2" else 0
    for n_not_held in (masks, head):  # Masks that are computed anew; a copy of the tied head.
        if n_not_held and n_more >= n_not_held:
            n_more -= n_not_held
    return max(0, n_more)


def _rough_tally(network: Architecture, n_floats: int, fixed_bytes: int) -> Tally:
    """Takes everything but the embeddings for linear weights of equal size."""
    embedding = network.vocab_size * network.d_model
    n_held = n_floats - (0 if network.tied_embeddings or 2 * embedding > n_floats else embedding)
    n_matrices = _MATRICES_PER_LAYER * network.n_layers
    has_linear = embedding and n_matrices and network.model_type not in NEVER_QUANTIZED
    elements = max(0, n_held - embedding) // n_matrices if has_linear else 0
    matrices = {(elements, network.d_model): n_matrices} if elements else {}
    return Tally(matrices=matrices, n_kept=n_held - elements * n_matrices, fixed_bytes=fixed_bytes)
