"""For how long sets were not used, counted while a server runs: the wall clock may jump, or stand still for weeks.

The counts lie in one small file beside the sets. A crash costs the minutes since the file was written last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from headrace_log.files import write_atomically

FILE_NAME = "idle.json"
# A clock that differs by more from the time that passed was set.
_JUMP_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Idleness:
    """By set, the time of its last use as noted, and the seconds that a server has run since; `wall` is a Unix time."""

    seen: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    wall: float = 0.0

    def after(self, last_used: Mapping[str, float], *, elapsed_s: float, wall: float) -> Idleness:
        """Returns the counts `elapsed_s` seconds later; sets that are gone are left out."""
        seen = {name: (used, self.idle_s(name, used)) for name, used in last_used.items()}
        known = {name for name, (used, _) in seen.items() if self.seen.get(name, (None,))[0] == used}
        return Idleness(
            seen={name: (used, idle_s + elapsed_s * (name in known)) for name, (used, idle_s) in seen.items()},
            wall=wall,
        )

    def idle_s(self, name: str, last_used: float) -> float:
        """Seconds that a server has run since the last use; 0 for a set that was used since the counts were made."""
        used, idle_s = self.seen.get(name, (last_used, 0.0))
        return idle_s if used == last_used else 0.0

    def jumped(self, *, elapsed_s: float, wall: float) -> bool:
        """True if the wall clock did not go on by the time that passed."""
        return bool(self.wall) and abs(wall - self.wall - elapsed_s) > _JUMP_S

    @classmethod
    def load(cls, folder: Path) -> Idleness:
        """Reads the counts; a file that is missing or damaged counts as none."""
        try:
            document = json.loads((folder / FILE_NAME).read_bytes())
            seen = {str(name): (float(used), float(idle_s)) for name, (used, idle_s) in document["sets"].items()}
            return cls(seen=seen, wall=float(document["wall"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()

    def save(self, folder: Path) -> None:
        """Writes the counts. Raises DiskFull."""
        write_atomically(folder / FILE_NAME, json.dumps({"wall": self.wall, "sets": dict(self.seen)}).encode() + b"\n")
