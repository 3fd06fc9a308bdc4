"""What goes over the pipe between the registry and its download child."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

# Weights in other formats are left out: only safetensors are read, and repos often carry two or three copies.
ALLOWED_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Fetch one revision into `models_dir`/`name`-`sha12`. The token travels here, never in arguments."""

    repo_id: str
    revision: str
    models_dir: str
    name: str
    token: str = ""

    def line(self) -> bytes:
        """As one JSON line."""
        return json.dumps(asdict(self)).encode() + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`resolved`, `progress`, `done` or `failed`; the other fields as far as they apply."""

    kind: str
    commit_sha: str = ""
    path: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    reason: str = ""
    message: str = ""

    def line(self) -> str:
        """As one JSON line."""
        return json.dumps(asdict(self)) + "\n"

    @staticmethod
    def parse(line: bytes) -> Event:
        """Raises ValueError or TypeError for anything else."""
        return Event(**json.loads(line))
