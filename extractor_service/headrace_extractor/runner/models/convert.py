"""Converts a GGUF file to a folder in transformers' layout, which then is loaded like any other model."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

from headrace_extractor.errors import ExtractorError, LoadFailed, ModelUnsupported
from headrace_extractor.runner.models.accounting import check_weights, conversions_named, named
from headrace_extractor.runner.models.gguf_files.parts import ROTATIONS, absent_halves, scale_rotations, whole_file
from headrace_extractor.runner.models.gguf_files.settings import settings_left_out
from headrace_extractor.runner.models.new_folder import new_folder
from headrace_extractor.runner.models.progress import OnProgress, bar_watched

# Exactly the numbers of the GGUF file, unpacked: a scale times a small integer plus an offset has more digits than
# bfloat16 holds (of a 4-bit file it keeps 18 % of the weights exactly, float16 52 %). For that the folder is twice as
# large, once; a load in bfloat16 rounds.
_DTYPE = torch.float32


def convert_gguf(source_path: Path, target_path: Path, on_progress: OnProgress) -> None:
    """Writes weights, config and tokenizer to `target_path`, complete or not at all; an existing folder stays.

    Progress counts the bytes of the tensors unpacked so far, of a file in parts also those joined; the rest of the time
    is spent writing. Raises ModelUnsupported, LoadFailed and DiskFull.
    """
    if target_path.exists():
        return
    if not source_path.is_file():
        raise ModelUnsupported(f"There is no file {source_path}; register the model again with the right path.")
    try:
        with new_folder(target_path) as folder:
            _convert(source_path, folder, on_progress)
    except ExtractorError:
        raise
    except (OSError, SafetensorError) as exc:
        raise LoadFailed(f"Converting {source_path} failed: {str(exc)[:500]}") from exc
    except (RuntimeError, IndexError, struct.error) as exc:  # From numbers in the file that make no sense.
        if isinstance(exc, NotImplementedError):
            raise ModelUnsupported(f"transformers can't read {source_path}: {str(exc)[:500]}") from exc
        raise LoadFailed(f"Converting {source_path} failed: {str(exc)[:500]}") from exc
    except Exception as exc:  # The library of tokenizers raises nothing narrower.
        raise ModelUnsupported(f"transformers can't read {source_path}: {str(exc)[:500]}") from exc


def _convert(source_path: Path, folder: Path, on_progress: OnProgress) -> None:
    own_bytes = source_path.stat().st_size
    on_progress(0, own_bytes)
    with whole_file(source_path, folder.parent, lambda done, total: on_progress(done, 2 * total)) as whole:
        total_bytes = whole.stat().st_size
        joined_bytes = 0 if whole == source_path else total_bytes
        if absent := absent_halves(whole):
            raise LoadFailed(f"{source_path.name} lacks {named(absent)}; fetch it again.")
        where: dict[str, Any] = {"gguf_file": whole.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(whole.parent, **where)
        if not tokenizer.is_fast:
            raise ModelUnsupported(
                f"The tokenizer in {source_path} has no form that tokenizer.json can hold; use another file."
            )
        watched = bar_watched(
            modeling_gguf_pytorch_utils,
            lambda done_bytes, _: on_progress(joined_bytes + done_bytes, joined_bytes + total_bytes),
            size_of=lambda tensor: int(tensor.n_bytes),
        )
        with watched, conversions_named(), _unread_tensors() as unread:
            # `dequantize` also drops the GGUF entry from the config; with that entry save_pretrained would refuse.
            model, report = AutoModelForCausalLM.from_pretrained(
                whole.parent,
                dtype=_DTYPE,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **where,
            )
        check_weights(model, report)
        if unread == {ROTATIONS} and scale_rotations(model.config, whole):
            unread.clear()
        if unread:
            raise ModelUnsupported(
                f"transformers leaves out {named(unread)} of {source_path.name}, so this model would compute other "
                "numbers than it should; register the model's repo of safetensors instead."
            )
        if settings := settings_left_out(model.config, whole):
            raise ModelUnsupported(
                f"transformers leaves out settings of {source_path.name} ({', '.join(settings)}), so this model would "
                "compute other numbers than it should; register the model's repo of safetensors instead."
            )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    on_progress(joined_bytes + total_bytes, joined_bytes + total_bytes)


@contextmanager
def _unread_tensors() -> Iterator[set[str]]:
    """Collects the names of tensors that transformers' older reader of GGUF files leaves out without a word.

    It asks its table of names for each tensor of the file, and goes on with the next tensor where the table has none.
    The newer reader reports such tensors as unexpected.
    """
    unread: set[str] = set()
    original = modeling_gguf_pytorch_utils.get_gguf_hf_weights_map

    class Names(dict[str, str]):
        def __contains__(self, name: object) -> bool:
            known = super().__contains__(name)
            if not known and isinstance(name, str):
                unread.add(name)
            return known

    def names_of(*args: Any, **options: Any) -> dict[str, str]:
        return Names(original(*args, **options))

    modeling_gguf_pytorch_utils.get_gguf_hf_weights_map = names_of
    try:
        yield unread
    finally:
        modeling_gguf_pytorch_utils.get_gguf_hf_weights_map = original
