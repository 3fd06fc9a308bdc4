"""Who waits for whom: whether a stream's rows are held up by the extractor, by the way to here, or by the caller."""

from __future__ import annotations

from enum import StrEnum

# Less than this share of the time spent on waiting is no bottleneck worth naming.
_NOTABLE = 0.1


class Bottleneck(StrEnum):
    """What a faster stream would need.

    EXTRACTOR: rows are handed out as fast as they are computed. NETWORK: rows that exist are on their way, through the
    server, the connection or the disk. CONSUMER: rows are there before they are asked for.
    """

    EXTRACTOR = "extractor"
    NETWORK = "network"
    CONSUMER = "consumer"


def bottleneck(*, extractor_wait: float, network_wait: float) -> Bottleneck:
    """Judges by the shares of recent time for which the consumer waited."""
    if extractor_wait + network_wait < _NOTABLE:
        return Bottleneck.CONSUMER
    return Bottleneck.EXTRACTOR if extractor_wait >= network_wait else Bottleneck.NETWORK


def shared_out(wait: float, extractor_s: float, network_s: float) -> tuple[float, float]:
    """Shares out a consumer's wait as the reading thread's own waits were: for the extractor, and for the network."""
    both_s = extractor_s + network_s
    extractor = wait * extractor_s / both_s if both_s > 0 else 0.0
    return extractor, wait - extractor
