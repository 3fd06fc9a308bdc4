"""Ids of sets as people type them: the beginning will do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_client import HeadraceClient


def whole_id(client: HeadraceClient, beginning: str) -> str:
    """The id of the one set that begins so; else what was given, for the registry to judge."""
    found = {one.id for one in client.sets.list() if one.id.startswith(beginning)}
    return found.pop() if len(found) == 1 else beginning
