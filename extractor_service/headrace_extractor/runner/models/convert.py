"""Converts a GGUF file to a folder in transformers' layout, which then is loaded like any other model."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

from headrace_extractor.errors import LoadFailed, ModelUnsupported
from headrace_extractor.runner.models.new_folder import new_folder
from headrace_extractor.runner.models.progress import OnProgress, bar_watched

# Exactly the numbers of the GGUF file, unpacked: a scale times a small integer plus an offset has more digits than
# bfloat16 holds (of a 4-bit file it keeps 18 % of the weights exactly, float16 52 %). For that the folder is twice as
# large, once; a load in bfloat16 rounds.
_DTYPE = torch.float32


def convert_gguf(source_path: Path, target_path: Path, on_progress: OnProgress) -> None:
    """Writes weights, config and tokenizer to `target_path`, complete or not at all; an existing folder stays.

    Progress counts the bytes of the tensors unpacked so far; the rest of the time is spent writing. Raises
    ModelUnsupported, LoadFailed and DiskFull.
    """
    if target_path.exists():
        return
    if not source_path.is_file():
        raise ModelUnsupported(f"There is no file {source_path}; register the model again with the right path.")
    total_bytes = source_path.stat().st_size
    on_progress(0, total_bytes)
    watched = bar_watched(
        modeling_gguf_pytorch_utils,
        lambda done_bytes, _: on_progress(done_bytes, total_bytes),
        size_of=lambda tensor: int(tensor.n_bytes),
    )
    try:
        with new_folder(target_path) as folder, watched:
            _convert(source_path, folder)
    except (OSError, SafetensorError) as exc:
        raise LoadFailed(f"Converting {source_path} failed: {str(exc)[:500]}") from exc
    except (ValueError, KeyError, NotImplementedError, ImportError) as exc:
        raise ModelUnsupported(f"transformers can't read {source_path}: {str(exc)[:500]}") from exc
    except (RuntimeError, IndexError, struct.error) as exc:  # From numbers in the file that make no sense.
        raise LoadFailed(f"Converting {source_path} failed: {str(exc)[:500]}") from exc
    on_progress(total_bytes, total_bytes)


def _convert(source_path: Path, folder: Path) -> None:
    where: dict[str, Any] = {"gguf_file": source_path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source_path.parent, **where)
    if not tokenizer.is_fast:
        raise ModelUnsupported(
            f"The tokenizer in {source_path} has no form that tokenizer.json can hold; use another file."
        )
    # `dequantize` also drops the GGUF entry from the config; with that entry save_pretrained would refuse.
    model = AutoModelForCausalLM.from_pretrained(
        source_path.parent, dtype=_DTYPE, quantization_config=GgufConfig(dequantize=True), **where
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
