"""JSON files beside the weights: `config.json`, and the index of weights in several files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headrace_models.errors import JsonInvalid

# A config has kilobytes; one that lists its quantized modules may have hundreds.
MAX_CONFIG_BYTES = 4 * 1024 * 1024
# The index of the largest models has some megabytes.
MAX_JSON_BYTES = 32 * 1024 * 1024


def read_config(folder: Path) -> dict[str, Any]:
    """Reads a model's `config.json`; raises the errors of `read_object`."""
    return read_object(folder / "config.json", max_bytes=MAX_CONFIG_BYTES)


def read_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a file that holds one JSON object. Raises JsonInvalid, and OSError where the file can't be opened."""
    with path.open("rb") as file:
        return object_of(file.read(max_bytes + 1), path.name, max_bytes=max_bytes)


def object_of(raw: bytes, name: str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Parses the content of such a file. Raises JsonInvalid."""
    if len(raw) > max_bytes:
        raise JsonInvalid(name, f"is larger than {max_bytes} bytes")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as exc:  # A file of brackets alone nests deeper than the parser follows.
        raise JsonInvalid(name, f"is no JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise JsonInvalid(name, "is no JSON object")
    return value
