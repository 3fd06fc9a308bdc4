"""The environment of child processes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

# Variables that a process needs to reach the hub and to find its files, whatever else a server was given.
_NAMES = frozenset(
    [
        "PATH",
        "HOME",
        "USER",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TMPDIR",
        "TEMP",
        "TMP",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
    ]
)
_PREFIXES = ("HF_", "HUGGING", "PYTHON", "LC_", "SSL_", "XDG_", "LD_", "DYLD_")


# Parts of the names of secrets. PWD alone is the working folder.
_SECRET = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASS|PGPASSFILE|CREDENTIALS?|(API|ACCESS)?KEY|PAT|DSN|CONNECTION_STRING"
    r"|DATABASE_UR[LI])(_|$)|_PWD$|^PG",
    re.IGNORECASE,
)
# An address with a password, such as that of a proxy or a database.
_WITH_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@", re.IGNORECASE)


def parser_environment() -> dict[str, str]:
    """Returns the environment of a process that only parses: no more than it takes to import our modules."""
    return {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path),
        # Threads would keep the process from forking safely, and arenas of their own take memory from the limit.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }


def hub_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the part of a server's environment that reaching the Hugging Face hub takes, with the hub's own token.

    Passwords of databases and tokens of other services stay with the server.
    """
    return {name: value for name, value in environment.items() if name in _NAMES or name.startswith(_PREFIXES)}


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment without the variables whose names tell of a secret, or whose values hold a password.

    For runners: the libraries and drivers of a model need variables that nobody can list, and its code may come from
    the model's repo.
    """
    return {
        name: value
        for name, value in environment.items()
        if not _SECRET.search(name) and not _WITH_PASSWORD.search(value)
    }
