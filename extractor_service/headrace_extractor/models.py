"""A registered model, as far as the extractor needs to know it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_extractor.errors import ModelChanged
from headrace_models.folder import FileStamp, changed_files

_SHOWN = 5


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
    files: tuple[FileStamp, ...] = ()  # Empty: not known, of a model prepared by an earlier version.

    def compute_dtype(self, device_id: str) -> str:
        """Dtype of the model's forward passes on a device."""
        return compute_dtype(self.load_options, device_id)


def check_files(folder: Path, files: Sequence[FileStamp]) -> None:
    """Raises ModelChanged unless the files of a model's folder are as they were. Reads files whose stamps differ."""
    # Not on this node: nothing can be said, and nothing computed.
    changed = changed_files(folder, files) if files and folder.is_dir() else []
    if changed:
        shown = ", ".join(changed[:_SHOWN]) + (", …" if len(changed) > _SHOWN else "")
        raise ModelChanged(
            f"Files of the model in {folder} changed since it was prepared ({shown}). Prepare the model again: "
            "`headrace models add` with the same source notices the change. Then start the extraction again: its rows "
            "will be another set's.",
            metadata={"files": shown},
        )


def compute_dtype(load_options: Mapping[str, Any], device_id: str) -> str:
    """Dtype of forward passes: the load option, else float32 on a CPU and bfloat16 on a GPU."""
    return str(load_options.get("dtype", "float32" if device_id == "cpu" else "bfloat16"))
