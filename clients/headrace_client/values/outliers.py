"""A limit for the norm of rows: some tokens have a hundred times the norm of other tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from headrace_client.errors import FailedPrecondition, InvalidArgument
from headrace_client.values.streams import PROVENANCE_COLUMNS, StreamHeader


@dataclass(frozen=True, slots=True, kw_only=True)
class NormLimit:
    """Leaves out rows with a Euclidean norm above a limit in any of `columns` (by default, all hookpoints read).

    The limit of a column is `absolute`, or `multiple` times its mean norm so far; the lower one, if both are given.
    A row is left out of all columns. The limit of a multiple is fixed when reading begins, and kept in its state.
    """

    multiple: float | None = None
    absolute: float | None = None
    columns: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.multiple is None and self.absolute is None:
            raise InvalidArgument("a norm limit needs `multiple` or `absolute`", fields={"norm_limit": "empty"})
        for name in ("multiple", "absolute"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InvalidArgument(f"{name} is a positive number, not {value}", fields={name: str(value)})

    def of(self, header: StreamHeader, columns: tuple[str, ...]) -> dict[str, float]:
        """The limit of each column, by the statistics in a stream's header. FailedPrecondition if it has none."""
        chosen = self.columns or tuple(name for name in columns if name not in PROVENANCE_COLUMNS)
        if missing := [name for name in chosen if name not in columns or name in PROVENANCE_COLUMNS]:
            raise InvalidArgument(
                f"the norm limit names {', '.join(missing)}, which is no hookpoint of this stream",
                fields={"norm_limit": ", ".join(missing)},
            )
        mean_norms = {one.name: one.mean_norm for one in header.statistics if one.count}
        return {name: self._limit(name, mean_norms) for name in chosen}

    def _limit(self, name: str, mean_norms: Mapping[str, float]) -> float:
        if self.multiple is None:
            assert self.absolute is not None, "checked when made"
            return self.absolute
        if name not in mean_norms:
            raise FailedPrecondition(
                f"the mean norm of {name} is not known, so there is no multiple of it",
                reason="STATISTICS_MISSING",
                remedy="take an absolute limit, or read once the set has statistics",
            )
        return min(self.multiple * mean_norms[name], math.inf if self.absolute is None else self.absolute)
