"""The messages between the registry and its hub children, and the end of a child without a parent."""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Fetch one revision into `models_dir`/`name`-`sha12`; with `resolve_only`, only resolve it to its commit.

    The token travels in this message and not in arguments, which every user of the machine can read.
    """

    repo_id: str
    revision: str
    models_dir: str = ""
    name: str = ""
    token: str = ""
    resolve_only: bool = False
    allow_pickle: bool = False
    with_code: bool = False
    # A try fails after `stall_s` without a byte; the waits between tries begin with `backoff_s` and double.
    stall_s: float = 60.0
    backoff_s: float = 1.0

    def line(self) -> bytes:
        """As one JSON line."""
        return json.dumps(asdict(self)).encode() + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`resolved`, `progress`, `waiting`, `done` or `failed`; each kind fills the fields that apply to it.

    After `resolved` the child waits for `GO`, so that its parent can reserve `total_bytes` and make `path`.
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
        """Reads one line. Raises ValueError or TypeError if it is no event."""
        return Event(**json.loads(line))


GO = b"go\n"
ORPHANED = 3  # Exit status.


def exit_when_orphaned() -> None:
    """Ends this child once its standard input ends, which is when its parent dies."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(ORPHANED)

    threading.Thread(target=watch, daemon=True).start()
