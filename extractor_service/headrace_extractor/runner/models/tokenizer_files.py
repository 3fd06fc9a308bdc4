"""Makes the tokenizer.json of a model that has its tokenizer in an older form, beside links to its other files."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from headrace_extractor.corpora.tokenizer import library_errors
from headrace_extractor.errors import ModelUnsupported
from headrace_extractor.runner.models.new_folder import new_folder
from headrace_models.folder import TOKENIZER, files_read

logger = logging.getLogger(__name__)

# Files of transformers that name special tokens and templates; where the model has them, its own stay.
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def convert_tokenizer(source_path: Path, target_path: Path) -> None:
    """Makes a folder of links to a model's files, with a tokenizer.json of its own; an existing folder stays.

    Raises ModelUnsupported with the reason, and DiskFull.
    """
    if target_path.exists():
        return
    with new_folder(target_path) as folder:
        folder.mkdir()
        for path in files_read(source_path):
            (folder / path.name).symlink_to(path)
        add_tokenizer(source_path, folder)


def try_to_add(source_path: Path, folder: Path) -> None:
    """Writes the tokenizer if it can be made; without it, the model takes token ids alone."""
    try:
        add_tokenizer(source_path, folder)
    except ModelUnsupported as exc:
        logger.warning("%s: %s", source_path, exc.message)


def add_tokenizer(source_path: Path, folder: Path) -> None:
    """Writes the tokenizer of the model in `source_path` into a folder, as transformers reads it.

    Raises ModelUnsupported with the reason.
    """
    with library_errors(ModelUnsupported, "The tokenizer can't be converted"):
        tokenizer = AutoTokenizer.from_pretrained(source_path, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ModelUnsupported(f"The tokenizer can't be converted: {kind} has no form that {TOKENIZER} can hold.")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        tokenizer.save_pretrained(scratch)
        for name in (TOKENIZER, *_BESIDE):
            made = Path(scratch, name)
            if made.is_file() and not (folder / name).exists():
                shutil.copyfile(made, folder / name)
