"""Which commit a registration stands for: a branch is resolved once, when the hub can be reached."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Protocol

from headrace_registry.models.models import NewModel, SourceKind

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Commits(Protocol):
    """Knows what revisions are now."""

    async def resolve(self, repo_id: str, revision: str, *, token: str = "") -> str:
        """Returns the commit, or nothing if that can't be told soon."""
        ...


async def with_commit(new: NewModel, commits: Commits, *, token: str = "") -> NewModel:
    """Returns the registration with its commit; without one it is resolved when it is prepared."""
    source = new.source
    if source.kind is not SourceKind.HUB:
        return new
    if _COMMIT.fullmatch(source.revision):
        return replace(new, commit_sha=source.revision)
    return replace(new, commit_sha=await commits.resolve(source.location, source.revision, token=token))
