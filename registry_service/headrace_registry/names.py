"""Names from outside that become a part of a path: checked here, before they do."""

from __future__ import annotations

_MAX_PART_BYTES = 255
_MAX_NAME_BYTES = 1024
# Names that some systems keep for devices, whatever follows the first dot.
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}


def unsafe_name(name: object) -> str:
    """Says what keeps a relative, `/`-separated name from being used, as a predicate; empty when it is safe."""
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


def _unsafe_part(part: str) -> str:
    if part in ("", ".", ".."):
        return "leads out of its folder"
    if len(part.encode()) > _MAX_PART_BYTES - len("..part"):
        return "is too long"
    if ":" in part or part.split(".", maxsplit=1)[0].lower().strip() in _RESERVED:
        return "is reserved"
    return ""
