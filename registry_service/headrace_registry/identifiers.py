"""Ids, labels and other short strings that come from outside: checked here, once."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator, Mapping

from headrace_registry.errors import FieldInvalid
from headrace_registry.models import NewModel, Source, SourceKind

_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL_KEY = re.compile(r"[a-z0-9_.-]{1,63}")
_REPO_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")
_MAX_LABELS = 64
_MAX_TEXT = 255


def checked_id(value: str, *, field: str) -> str:
    """A slug: lower case, starts with a letter, at most 63 characters."""
    if not _ID.fullmatch(value):
        raise FieldInvalid(
            field,
            f"{value[:80]!r} is no id; use lower-case letters, digits and '-', begin with a letter, at most 63 in all",
        )
    return value


def checked_request_id(value: str) -> str:
    """Empty, or a UUID4 in canonical spelling."""
    if not value:
        return ""
    try:
        parsed = uuid.UUID(value)
    except ValueError:
        parsed = None
    if parsed is None or parsed.version != 4 or str(parsed) != value.lower():
        raise FieldInvalid("request_id", f"{value[:80]!r} is no UUID4; send a fresh UUID4 per intended change, or none")
    return value.lower()


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """At most 64 short labels."""
    if len(labels) > _MAX_LABELS:
        raise FieldInvalid("labels", f"{len(labels)} labels; at most {_MAX_LABELS} are kept")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise FieldInvalid("labels", f"key {key[:80]!r} must match [a-z0-9_.-]{{1,63}}")
        if len(value) > _MAX_TEXT or "\x00" in value:
            raise FieldInvalid("labels", f"value of {key!r} must be at most {_MAX_TEXT} characters without NUL")
    return dict(labels)


def checked_text(value: str, *, field: str, max_length: int = _MAX_TEXT) -> str:
    """Free text for people, bounded; NUL can't be stored."""
    if len(value) > max_length or "\x00" in value:
        raise FieldInvalid(field, f"must be at most {max_length} characters without NUL")
    return value


def checked_repo(repo_id: str, revision: str) -> Source:
    """A hub repo; an empty revision means `main`."""
    parts = repo_id.split("/")
    if len(parts) > 2 or not all(_REPO_PART.fullmatch(part) and ".." not in part for part in parts):
        raise FieldInvalid("model.source.hub.repo_id", f"{repo_id[:120]!r} is no repo; write it as `owner/name`")
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise FieldInvalid("model.source.hub.revision", f"{revision[:120]!r} is no branch, tag or commit")
    return Source(kind=SourceKind.HUB, location=repo_id, revision=revision or "main")


def derived_ids(new: NewModel) -> Iterator[str]:
    """Proposes ids for a model without one, best first; the last one is unique to the identity."""
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
