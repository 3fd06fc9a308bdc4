"""The operator's allowances: repos with pickled weights to read, and repos with code to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace_models.load_options import trusts_remote_code
from headrace_registry.errors import NotAllowed
from headrace_registry.models.models import Source, SourceKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowances:
    """Repo ids of both kinds; they must match exactly."""

    pickle_repos: frozenset[str] = frozenset()
    code_repos: frozenset[str] = frozenset()

    def pickle(self, source: Source) -> bool:
        """True if the repo's pickled weights may be read."""
        return source.kind is SourceKind.HUB and source.location in self.pickle_repos

    def code(self, source: Source) -> bool:
        """True if the repo's code may run."""
        return source.kind is SourceKind.HUB and source.location in self.code_repos

    def check(self, source: Source, load_options: Mapping[str, Any]) -> None:
        """Raises NotAllowed if the options let code run from a repo that the operator has not allowed."""
        if trusts_remote_code(load_options) and not self.code(source):
            raise NotAllowed(
                f"trust_remote_code lets code of {source.location} run on the nodes; leave it out, or start the "
                f"registry with --trust-remote-code {source.location}",
                metadata={"repo": source.location},
                field="load_options",
            )


NOTHING_ALLOWED = Allowances()
