"""Facts of a model's card: from the hub's answer, kept beside the files, or from the README of a local folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace_registry.inputs import clean_text
from headrace_registry.models.models import ModelCard

# The hub's answer, as the download writes it. A name with a dot is no file of the model, and not in its digest.
CARD_FILE = ".card.json"
CARD_FIELDS = ("license", "license_name", "license_link")
_README = "README.md"
_MAX_BYTES = 64 * 1024  # Of a file that is read: the facts stand in its first lines.
_MAX_TEXT = 255
# One line `name: value` of the block between two lines `---`. No YAML parser: the block comes from anybody.
_LINE = re.compile(r"^(license|license_name|license_link):[ \t]*['\"]?([^'\"\n#]+)", re.MULTILINE)


def card_of(folder: Path, config: Mapping[str, Any]) -> ModelCard:
    """Reads the card of a model's folder; facts that it does not give are empty."""
    facts = _facts(folder)
    licence = facts.get("license", "")
    if licence in ("", "other"):  # Then the card gives a name of its own.
        licence = facts.get("license_name", licence)
    text = config.get("text_config")
    dtype = config.get("dtype") or config.get("torch_dtype")
    if not dtype and isinstance(text, Mapping):
        dtype = text.get("dtype") or text.get("torch_dtype")
    return ModelCard(
        license=licence,
        license_link=facts.get("license_link", ""),
        dtype=clean_text(dtype.removeprefix("torch."), _MAX_TEXT) if isinstance(dtype, str) else "",
    )


def _facts(folder: Path) -> dict[str, str]:
    try:
        found = json.loads(_head(folder / CARD_FILE))
        return {name: clean_text(str(found[name]), _MAX_TEXT) for name in CARD_FIELDS if found.get(name)}
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    try:
        readme = _head(folder / _README)
    except OSError:
        return {}
    if not readme.startswith("---"):
        return {}
    block = readme[3:].partition("\n---")[0]
    return {name: clean_text(value.strip(), _MAX_TEXT) for name, value in _LINE.findall(block)}


def _head(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MAX_BYTES).decode(errors="replace")
