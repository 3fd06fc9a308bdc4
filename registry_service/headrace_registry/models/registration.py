"""The commit of a registration: a branch is resolved once, at registration if the hub answers, else at preparation."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Protocol

from headrace_registry.models.models import NewModel, SourceKind

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Commits(Protocol):
    """Resolves revisions to commits."""

    async def resolve(self, repo_id: str, revision: str, *, token: str = "") -> str:
        """Returns the commit; empty if the hub does not answer within a few seconds."""
        ...


async def with_commit(new: NewModel, commits: Commits, *, token: str = "") -> NewModel:
    """Returns the registration with its commit; a commit left empty is resolved by the preparation."""
    source = new.source
    if source.kind is not SourceKind.HUB:
        return new
    if _COMMIT.fullmatch(source.revision):
        return replace(new, commit_sha=source.revision)
    return replace(new, commit_sha=await commits.resolve(source.location, source.revision, token=token))
