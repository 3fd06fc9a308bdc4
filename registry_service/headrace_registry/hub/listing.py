"""The files of a commit, and the choice among them. Names in the hub's answer are checked before they become paths."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

from huggingface_hub import HfApi

from headrace_registry.hub.events import Job
from headrace_registry.hub.faults import Nonsense, NotPermitted, Unusable
from headrace_registry.inputs import unsafe_name

_API_TIMEOUT_S = 30.0
_MAX_FILES = 10_000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Fetched beside the weights; the network's code only if an operator trusts the repo.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_CODE = ("*.py",)
_SHARDS = "model-*-of-*.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file of a commit. An empty digest or a size of None: the hub does not name it."""

    name: str
    size: int | None
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The chosen files of a commit; `pickled` if its weights need conversion."""

    commit_sha: str
    files: tuple[RemoteFile, ...]
    pickled: bool = False

    @property
    def total_bytes(self) -> int:
        """Bytes of all files; a file of unknown size counts as 0."""
        return sum(file.size or 0 for file in self.files)


def resolve(api: HfApi, job: Job) -> str:
    """Returns the present commit of a revision."""
    info = api.model_info(job.repo_id, revision=job.revision, timeout=_API_TIMEOUT_S)
    return _commit(info.sha, job)


def list_files(api: HfApi, job: Job) -> Listing:
    """Reads the listing of a revision. Raises Unusable, NotPermitted, Nonsense or the hub's errors."""
    info = api.model_info(job.repo_id, revision=job.revision, files_metadata=True, timeout=_API_TIMEOUT_S)
    commit_sha = _commit(info.sha, job)
    siblings = info.siblings or []
    if len(siblings) > _MAX_FILES:
        raise Unusable(f"{job.repo_id} lists more than {_MAX_FILES} files; give a repo of one model")
    top = {file.name: file for file in (_remote_file(each, job) for each in siblings) if "/" not in file.name}
    weights = chosen_weights(top)
    pickled = not weights
    if pickled:
        weights = sorted(name for name in top if any(fnmatch(name, pattern) for pattern in _PICKLES))
        if not weights:
            raise Unusable(
                f"{job.repo_id} has no safetensors weights; convert it with save_pretrained() and register the folder"
            )
        if not job.allow_pickle:
            raise NotPermitted(
                f"{job.repo_id} has only pickled weights, which can run code; convert it with save_pretrained() and "
                f"register the folder, or start the registry with --allow-pickle {job.repo_id}"
            )
        if "pytorch_model.bin" in weights:
            weights = ["pytorch_model.bin"]
    patterns = _COMPANIONS + (_CODE if job.with_code else ())
    names = [name for name in top if any(fnmatch(name, pattern) for pattern in patterns)] + weights
    return Listing(commit_sha=commit_sha, files=tuple(top[name] for name in sorted(names)), pickled=pickled)


def chosen_weights(names: Iterable[str]) -> list[str]:
    """Picks one copy of the weights: repos often keep two, and a folder with both would count double."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if "model.safetensors" in found:
        return ["model.safetensors"]
    return [name for name in found if fnmatch(name, _SHARDS)] or found


def _remote_file(sibling: object, job: Job) -> RemoteFile:
    name = getattr(sibling, "rfilename", "")
    problem = unsafe_name(name)
    if problem:
        raise Unusable(f"{job.repo_id} lists a file whose name {problem}: {str(name)[:80]!r}; use another repo")
    lfs, size = getattr(sibling, "lfs", None), getattr(sibling, "size", None)
    sha256 = str(getattr(lfs, "sha256", "") or "")
    blob_id = str(getattr(sibling, "blob_id", "") or "")
    return RemoteFile(
        name=name,
        size=size if isinstance(size, int) and size >= 0 else None,
        sha256=sha256 if _SHA256.fullmatch(sha256) else "",
        git_sha1=blob_id if lfs is None and _COMMIT.fullmatch(blob_id) else "",
    )


def _commit(sha: object, job: Job) -> str:
    if not isinstance(sha, str) or not _COMMIT.fullmatch(sha):
        raise Nonsense(f"the hub names no commit for {job.repo_id}@{job.revision}; check HF_ENDPOINT")
    if _COMMIT.fullmatch(job.revision) and sha != job.revision:
        raise Nonsense(f"the hub answers with commit {sha} for {job.revision}; check HF_ENDPOINT")
    return sha
