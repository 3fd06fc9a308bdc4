"""The tensors of well-known families, computed from the numbers of their `config.json`.

Used for models before their download, and for the catalog. `n_parameters` is exact for the families of the table.
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
    """One transformer block: its linear layers, and the number of its other parameters."""

    matrices: tuple[Matrix, ...]
    n_vectors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """A whole network. `n_kept` counts embeddings and final norm; `n_head` the head, 0 if its weights are tied."""

    n_layers: int
    block: Block
    n_kept: int
    n_head: int

    @property
    def n_parameters(self) -> int:
        """Number of all parameters, with the head."""
        per_layer = sum(inputs * outputs for inputs, outputs in self.block.matrices) + self.block.n_vectors
        return self.n_layers * per_layer + self.n_kept + self.n_head

    def tally(self, n_other: int = 0) -> Tally:
        """Counts the numbers that a runner loads, without the head; `n_other` more are loaded unquantized."""
        matrices: Counter[tuple[int, int]] = Counter()
        for inputs, outputs in self.block.matrices:
            matrices[inputs * outputs, outputs] += self.n_layers
        return Tally(matrices=dict(matrices), n_kept=self.n_kept + self.n_layers * self.block.n_vectors + n_other)


def shapes_of(network: Architecture, d_embed: int = 0) -> Shapes | None:
    """Returns the tensors of a network; None for an unknown family or a config that lacks numbers.

    `d_embed` is the width of an OPT's embeddings where projections lead to a wider residual stream and back, as in the
    350m model. That model has no norm behind its last block.
    """
    block = _BLOCKS.get(network.model_type)
    if block is None or not (network.n_layers and network.d_model and network.d_mlp and network.vocab_size):
        return None
    d = network.d_model
    n_head = 0 if network.tied_embeddings else d * network.vocab_size
    if network.model_type in _HEADS_WITH_BIAS:
        n_head += network.vocab_size
    norm = 2 * d if network.model_type in _LAYER_NORM else d
    n_positions = network.context_window if network.model_type in _LEARNED_POSITIONS else 0
    if network.model_type == "opt":
        n_positions += 2  # OPT's positions begin at 2.
    n_kept = d * (network.vocab_size + n_positions) + norm
    if d_embed:
        n_kept = d_embed * (network.vocab_size + 2 * d) + d * n_positions
    return Shapes(n_layers=network.n_layers, block=block(network), n_kept=n_kept, n_head=n_head)


def _gpt2(network: Architecture) -> Block:
    d, mlp = network.d_model, network.d_mlp
    return Block(matrices=((d, 3 * d), (d, d), (d, mlp), (mlp, d)), n_vectors=4 * d + 3 * d + d + mlp + d)


def _gpt_bigcode(network: Architecture) -> Block:
    d, mlp = network.d_model, network.d_mlp
    qkv = d + 2 * network.n_kv_heads * network.d_head
    return Block(matrices=((d, qkv), (d, d), (d, mlp), (mlp, d)), n_vectors=4 * d + qkv + d + mlp + d)


def _unfused(network: Architecture, *, n_norms: int, n_attention_biases: int) -> Block:
    """Queries, keys and values apart; the norms and the MLP have biases, the attention only some."""
    d, mlp = network.d_model, network.d_mlp
    n_vectors = 2 * d * n_norms + d * n_attention_biases + mlp + d
    return Block(matrices=((d, d),) * 4 + ((d, mlp), (mlp, d)), n_vectors=n_vectors)


def _biased(network: Architecture, *, n_norms: int) -> Block:
    """Every layer and every norm has a bias."""
    matrices = (*_attention(network), (network.d_model, network.d_mlp), (network.d_mlp, network.d_model))
    n_vectors = 2 * network.d_model * n_norms + sum(outputs for _, outputs in matrices)
    return Block(matrices=matrices, n_vectors=n_vectors)


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


_BLOCKS: Mapping[str, Callable[[Architecture], Block]] = {
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neo": lambda network: _unfused(network, n_norms=2, n_attention_biases=1),
    "gpt_neox": _gpt2,  # Queries, keys and values in one matrix, as in GPT-2.
    "gptj": lambda network: _unfused(network, n_norms=1, n_attention_biases=0),
    "opt": lambda network: _unfused(network, n_norms=2, n_attention_biases=4),
    "phi": lambda network: _biased(network, n_norms=1),
    "phi3": _phi3,
    "starcoder2": lambda network: _biased(network, n_norms=2),
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
_LEARNED_POSITIONS = {"gpt2", "gpt_bigcode", "gpt_neo", "opt"}
_HEADS_WITH_BIAS = {"phi", "gptj"}
