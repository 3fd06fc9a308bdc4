"""How many files a server may have open."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger(__name__)


def raise_limit() -> None:
    """Lets this process, and those it starts, open as many files as they may; logs how many that is.

    The usual limit is kept low for programs that use select(). A mapped segment holds a descriptor of its own: a reader
    of many columns in shuffled order has hundreds.
    """
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ValueError, OSError) as exc:  # "No limit" can be more than a kernel gives one process.
        logger.warning("the limit of open files stays: %s", exc)
    now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    logger.info("limit of open files", extra={"fields": {"max_files": now, "max_files_before": before}})
