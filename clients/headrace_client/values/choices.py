"""Plain strings as members of an enum."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from headrace_client.errors import InvalidArgument

_E = TypeVar("_E", bound=StrEnum)


def choice(kind: type[_E], value: str, name: str) -> _E:
    """Returns `value` as a member of `kind`, or raises InvalidArgument that lists the members."""
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise InvalidArgument(f"{name} is one of {known}, not {value!r}", fields={name: known}) from None
