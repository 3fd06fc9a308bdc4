"""Converts a GGUF file to a folder in transformers' layout, which then is loaded like any other model."""

from __future__ import annotations

import errno
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

from extractor_service.errors import DiskFull, LoadFailed, ModelUnsupported

OnProgress = Callable[[int, int], None]  # bytes done, bytes in all

# The numbers of the GGUF file, unpacked, and nothing else: a scale times a small integer plus an offset has more digits
# than bfloat16 holds (of a 4-bit file it keeps 18 % of the weights exactly, float16 52 %). The folder is twice as large
# for that, once; whoever computes in bfloat16 rounds while loading.
_DTYPE = torch.float32
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def convert_gguf(source_path: Path, target_path: Path, on_progress: OnProgress) -> None:
    """Writes weights, config and tokenizer to `target_path`, complete or not at all; done already is done.

    Progress counts the bytes of the tensors unpacked so far; the rest of the time is spent writing. Raises
    ModelUnsupported, LoadFailed and DiskFull.
    """
    if target_path.exists():
        return
    if not source_path.is_file():
        raise ModelUnsupported(f"There is no file {source_path}; register the model again with the right path.")
    total_bytes = source_path.stat().st_size
    partial = target_path.with_name(f".{target_path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    on_progress(0, total_bytes)
    try:
        with (
            _conversion_errors(source_path, target_path),
            _watched_tensors(lambda done: on_progress(done, total_bytes)),
        ):
            _convert(source_path, partial)
        partial.rename(target_path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    on_progress(total_bytes, total_bytes)


def _convert(source_path: Path, folder: Path) -> None:
    where: dict[str, Any] = {"gguf_file": source_path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source_path.parent, **where)
    if not tokenizer.is_fast:
        raise ModelUnsupported(
            f"The tokenizer in {source_path} has no form that tokenizer.json can hold; use another file."
        )
    # `dequantize` also drops the GGUF entry from the config; with it save_pretrained would refuse.
    model = AutoModelForCausalLM.from_pretrained(
        source_path.parent, dtype=_DTYPE, quantization_config=GgufConfig(dequantize=True), **where
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _make_durable(folder)


def _make_durable(folder: Path) -> None:
    """Before the folder gets its name: a name stands for whole files, readable to whom its config is."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for path in folder.iterdir():
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _watched_tensors(on_bytes: Callable[[int], None]) -> Iterator[None]:
    """Counts tensors as transformers unpacks them: it has no callback, but shows a bar, which this replaces."""
    shown = modeling_gguf_pytorch_utils.tqdm

    def counted(tensors: Iterable[Any], **_options: Any) -> Iterator[Any]:
        done = 0
        for tensor in tensors:
            yield tensor
            done += int(tensor.n_bytes)
            on_bytes(done)

    modeling_gguf_pytorch_utils.tqdm = counted
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = shown


@contextmanager
def _conversion_errors(source_path: Path, target_path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as exc:
        # The weights are written by safetensors, which puts the system's error into words.
        if getattr(exc, "errno", None) not in _NO_SPACE and "No space left" not in str(exc):
            raise LoadFailed(f"Converting {source_path} failed: {str(exc)[:500]}") from exc
        free_bytes = shutil.disk_usage(target_path.parent).free
        raise DiskFull(
            f"The disk of {target_path} is full ({free_bytes} bytes free); free some space, then prepare the model.",
            metadata={"free_bytes": str(free_bytes)},
        ) from exc
    except (ValueError, KeyError, NotImplementedError, ImportError) as exc:
        raise ModelUnsupported(f"transformers can't read {source_path}: {str(exc)[:500]}") from exc
    except (RuntimeError, IndexError, struct.error) as exc:
        raise LoadFailed(f"Converting {source_path} failed: {str(exc)[:500]}") from exc
