"""Memory of a forward pass beside the weights. The runner computes no logits, keeps no cache, and ends early."""

from __future__ import annotations

from dataclasses import dataclass

from headrace_registry.errors import FieldInvalid
from headrace_registry.models.models import Architecture, Quantization
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.sizing.tensors import Form, Tally

# The limits of a recipe.
MAX_BATCH_SIZE = 1024
_MAX_CONTEXT = 131_072
_MAX_HOOKPOINTS = 4096
_GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "granite", "olmo"}
# Activations of GPT-2's kind are computed in eight steps, each with a result of its own.
_STEPWISE = {"gpt2", "gpt_neo", "gptj", "phi", "bloom", "codegen"}
# transformers has no fused attention for these.
_EAGER_ONLY = {"gemma2", "gpt_neo", "gptj", "bloom", "codegen"}
# Rows go to the log as fp32 at the widest.
_ROW_BYTES = 4
# Norms compute in fp32 whatever the dtype: the input, its square and the result.
_NORM_BYTES = 12
# Token ids, positions and masks of int64, a few of each.
_ID_BYTES = 64
# Bytes per input of a matrix. On a CPU, LLM.int8() makes fp32 and int32 copies of inputs and outputs; measured.
_INT8_BYTES = {DeviceKind.CPU: 56, DeviceKind.CUDA: 12, DeviceKind.MPS: 12}
# Buffers that the libraries' threads and kernels keep.
_SCRATCH_BYTES = 16_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sequences in a pass, tokens in a sequence, hookpoints captured."""

    batch_size: int = 1
    context_size: int = 1024
    n_hookpoints: int = 1

    def __post_init__(self) -> None:
        _check("batch_size", self.batch_size, MAX_BATCH_SIZE)
        _check("context_size", self.context_size, _MAX_CONTEXT)
        _check("n_hookpoints", self.n_hookpoints, _MAX_HOOKPOINTS)

    def with_batch(self, batch_size: int) -> Workload:
        """Returns the same workload with another batch size."""
        return Workload(batch_size=batch_size, context_size=self.context_size, n_hookpoints=self.n_hookpoints)


def workload_bytes(
    network: Architecture, tally: Tally, form: Form, workload: Workload, *, kind: DeviceKind, eager: bool = False
) -> int:
    """Bytes at the peak of a forward pass that captures the deepest layers."""
    item, tokens = form.item_bytes, workload.batch_size * workload.context_size
    column = tokens * network.d_model
    if kind is DeviceKind.CPU:  # Rows are converted one column at a time, on their way into the log.
        captured = column * (workload.n_hookpoints * item + _ROW_BYTES)
    else:  # Two batches are under way to the host.
        captured = column * workload.n_hookpoints * (item + 2 * _ROW_BYTES)
    # Three copies of the residual stream, the norm's copies in fp32, and the ids.
    stream = tokens * (network.d_model * (3 * item + _NORM_BYTES) + _ID_BYTES)
    n_results = 7 if network.model_type in _STEPWISE else 4 if network.model_type in _GATED else 3
    mlp = tokens * network.d_mlp * item * n_results
    # Attention and MLP run one after the other: only the larger of both counts.
    step = max(_attention_bytes(network, item, workload, eager=eager), mlp)
    if form.quantization is Quantization.INT8:
        step += tokens * max(network.d_mlp, network.d_model) * _INT8_BYTES[kind]
    # A quantized matrix is unfolded while it is used.
    unfolded = 0 if form.quantization is Quantization.NONE else tally.largest_matrix * item
    return captured + stream + step + unfolded + _SCRATCH_BYTES


def _attention_bytes(network: Architecture, item: int, workload: Workload, *, eager: bool) -> int:
    tokens = workload.batch_size * workload.context_size
    # Queries, keys and values before and after rotation, keys and values repeated for grouped heads, and the output.
    heads = tokens * network.n_heads * network.d_head * item * 6
    pairs = workload.batch_size * workload.context_size**2
    mask = pairs * (1 + item)
    # Scores, their scaled and masked copies, and their softmax in fp32.
    is_eager = eager or network.model_type in _EAGER_ONLY
    scores = pairs * network.n_heads * (2 * item + 8) if is_eager else 0
    return heads + mask + scores


def _check(field: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        raise FieldInvalid(field, f"is {value}; it must be 1 to {largest}, 0 for the default")
