"""The chat template of a model, from the files of its tokenizer. `corpora.chat` renders it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace_chassis.confined.limits import Limits
from headrace_chassis.confined.ports import Confinement
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.errors import FieldInvalid, ModelUnsupported
from headrace_models.errors import JsonInvalid
from headrace_models.json_files import read_object

MAX_TEMPLATE_BYTES = 1024 * 1024
_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
# Older models keep their template in one of these files; transformers looks in this order.
_JSON_FILES = ("chat_template.json", _CONFIG)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template in Jinja's language, and the texts of the special tokens that it may name."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the template, hex."""
        return hashlib.sha256(self.source.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def load(cls, files_path: Path | str) -> ChatTemplate:
        """Reads the template from a model's folder; raises ModelUnsupported if the folder has none."""
        folder = Path(files_path)
        source = _source(folder)
        if len(source.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
            raise ModelUnsupported(f"The chat template in {folder} is larger than {MAX_TEMPLATE_BYTES} bytes.")
        files = [_read_json(folder / name) for name in (_CONFIG, _SPECIAL_TOKENS)]
        special_tokens = {}
        for name in _NAMED:
            # The first file that has the name decides, even if it says null.
            value = next((file[name] for file in files if name in file), None)
            value = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(value, str):
                special_tokens[name] = value
        return cls(source, special_tokens)


async def template_digest(files_path: str, confinement: Confinement) -> str:
    """Returns the digest of the template in a model's folder, whose files are parsed under confinement."""
    digest: str = await confinement.call(
        digest_in,
        {"files_path": files_path},
        refuse=_unreadable,
        limits=Limits(memory_bytes=512 * 1024 * 1024, cpu_s=5),
    )
    return digest


def digest_in(files_path: str) -> str:
    """Returns the digest of the template in a model's folder."""
    return ChatTemplate.load(files_path).digest


def _unreadable(why: str) -> ModelUnsupported:
    return ModelUnsupported(f"The chat template's files {why}; take them from the model's own repo.")


def check_chat(recipe: Recipe, *, corpus_id: str, is_chat: bool) -> None:
    """Raises FieldInvalid unless the recipe asks for a template exactly when the corpus holds conversations."""
    field_name = "spec.recipe.chat_template"
    if recipe.chat_template and not is_chat:
        raise FieldInvalid(
            f"{field_name} is set and corpus {corpus_id} holds no conversations; leave it out, or register the corpus"
            " with `chat` set and lists of messages in its text column.",
            field=field_name,
        )
    if is_chat and not recipe.chat_template:
        raise FieldInvalid(
            f"Corpus {corpus_id} holds conversations, which only a chat template turns into tokens; set {field_name}.",
            field=field_name,
        )


def _source(folder: Path) -> str:
    try:
        with (folder / _TEMPLATE_FILE).open(encoding="utf-8") as file:
            return file.read(MAX_TEMPLATE_BYTES + 1)
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as exc:
        raise ModelUnsupported(f"{folder / _TEMPLATE_FILE} can't be read: {exc}.") from exc
    for name in _JSON_FILES:
        found = _read_json(folder / name).get("chat_template")
        if isinstance(found, list):  # Several templates, each with a name.
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, Mapping)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    raise ModelUnsupported(
        "The model's tokenizer has no chat template; take the model's variant that was trained on conversations, or a"
        " corpus of text."
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except JsonInvalid as exc:
        if exc.problem.endswith("no JSON object"):
            return {}
        raise ModelUnsupported(f"{path} {exc.problem}.") from exc
