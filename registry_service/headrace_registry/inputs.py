"""Checks of strings from outside: ids, labels, texts, names of files."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping

from headrace_registry.errors import FieldInvalid

_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL_KEY = re.compile(r"[a-z0-9_.-]{1,63}")
_MAX_LABELS = 64
_MAX_TEXT = 255
# The limits of usual file systems, in bytes.
_MAX_PART_BYTES = 255
_MAX_NAME_BYTES = 1024
# Names that some systems keep for devices, whatever follows the first dot.
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}


def checked_id(value: str, *, field: str) -> str:
    """Checks an id: a slug in lower case that starts with a letter, at most 63 characters."""
    if not _ID.fullmatch(value):
        raise FieldInvalid(
            field,
            f"{value[:80]!r} is no id; use lower-case letters, digits and '-', begin with a letter, at most 63 in all",
        )
    return value


def checked_request_id(value: str) -> str:
    """Checks a request id, empty or a UUID4 in canonical spelling; returns it in lower case."""
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
    """Checks labels: at most 64, keys and values short."""
    if len(labels) > _MAX_LABELS:
        raise FieldInvalid("labels", f"{len(labels)} labels; at most {_MAX_LABELS} are kept")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise FieldInvalid("labels", f"key {key[:80]!r} must match [a-z0-9_.-]{{1,63}}")
        if len(value) > _MAX_TEXT or "\x00" in value:
            raise FieldInvalid("labels", f"value of {key!r} must be at most {_MAX_TEXT} characters without NUL")
    return dict(labels)


def checked_text(value: str, *, field: str, max_length: int = _MAX_TEXT) -> str:
    """Checks free text: bounded, and without NUL, which Postgres can't store."""
    if len(value) > max_length or "\x00" in value:
        raise FieldInvalid(field, f"must be at most {max_length} characters without NUL")
    return value


def unsafe_name(name: object) -> str:
    """Says why a relative, `/`-separated name can't be used, such as `is empty`; an empty string if it can."""
    if not isinstance(name, str) or not name:
        return "is empty"
    if not name.isprintable() or "\\" in name:
        return "holds a backslash or what can't be printed"
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return "is no text"
    if len(encoded) > _MAX_NAME_BYTES:
        return "is too long"
    return next((problem for problem in map(_unsafe_part, name.split("/")) if problem), "")


def checked_owner(owner: str, *, field: str) -> str:
    """Checks the owner of a pin: pins need one, so that people know whom to ask about them."""
    if not owner.strip():
        raise FieldInvalid(field, "is empty; say whose wish it is, so that people know whom to ask")
    return checked_text(owner, field=field)


def _unsafe_part(part: str) -> str:
    if part in ("", ".", ".."):
        return "leads out of its folder"
    # While a file is fetched its name is `.NAME.part`.
    if len(part.encode()) > _MAX_PART_BYTES - len("..part"):
        return "is too long"
    if ":" in part or part.split(".", maxsplit=1)[0].lower().strip() in _RESERVED:
        return "is reserved"
    return ""


def clean_text(text: str, max_length: int) -> str:
    """Cuts a text to `max_length`, without NUL and half surrogate pairs, which Postgres can't store."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()[:max_length]
