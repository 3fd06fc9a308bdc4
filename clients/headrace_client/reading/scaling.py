"""Factors by which trainers scale activations, from the statistics in a stream's header: no batch is drawn for them.

The two conventions differ: SAELens makes the mean norm √d, dictionary_learning the mean squared norm 1.
"""

from __future__ import annotations

import math

from headrace_client.errors import FailedPrecondition, InvalidArgument
from headrace_client.values import ColumnStatistics, StreamHeader


def sae_lens_factor(header: StreamHeader, hookpoint: str) -> float:
    """The factor by which SAELens multiplies: √d / mean ‖x‖. Raises FailedPrecondition without statistics."""
    statistics = statistics_of(header, hookpoint)
    widths = {column.name: column.width for column in header.columns}
    return _usable(math.sqrt(widths[hookpoint]) / (statistics.mean_norm or math.nan), hookpoint)


def dictionary_learning_norm(header: StreamHeader, hookpoint: str) -> float:
    """The norm by which dictionary_learning divides: √(mean ‖x‖²). Raises FailedPrecondition without statistics."""
    return _usable(math.sqrt(statistics_of(header, hookpoint).mean_squared_norm) or math.nan, hookpoint)


def statistics_of(header: StreamHeader, hookpoint: str) -> ColumnStatistics:
    """The statistics of one column. Raises FailedPrecondition if none of its rows is sealed yet."""
    if hookpoint not in {column.name for column in header.columns}:
        raise InvalidArgument(f"{hookpoint} is no column of this stream", fields={"hookpoint": hookpoint})
    for statistics in header.statistics:
        if statistics.name == hookpoint and statistics.count:
            return statistics
    raise FailedPrecondition(
        f"there are no statistics of {hookpoint} yet",
        reason="STATISTICS_MISSING",
        remedy="open the stream once the extraction is done, or let the trainer estimate by itself",
    )


def _usable(factor: float, hookpoint: str) -> float:
    if not math.isfinite(factor):
        raise FailedPrecondition(
            f"the norms of {hookpoint} are zero, or not finite",
            reason="STATISTICS_MISSING",
            remedy="extract without values that are not finite",
        )
    return factor
