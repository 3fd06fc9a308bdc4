"""Checks hub repo ids, and proposes ids for models that are registered without one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from headrace_registry.errors import FieldInvalid
from headrace_registry.models.models import NewModel, Source, SourceKind

_REPO_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")


def checked_repo(repo_id: str, revision: str) -> Source:
    """Returns a hub repo as a source; an empty revision means `main`. Raises FieldInvalid."""
    parts = repo_id.split("/")
    if len(parts) > 2 or not all(_REPO_PART.fullmatch(part) and ".." not in part for part in parts):
        raise FieldInvalid("model.source.hub.repo_id", f"{repo_id[:120]!r} is no repo; write it as `owner/name`")
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise FieldInvalid("model.source.hub.revision", f"{revision[:120]!r} is no branch, tag or commit")
    return Source(kind=SourceKind.HUB, location=repo_id, revision=revision or "main")


def derived_ids(new: NewModel) -> Iterator[str]:
    """Proposes ids for a model without one, the best first; the last is unique to the model's identity."""
    parts = [part for part in new.source.location.split("/") if part]
    name = parts[-1].removesuffix(".gguf") if parts else ""
    yield _slug(name)
    if new.source.kind is SourceKind.HUB and len(parts) == 2:
        yield _slug(f"{parts[0]}-{name}")
    digest = hashlib.sha256(new.identity().encode()).hexdigest()[:10]
    yield f"{_slug(name)[:52].rstrip('-')}-{digest}"


def _slug(text: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not slug or not slug[0].isalpha():
        slug = f"m-{slug}".rstrip("-")
    return slug[:63].rstrip("-")
