"""Packages that only parts of the client need: a missing one is named together with its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from headrace_client.errors import PackageMissing


@contextmanager
def needing(requirement: str) -> Iterator[None]:
    """Turns a failed import in the block into PackageMissing, which names what to install: `headrace[torch]`."""
    try:
        yield
    except ModuleNotFoundError as exc:
        package = (exc.name or "").partition(".")[0]
        if not package or package.startswith("headrace"):
            raise  # Not an extra: a fault of the installation, or of ours.
        raise PackageMissing(
            f"{package} is not installed; run: pip install '{requirement}'", metadata={"package": package}
        ) from exc
