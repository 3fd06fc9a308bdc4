"""The tensors of well-known families, computed from the numbers of their `config.json`.

For models whose files are not there yet and for the catalog. `n_parameters` is exact for the families named here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headrace_registry.models.models import Architecture
from headrace_registry.sizing.tensors import Tally

Matrix = tuple[int, int]  # inputs, outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One transformer block: its linear layers, and how many other numbers it has."""

    matrices: tuple[Matrix, ...]
    n_vectors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """A whole network; `n_kept` counts embeddings and final norm, `n_head` the head if it has its own weights."""

    n_layers: int
    block: Block
    n_kept: int
    n_head: int

    @property
    def n_parameters(self) -> int:
        """All of them, the head included."""
        per_layer = sum(inputs * outputs for inputs, outputs in self.block.matrices) + self.block.n_vectors
        return self.n_layers * per_layer + self.n_kept + self.n_head

    def tally(self, n_other: int = 0) -> Tally:
        """What a runner holds of it; `n_other` more numbers are held unquantized."""
        matrices: Counter[tuple[int, int]] = Counter()
        for inputs, outputs in self.block.matrices:
            matrices[inputs * outputs, outputs] += self.n_layers
        return Tally(matrices=dict(matrices), n_kept=self.n_kept + self.n_layers * self.block.n_vectors + n_other)


def shapes_of(network: Architecture) -> Shapes | None:
    """Returns the family's tensors; None for families that are not known here, or if numbers are missing."""
    block = _BLOCKS.get(network.model_type)
    if block is None or not (network.n_layers and network.d_model and network.d_mlp and network.vocab_size):
        return None
    d = network.d_model
    n_head = 0 if network.tied_embeddings else d * network.vocab_size
    if network.model_type in _HEADS_WITH_BIAS:
        n_head += network.vocab_size
    norm = 2 * d if network.model_type in _LAYER_NORM else d
    n_kept = d * network.vocab_size + d * _n_positions(network) + norm
    return Shapes(n_layers=network.n_layers, block=block(network), n_kept=n_kept, n_head=n_head)


def _n_positions(network: Architecture) -> int:
    """Rows of the learned position embedding."""
    if network.model_type == "opt":
        return network.context_window + 2
    return network.context_window if network.model_type in ("gpt2", "gpt_bigcode", "gpt_neo") else 0


def _gpt2(network: Architecture) -> Block:
    d, mlp = network.d_model, network.d_mlp
    return Block(matrices=((d, 3 * d), (d, d), (d, mlp), (mlp, d)), n_vectors=4 * d + 3 * d + d + mlp + d)


def _gpt_bigcode(network: Architecture) -> Block:
    d, mlp = network.d_model, network.d_mlp
    qkv = d + 2 * network.n_kv_heads * network.d_head
    return Block(matrices=((d, qkv), (d, d), (d, mlp), (mlp, d)), n_vectors=4 * d + qkv + d + mlp + d)


def _gpt_neo(network: Architecture) -> Block:
    d, mlp = network.d_model, network.d_mlp
    return Block(matrices=((d, d),) * 4 + ((d, mlp), (mlp, d)), n_vectors=4 * d + d + mlp + d)


def _gptj(network: Architecture) -> Block:
    d, mlp = network.d_model, network.d_mlp
    return Block(matrices=((d, d),) * 4 + ((d, mlp), (mlp, d)), n_vectors=2 * d + mlp + d)


def _opt(network: Architecture) -> Block:
    d, mlp = network.d_model, network.d_mlp
    return Block(matrices=((d, d),) * 4 + ((d, mlp), (mlp, d)), n_vectors=4 * d + 4 * d + mlp + d)


def _phi(network: Architecture) -> Block:
    matrices = (*_attention(network), *_plain_mlp(network))
    return Block(matrices=matrices, n_vectors=2 * network.d_model + sum(outputs for _, outputs in matrices))


def _starcoder2(network: Architecture) -> Block:
    matrices = (*_attention(network), *_plain_mlp(network))
    return Block(matrices=matrices, n_vectors=4 * network.d_model + sum(outputs for _, outputs in matrices))


def _phi3(network: Architecture) -> Block:
    d, mlp = network.d_model, network.d_mlp
    q, kv = network.n_heads * network.d_head, network.n_kv_heads * network.d_head
    return Block(matrices=((d, q + 2 * kv), (q, d), (d, 2 * mlp), (mlp, d)), n_vectors=2 * d)


def _llama(network: Architecture, *, n_norms: int = 2, biased: bool = False, head_norms: bool = False) -> Block:
    d, mlp = network.d_model, network.d_mlp
    attention = _attention(network)
    n_vectors = n_norms * d
    if biased:
        n_vectors += sum(outputs for _, outputs in attention[:3])
    if head_norms:
        n_vectors += 2 * network.d_head
    return Block(matrices=(*attention, (d, mlp), (d, mlp), (mlp, d)), n_vectors=n_vectors)


def _attention(network: Architecture) -> tuple[Matrix, ...]:
    d = network.d_model
    q, kv = network.n_heads * network.d_head, network.n_kv_heads * network.d_head
    return (d, q), (d, kv), (d, kv), (q, d)


def _plain_mlp(network: Architecture) -> tuple[Matrix, ...]:
    return (network.d_model, network.d_mlp), (network.d_mlp, network.d_model)


_BLOCKS: Mapping[str, Callable[[Architecture], Block]] = {
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt2,  # Fused as in GPT-2, the same numbers.
    "gptj": _gptj,
    "opt": _opt,
    "phi": _phi,
    "phi3": _phi3,
    "starcoder2": _starcoder2,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": lambda network: _llama(network, biased=True),
    "qwen3": lambda network: _llama(network, head_norms=True),
    "gemma": _llama,
    "gemma2": lambda network: _llama(network, n_norms=4),
    "gemma3": lambda network: _llama(network, n_norms=4, head_norms=True),
    "gemma3_text": lambda network: _llama(network, n_norms=4, head_norms=True),
}
_LAYER_NORM = {"gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "starcoder2"}
_HEADS_WITH_BIAS = {"phi", "gptj"}
