"""Streams of rows: their columns, statistics and progress."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from headrace_client.values.common import Dtype
from headrace_client.values.extractions import ExtractionState

PROVENANCE_COLUMNS = ("token_id", "document", "position")
# A smaller share of time spent on waiting is no bottleneck worth naming.
_NOTABLE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a stream; 8-bit values are to be multiplied by `scale_column`."""

    name: str
    dtype: Dtype
    width: int
    scale_column: str = ""
    shape: tuple[int, ...] = ()  # Of one row; empty where it is (width,).

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnStatistics:
    """Statistics of one hookpoint column over the first `count` rows; `mean` and `m2` have one value per element."""

    name: str
    count: int
    mean: tuple[float, ...]
    m2: tuple[float, ...]
    mean_norm: float
    mean_squared_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamHeader:
    """The first message of a stream. Rows are counted in places of the reading order if `block_rows` is not 0.

    `mapped`: sealed rows are only announced, for a client that finds `nonce` in the set's folder at `path`.
    """

    set_id: str
    columns: tuple[Column, ...]
    first_row: int
    end_row: int
    reader: str
    statistics: tuple[ColumnStatistics, ...] = ()
    path: str = ""
    mapped: bool = False
    nonce: str = ""
    block_rows: int = 0


class StreamState(StrEnum):
    """The state of a stream."""

    CONNECTING = "CONNECTING"
    STREAMING = "STREAMING"
    WAITING = "WAITING"
    RECONNECTING = "RECONNECTING"
    ENDED = "ENDED"


class Bottleneck(StrEnum):
    """The part that limits the rate of a stream.

    EXTRACTOR: rows are handed out as fast as they are computed. NETWORK: rows that exist are on their way, through the
    server, the connection or the disk. CONSUMER: rows arrive before they are asked for.
    """

    EXTRACTOR = "extractor"
    NETWORK = "network"
    CONSUMER = "consumer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Rows, rates and waits of a stream.

    Shares are of the last seconds. `stream_wait` is the share in which the consumer waited for rows: `extractor_wait`
    of it for rows that were not computed yet, `network_wait` for rows that were under way. `consumer_wait` is the share
    in which the stream stood still because the queue was full. In all, the consumer waited `wait_s` for rows, and took
    `step_s` from one batch to asking for the next. `n_dropped` counts rows left out as outliers; `mapped`: rows come
    from the set's files.
    """

    state: StreamState
    extraction_state: ExtractionState | None
    rows: int
    next_row: int
    end_row: int | None
    n_rows_committed: int
    rows_per_s: float
    size_bytes: int
    queued_bytes: int
    stream_wait: float
    consumer_wait: float
    n_reconnects: int
    epoch: int = 0
    extractor_wait: float = 0.0
    network_wait: float = 0.0
    wait_s: float = 0.0
    step_s: float = 0.0
    n_dropped: int = 0
    mapped: bool = False

    @property
    def bottleneck(self) -> Bottleneck:
        """The part that limits the stream's rate."""
        if self.extractor_wait + self.network_wait < _NOTABLE:
            return Bottleneck.CONSUMER
        return Bottleneck.EXTRACTOR if self.extractor_wait >= self.network_wait else Bottleneck.NETWORK
