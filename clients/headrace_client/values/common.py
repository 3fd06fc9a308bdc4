"""Parts of several values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from headrace_client.errors import InvalidArgument

_E = TypeVar("_E", bound=StrEnum)


class Dtype(StrEnum):
    """Element type of a column."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT32 = "int32"
    FLOAT8_E4M3 = "float8_e4m3"
    INT8 = "int8"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}.get(self.value, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Progress of work that moves bytes. None where the server does not know."""

    done_bytes: int
    total_bytes: int | None
    percent: float | None
    rate_bytes_per_s: float | None
    eta_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The reason for which long work failed."""

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)


def choice(kind: type[_E], value: str, name: str, *, but: Sequence[_E] = ()) -> _E:
    """Returns `value` as a member of `kind`, `but` for some, or raises InvalidArgument that lists the members."""
    try:
        if (found := kind(value)) not in but:
            return found
    except ValueError:
        pass
    known = ", ".join(member.value for member in kind if member not in but)
    raise InvalidArgument(f"{name} is one of {known}, not {str(value)!r}", fields={name: known})
