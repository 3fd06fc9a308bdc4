"""The files of a commit that are fetched. Names in the hub's answer are checked before they become paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import HfApi

from headrace_models.folder import CONFIG
from headrace_registry.hub.choice import choose, index_to_read
from headrace_registry.hub.events import Job
from headrace_registry.hub.faults import Nonsense, Unusable
from headrace_registry.inputs import unsafe_name
from headrace_registry.models.cards import CARD_FIELDS

_API_TIMEOUT_S = 30.0
_MAX_FILES = 10_000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file of a commit. An empty digest or a size of None: the hub does not name it."""

    name: str
    size: int | None
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The chosen files of a commit; `pickled` if its weights need conversion, `card` what its card says of it."""

    commit_sha: str
    files: tuple[RemoteFile, ...]
    pickled: bool = False
    card: Mapping[str, str] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files; a file of unknown size counts as 0."""
        return sum(file.size or 0 for file in self.files)


def resolve(api: HfApi, job: Job) -> str:
    """Returns the present commit of a revision."""
    info = api.model_info(job.repo_id, revision=job.revision, timeout=_API_TIMEOUT_S)
    return _commit(info.sha, job)


# Reads a file of a commit that holds a JSON object.
ReadObject = Callable[[RemoteFile, str], Mapping[str, Any]]


def list_files(api: HfApi, job: Job, read_object: ReadObject) -> Listing:
    """Reads the listing of a revision, its config and its index. Raises Unusable, NotPermitted, or the hub's errors.

    `read_object` gets a file and the commit.
    """
    info = api.model_info(job.repo_id, revision=job.revision, files_metadata=True, timeout=_API_TIMEOUT_S)
    commit_sha = _commit(info.sha, job)
    # Nothing below a folder is fetched, and nothing with another name than a string has one.
    top = {
        name: sibling
        for sibling in info.siblings or ()
        if isinstance(name := getattr(sibling, "rfilename", None), str) and "/" not in name
    }
    if len(top) > _MAX_FILES:
        raise Unusable(f"{job.repo_id} lists more than {_MAX_FILES} files; give a repo of one model")
    config = read_object(_remote_file(top[CONFIG], job), commit_sha) if CONFIG in top else {}
    index_name = index_to_read(top.keys(), config)
    index = read_object(_remote_file(top[index_name], job), commit_sha) if index_name else {}
    choice = choose(job.repo_id, top.keys(), config, index, allow_pickle=job.allow_pickle, with_code=job.with_code)
    if CONFIG not in top:  # Told last: repos of GGUF files have none, and their remedy is another.
        raise Unusable(f"{job.repo_id} has no {CONFIG}; give a repo in transformers' layout")
    files = tuple(_remote_file(top[name], job) for name in choice.names)
    said = {name: getattr(info.card_data, name, None) for name in CARD_FIELDS}
    card = {name: value for name, value in said.items() if isinstance(value, str)}
    return Listing(commit_sha=commit_sha, files=files, pickled=choice.pickled, card=card)


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
