"""A registered model, as the extractor needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the extractor needs to know of a registered model."""

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
        """Dtype of the forward pass: the load option, else float32 on a CPU and bfloat16 on a GPU."""
        default = "float32" if device_id == "cpu" else "bfloat16"
        return str(self.load_options.get("dtype", default))
