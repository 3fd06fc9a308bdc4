"""The limit of open files of a server's process."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger(__name__)

# Python itself, libraries, the log, Postgres connections, pipes to child processes.
_KEPT_FILES = 100


def raise_limit() -> None:
    """Raises the soft limit of open files to the hard one, also for child processes; logs it.

    The usual soft limit is low for the sake of programs that use select(). Each mapped segment holds a descriptor, and
    a reader of many columns in shuffled order maps hundreds.
    """
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ValueError, OSError) as exc:  # A hard limit of "unlimited" can exceed the kernel's own limit.
        logger.warning("the limit of open files stays: %s", exc)
    now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    logger.info("limit of open files", extra={"fields": {"max_files": now, "max_files_before": before}})


def most_connections(wanted: int) -> int:
    """Returns the number of incoming connections to accept: `wanted`, or fewer where the limit of open files is low.

    A connection is a descriptor. Half of them, at least, stay for files, child processes and outgoing connections: a
    server that can't open a file any more can't do its work.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(wanted, max(16, (limit - _KEPT_FILES) // 2))
