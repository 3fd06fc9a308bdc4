"""What a registration finds out: the commit of a branch, and whether the model can be loaded by its config.

A branch is resolved once, at registration if the hub answers, else at preparation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from headrace_chassis.confined.ports import Confinement
from headrace_models.errors import JsonInvalid
from headrace_models.json_files import read_config
from headrace_models.unsupported import problem_of
from headrace_registry.errors import ModelUnsupported
from headrace_registry.models.files import PARSE_LIMITS, architecture_from, unreadable
from headrace_registry.models.models import NewModel, Source, SourceKind

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """A commit, and why its model can't be loaded; either is empty if the hub does not tell within a few seconds."""

    commit_sha: str = ""
    problem: str = ""


class Commits(Protocol):
    """Resolves revisions to commits."""

    async def resolve(self, repo_id: str, revision: str, *, token: str = "") -> Resolution:
        """Asks the hub. Never raises the hub's errors."""
        ...


async def check_folder(source: Source, confinement: Confinement) -> None:
    """Raises ModelUnsupported for a folder whose config says that it can't be loaded, or is beyond our bounds."""
    if source.kind is not SourceKind.FOLDER:
        return
    folder = source.location
    problem = await confinement.call(
        problem_in, {"folder": folder}, refuse=unreadable(Path(folder).name), limits=PARSE_LIMITS
    )
    if problem:
        raise ModelUnsupported(f"the model in {folder} can't be loaded: {problem}")


def problem_in(folder: str) -> str:
    """Returns why the model in a folder can't be loaded; empty if its config does not tell."""
    try:
        config = read_config(Path(folder))
    except (OSError, JsonInvalid):  # The preparation tells.
        return ""
    architecture_from(config)
    return problem_of(config)


async def with_commit(new: NewModel, commits: Commits, *, token: str = "") -> NewModel:
    """Returns the registration with its commit; a commit left empty is resolved by the preparation.

    Raises ModelUnsupported if the repo's config says that it can't be loaded.
    """
    source = new.source
    if source.kind is not SourceKind.HUB:
        return new
    if _COMMIT.fullmatch(source.revision):
        return replace(new, commit_sha=source.revision)
    found = await commits.resolve(source.location, source.revision, token=token)
    if found.problem:
        raise ModelUnsupported(f"{source.location} can't be loaded: {found.problem}")
    return replace(new, commit_sha=found.commit_sha)
