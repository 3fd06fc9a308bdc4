"""The files of a repo that are fetched, chosen by its listing, its config and the index of its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from headrace_models.errors import WeightsAbsent
from headrace_models.folder import index_name, weight_names
from headrace_models.unsupported import problem_of
from headrace_registry.hub.faults import NotPermitted, Unusable
from headrace_registry.inputs import unsafe_name

# Fetched beside the weights; the network's code only if an operator trusts the repo.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_CODE = ("*.py",)
# JSON that no load reads: it may be large, and another index would name files that are not fetched.
_NOT_READ = ("*.index.json", "*.index.*.json", "trainer_state.json", "adapter_config.json")
_PICKLE, _PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Names of files to fetch; `pickled` if the weights need conversion."""

    names: tuple[str, ...]
    pickled: bool = False


def index_to_read(names: Collection[str], config: Mapping[str, Any]) -> str | None:
    """Returns the index by which `choose` will find the weights, None if it needs none."""
    try:
        return index_name(names, config)
    except WeightsAbsent:
        return _PICKLE_INDEX if _PICKLE not in names and _PICKLE_INDEX in names else None


def choose(
    repo_id: str,
    names: Collection[str],
    config: Mapping[str, Any],
    index: Mapping[str, Any],
    *,
    allow_pickle: bool = False,
    with_code: bool = False,
) -> Choice:
    """Chooses among the names at the top of a repo; one copy of the weights, since repos often keep two.

    `index` is the content of `index_to_read`. Raises Unusable with the reason, and NotPermitted for pickled weights.
    """
    if problem := problem_of(config):
        raise Unusable(f"{repo_id} can't be loaded: {problem}")
    pickled = False
    try:
        weights: Collection[str] = weight_names(names, config, index)
    except WeightsAbsent as exc:
        weights = _pickles(repo_id, names, index)
        if not weights:
            raise Unusable(f"{repo_id} lacks {exc.problem}; {_remedy(names, exc)}") from exc
        if not allow_pickle:
            raise NotPermitted(
                f"{repo_id} has only pickled weights, which can run code; convert it with save_pretrained() and "
                f"register the folder, or start the registry with --allow-pickle {repo_id}"
            ) from exc
        pickled = True
    patterns = _COMPANIONS + (_CODE if with_code else ())
    # No load reads a file with a name that can't be a file's here.
    beside = {
        name
        for name in names
        if _matches(name, patterns) and not _matches(name, _NOT_READ) and "/" not in name and not unsafe_name(name)
    }
    used = index_to_read(names, config)
    return Choice(names=tuple(sorted({*weights, *beside, *([used] if used else [])})), pickled=pickled)


def _pickles(repo_id: str, names: Collection[str], index: Mapping[str, Any]) -> Collection[str]:
    """Returns the pickled weights: the single file, else all that their index names; none without either."""
    if _PICKLE in names:
        return (_PICKLE,)
    if _PICKLE_INDEX not in names:
        return ()
    table = index.get("weight_map")
    found = {str(name) for name in table.values()} if isinstance(table, Mapping) else set()
    if absent := sorted(found - set(names)):
        raise Unusable(f"{repo_id} lacks {absent[0][:80]}, which {_PICKLE_INDEX} names; use another revision")
    return {name for name in found if fnmatch(name, "pytorch_model*.bin")}


def _remedy(names: Collection[str], exc: WeightsAbsent) -> str:
    if exc.others and "adapter_model.safetensors" in exc.others:
        return "it holds an adapter: merge it into its base model, and register the folder of the merged model"
    if exc.others:
        return f"transformers does not load {exc.others[0][:80]}; use a repo in its layout"
    if any(name.endswith(".gguf") for name in names):
        return "it holds GGUF files: fetch one of them, and register that file"
    if "adapter_config.json" in names:
        return "it holds an adapter: merge it into its base model, and register the folder of the merged model"
    return "convert it with save_pretrained() and register the folder"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
