"""JSON files beside the weights: `config.json`, and the index of weights in several files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headrace_models.errors import JsonInvalid

# A config has kilobytes, the index of the largest models some megabytes.
MAX_JSON_BYTES = 64 * 1024 * 1024


def read_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object. Raises JsonInvalid, and OSError where the file can't be opened."""
    with path.open("rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise JsonInvalid(path.name, f"is larger than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as exc:  # A file of brackets alone nests deeper than the parser follows.
        raise JsonInvalid(path.name, f"is no JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise JsonInvalid(path.name, "is no JSON object")
    return value
