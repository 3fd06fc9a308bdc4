"""Makes quantized weights once, and measures how far their residual stream is from the source's."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

from headrace_extractor.errors import LoadFailed, ModelUnsupported
from headrace_extractor.node.runner_protocol import Quantize
from headrace_extractor.runner.models.loading import (
    hush_transformers,
    load_errors,
    load_model,
    stored_config,
    weight_files,
)
from headrace_extractor.runner.models.new_folder import new_folder
from headrace_extractor.runner.models.probe import difference, residuals, sample_ids
from headrace_extractor.runner.models.progress import OnProgress
from headrace_extractor.runner.models.quantizers import quantizer_for

FIDELITY = "fidelity.json"
# Files beside the weights that a model needs. transformers writes the rewritten ones itself.
_CARRIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_REWRITTEN = ("config.json", "model.safetensors.index.json")


def quantize(command: Quantize, on_progress: OnProgress) -> dict[str, Any]:
    """Makes the folder `target_path`, complete or not at all, and returns its fidelity; an existing folder stays.

    Runs on the CPU also where a node has a GPU: it needs no device memory, and the same files give the same weights
    on every node.
    Progress counts the source twice, once for the comparison. Raises ExtraMissing, FieldInvalid, ModelUnsupported,
    LoadFailed, DeviceOom and DiskFull.
    """
    source, target = Path(command.source_path), Path(command.target_path)
    if target.exists():
        return read_fidelity(target)
    quantizer = quantizer_for(command.quantization)
    stored = stored_config(source)
    if stored.get("quantization_config"):
        raise ModelUnsupported(f"{source} is quantized already; register the full weights to quantize them here.")
    hush_transformers()
    source_bytes = sum(path.stat().st_size for path in weight_files(source))
    total_bytes = 2 * source_bytes
    options = {"load_options": command.load_options, "device": "cpu", "dtype": command.dtype}
    loaded = load_model(source, on_progress=lambda done, _: on_progress(done, total_bytes), **options)
    token_ids = sample_ids(source, longest=loaded.n_positions)
    reference = residuals(loaded.model, token_ids)
    del loaded
    gc.collect()  # Both models at once would need the memory of both.
    with new_folder(target) as folder:
        with load_errors(source, stored):
            quantizer.quantize(source, folder, lambda done, _: on_progress(source_bytes + done, total_bytes))
        for path in source.iterdir():
            if path.suffix in _CARRIED and path.name not in _REWRITTEN and path.is_file():
                shutil.copyfile(path, folder / path.name)
        # The quantizer has saved the network without its head; the folder keeps the name of the whole network.
        config = {**stored_config(folder), "architectures": stored.get("architectures")}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        quantized = load_model(folder, on_progress=lambda *_: None, quantization=command.quantization, **options)
        found = residuals(quantized.model, token_ids)
        compared = [difference(*pair) for pair in zip(found, reference, strict=True)]
        fidelity = {
            "reference_dtype": command.dtype,
            "n_tokens": len(token_ids),
            "layers": [
                {"layer": layer, "cosine": apart.cosine, "relative_error": apart.relative_error}
                for layer, apart in enumerate(compared)
            ],
        }
        (folder / FIDELITY).write_text(json.dumps(fidelity))
    on_progress(total_bytes, total_bytes)
    return fidelity


def read_fidelity(folder: Path) -> dict[str, Any]:
    """Returns the fidelity that was measured when the folder was made."""
    try:
        fidelity: dict[str, Any] = json.loads((folder / FIDELITY).read_bytes())
    except (OSError, ValueError) as exc:
        raise LoadFailed(f"{folder / FIDELITY} can't be read; delete the folder and prepare the model again.") from exc
    return fidelity
