"""Sizes, durations, counts and times as people write them, and values as JSON."""

from __future__ import annotations

import dataclasses
import re
from datetime import datetime
from enum import Enum
from typing import Any

import typer

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?\s*$", re.IGNORECASE)
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([smhd])\s*$", re.IGNORECASE)


def size(n_bytes: float) -> str:
    """Bytes: `512 B`, `25.2 MiB`."""
    value = float(n_bytes)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("the last unit returns")


def things(n: int, noun: str) -> str:
    """`1 model`, `2 models`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def parse_size(text: str) -> int:
    """Reads `1048576`, `256MiB`, `1.5g` (powers of 1024) or `200MB` (of 1000). ValueError otherwise."""
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size: write 1048576, 256MiB or 200MB")
    number, prefix, binary = match.groups()
    base = 1000 if prefix and not binary and text.strip().lower().endswith("b") else 1024
    return int(float(number) * base ** " kmgtp".index(prefix.lower() or " "))


def duration(seconds: float) -> str:
    """Seconds: `0:42`, `1:02:03`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def seconds(value: float | None) -> str:
    """Seconds to one decimal: `12.3 s`; empty for None."""
    return "" if value is None else f"{value:.1f} s"


def parse_duration(text: str) -> float:
    """Reads `90s`, `15m`, `1.5h` or `7d`; returns seconds. ValueError otherwise."""
    match = _DURATION.match(text)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a duration: write 90s, 15m, 8h or 7d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2].lower()]


def count(number: float) -> str:
    """A count: `12,345`."""
    return f"{number:,.0f}"


def short_count(number: float) -> str:
    """A count in three digits: `912`, `124M`, `1.56B`."""
    rounded = float(f"{number:.3g}")
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if rounded >= size:
            return f"{rounded / size:.3g}{unit}"
    return f"{rounded:.0f}"


def local_time(when: datetime | None) -> str:
    """Date and time in the local time zone; empty for None."""
    return when.astimezone().strftime("%Y-%m-%d %H:%M:%S") if when else ""


def ago(when: datetime | None, now: datetime) -> str:
    """The time since then in its largest unit: `42 s ago`, `3 h ago`, `12 d ago`; empty for None."""
    if when is None:
        return ""
    seconds = max((now - when).total_seconds(), 0.0)
    unit, length = next((u, n) for u, n in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)) if seconds >= n or n == 1)
    return f"{int(seconds / length)} {unit} ago"


def bytes_of(option: str, text: str) -> int:
    """Reads the size that an option was given; a wrong one is a wrong use of the command."""
    try:
        return parse_size(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint=option) from None


def plain(value: Any) -> Any:
    """A value in the types of JSON: dataclasses as objects, times as ISO 8601, enums as their values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Retentions differ only in their class: without its name, RETAIN would be an empty object.
        kind = {"kind": type(value).__name__.lower()} if type(value).__name__ in ("Retain", "Window") else {}
        return kind | {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
