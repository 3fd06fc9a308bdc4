"""The parts of a GGUF file that was split, by the names that llama.cpp gives them."""

from __future__ import annotations

import re
from pathlib import Path

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# The largest published models have some fifty parts.
MAX_PARTS = 1000


def parts_of(path: Path) -> tuple[Path, ...]:
    """Returns all parts of the file that `path` is the first part of, in order, whether they exist or not.

    A file by itself is its only part. Raises ValueError, naming the first part, for a part that is not the first, and
    for a number of parts that no file has.
    """
    match = _PART.fullmatch(path.name)
    if match is None or match["count"] == "00001":
        return (path,)
    count = int(match["count"])
    if not 0 < count <= MAX_PARTS:
        raise ValueError(f"{path.name} says that it is one of {count} parts, and no file has so many")
    parts = tuple(path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))
    if parts[0].name != path.name:
        raise ValueError(f"{path.name} is not the first part of its file; give {parts[0].name}")
    return parts
