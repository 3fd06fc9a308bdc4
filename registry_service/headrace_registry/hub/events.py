"""What goes over the pipe between the registry and its hub child."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Fetch one revision into `models_dir`/`name`-`sha12`. The token travels here, never in arguments.

    With `resolve_only` the child only says which commit the revision is.
    """

    repo_id: str
    revision: str
    models_dir: str = ""
    name: str = ""
    token: str = ""
    resolve_only: bool = False
    allow_pickle: bool = False
    with_code: bool = False
    # No byte for so long is a failed try; the waits between tries begin with the backoff and double.
    stall_s: float = 60.0
    backoff_s: float = 1.0

    def line(self) -> bytes:
        """As one JSON line."""
        return json.dumps(asdict(self)).encode() + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`resolved`, `progress`, `waiting`, `done` or `failed`; the other fields as far as they apply.

    After `resolved` the child waits for `GO`, so that its parent can make room for `total_bytes` and make `path`.
    """

    kind: str
    commit_sha: str = ""
    path: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    pickled: bool = False
    reason: str = ""
    message: str = ""
    retry_after_s: float = 0.0

    def line(self) -> str:
        """As one JSON line."""
        return json.dumps(asdict(self)) + "\n"

    @staticmethod
    def parse(line: bytes) -> Event:
        """Raises ValueError or TypeError for anything else."""
        return Event(**json.loads(line))


GO = b"go\n"
