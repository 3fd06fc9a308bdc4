"""A registered model, as far as the extractor needs to know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The fields of a registered model that extracting depends on."""

    id: str
    source: str  # `hub:owner/name`, `folder`, `gguf`
    commit_sha: str
    quantization: str
    load_options: Mapping[str, Any]
    ready: bool
    model_type: str
    n_layers: int
    d_model: int
    context_window: int
    weight_bytes: int
    files_path: str
    tokenizer_digest: str
    gguf_path: str = ""

    def compute_dtype(self, device_id: str) -> str:
        """Dtype of the model's forward passes on a device."""
        return compute_dtype(self.load_options, device_id)


def compute_dtype(load_options: Mapping[str, Any], device_id: str) -> str:
    """Dtype of forward passes: the load option, else float32 on a CPU and bfloat16 on a GPU."""
    return str(load_options.get("dtype", "float32" if device_id == "cpu" else "bfloat16"))
