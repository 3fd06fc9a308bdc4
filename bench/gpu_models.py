"""Models with random weights, and random text for them: `python -m bench.gpu_models NAME FOLDER DEVICE` writes one.

The speed of a model does not depend on its weights, so nothing is downloaded; token ids need no tokenizer.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # From config.json of meta-llama/Llama-3.1-8B: the fields that shape the network.
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    # config.json of openai-community/gpt2-medium.
    "gpt2-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024},
    # The same code paths in seconds, on any machine.
    "llama-tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
    },
    "gpt2-tiny": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 6,
        "n_head": 4,
        "n_positions": 128,
        "vocab_size": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
_SHARD = "4GB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One extraction: `n_contexts` sequences of `context_size` random tokens, the residual stream after `layers`."""

    architecture: str
    context_size: int
    batch_size: int
    n_contexts: int
    layers: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        """Rows of the extraction."""
        return self.n_contexts * self.context_size

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(ARCHITECTURES[self.architecture].get("vocab_size", 50257))

    @property
    def hookpoints(self) -> list[str]:
        """Hookpoints of the layers, the deepest last."""
        return [f"blocks.{layer}.hook_resid_post" for layer in self.layers]

    def token_ids(self, seed: int) -> np.ndarray:
        """Returns random documents of one context each, `[n_contexts, context_size]`."""
        ids = np.random.default_rng(seed).integers(0, self.vocab_size, (self.n_contexts, self.context_size))
        return ids.astype(np.int32)


def write_model(architecture: str, folder: Path, device: str) -> None:
    """Writes config and safetensors in bfloat16."""
    import torch  # noqa: PLC0415 -- importers that need only the shapes do without
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    config = AutoConfig.for_model(**ARCHITECTURES[architecture])
    with torch.device(device):
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=_SHARD)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["dtype"] == "bfloat16", saved["dtype"]


if __name__ == "__main__":
    write_model(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
