"""Protobuf's enum values as members of the client's enums."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol, TypeVar

from headrace_client.errors import InvalidArgument

_E = TypeVar("_E", bound=StrEnum)


class _EnumNames(Protocol):
    def Name(self, number: Any) -> str: ...  # noqa: N802 - protobuf's spelling.


def name_of(enum: _EnumNames, number: int) -> str:
    """The name of an enum value, with its type's prefix; empty for a number that this client does not know."""
    try:
        return enum.Name(number)
    except ValueError:
        return ""


def state_of(enum: _EnumNames, prefix: str, number: int, kind: type[_E]) -> _E:
    """The member of `kind` with the name as value; UNKNOWN for a number that this client does not know."""
    name = name_of(enum, number).removeprefix(prefix)
    return kind(name) if name in kind.__members__ else kind("UNKNOWN")


def choice_of(enum: _EnumNames, prefix: str, number: int, kind: type[_E], default: _E) -> _E:
    """The member of `kind` of the same name; `default` for a number that this client does not know."""
    name = name_of(enum, number).removeprefix(prefix)
    return kind[name] if name in kind.__members__ else default


def value_of(enum: Any, prefix: str, name: str, field: str) -> Any:
    """The number of an enum value; unspecified for an empty name."""
    if not name:
        return 0
    known = [key.removeprefix(prefix).lower() for key, number in enum.items() if number]
    if name.lower() not in known:
        raise InvalidArgument(f"{field} is one of {', '.join(known)}, not {name!r}", fields={field: name})
    return enum.Value(prefix + name.upper())
