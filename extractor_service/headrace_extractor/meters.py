"""How far a piece of work that moves bytes has come; `headrace_chassis.meters` measures the rate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How far a piece of work that moves bytes has come."""

    done_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_per_s: float = 0.0

    @property
    def percent(self) -> float:
        """0 to 100; 0 while the total is unknown."""
        return 100.0 * self.done_bytes / self.total_bytes if self.total_bytes else 0.0

    @property
    def eta_s(self) -> float:
        """Seconds left at the present rate; negative while unknown."""
        return (self.total_bytes - self.done_bytes) / self.rate_bytes_per_s if self.rate_bytes_per_s else -1.0
