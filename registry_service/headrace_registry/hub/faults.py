"""The hub's faults, and the decision between another try and a failure with a reason.

HubFault
├── Cut            the connection ended before the file did; tried again
├── WrongDigest    a file came twice with another digest than the hub names
├── Unusable       the repo has no files that can be loaded
├── NotPermitted   the repo's files need an operator's allowance
└── Nonsense       the answer does not have the form of a hub's
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from headrace_registry.hub.events import Event, Job

_RETRY_AFTER_S = 30.0


class HubFault(Exception):
    """Base; `reason` is an ErrorReason without its prefix."""

    reason = "HUB_UNAVAILABLE"


class Cut(HubFault):
    """A body ended early."""


class WrongDigest(HubFault):
    """A file does not have the digest that the hub names."""

    reason = "DIGEST_MISMATCH"


class Unusable(HubFault):
    """The repo has no files that can be loaded."""

    reason = "MODEL_UNSUPPORTED"


class NotPermitted(HubFault):
    """The repo's files need an operator's allowance."""

    reason = "NOT_ALLOWED"


class Nonsense(HubFault):
    """The hub's answer does not have the form of a hub's."""


def is_transient(exc: BaseException) -> bool:
    """True for faults that may pass in a moment: cut connections, timeouts, 408, 429 and 5xx."""
    if isinstance(exc, HfHubHTTPError):
        status = _status(exc)
        return status in (408, 429) or status >= 500
    return isinstance(exc, Cut | httpx2.TransportError)


def retry_after_s(exc: BaseException) -> float:
    """Seconds that the hub asks to wait in `Retry-After` (which holds seconds or a date), else 0."""
    response = getattr(exc, "response", None)
    text = response.headers.get("retry-after", "") if response is not None else ""
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return 0.0


def summary(exc: BaseException) -> str:
    """A few words for people, without addresses: a CDN's addresses carry signatures."""
    status = _status(exc)
    return f"it answers {status}" if status else f"{type(exc).__name__}"


def failure_of(exc: Exception, job: Job) -> Event:
    """Makes the `failed` event of an exception, with a reason and a remedy."""
    reason, message = _refusal(exc, job) or ("", "")
    if reason:
        return Event(kind="failed", reason=reason, message=message)
    where = f"{job.repo_id}@{job.revision}"
    message = f"the hub can't be reached for {where} ({summary(exc)}); prepare again later, what came is kept"
    if isinstance(exc, OfflineModeIsEnabled):
        message = "this registry runs with HF_HUB_OFFLINE; unset it, or register a local folder"
    elif isinstance(exc, Cut | Nonsense):
        message = f"{exc}; prepare again, what came is kept"
    elif isinstance(exc, OSError) and not isinstance(exc, HfHubHTTPError):
        message = f"{where} can't be written to the model store ({exc.strerror}); check the disk and prepare again"
    elif not isinstance(exc, HfHubHTTPError | httpx2.HTTPError):
        # As of a proxy that answers with a page of its own.
        message = f"the hub's answer for {where} can't be read ({type(exc).__name__}); check HF_ENDPOINT"
    return Event(
        kind="failed", reason="HUB_UNAVAILABLE", message=message, retry_after_s=retry_after_s(exc) or _RETRY_AFTER_S
    )


def _refusal(exc: Exception, job: Job) -> tuple[str, str] | None:
    """Returns reason and message of a fault that another try would not change; None for other faults."""
    where, status = f"{job.repo_id}@{job.revision}", _status(exc)
    if isinstance(exc, WrongDigest | Unusable | NotPermitted):
        return exc.reason, str(exc)
    if isinstance(exc, MemoryError):
        return Unusable.reason, f"a list or JSON file of {where} takes too much memory to read; use another repo"
    closed = ""
    if isinstance(exc, GatedRepoError):
        closed = "is gated; ask for access on its page and pass a token"
    elif isinstance(exc, RepositoryNotFoundError) and not job.token and status == 401:
        # Without a token, the hub answers the same for a private repo and for none at all.
        closed = "does not exist or is private; check the name, or pass a token"
    elif isinstance(exc, HfHubHTTPError) and status in (401, 403):
        closed = "is refused by the hub; check the token and its rights"
    if closed:
        return "HUB_GATED", f"{where} {closed}"
    if isinstance(
        exc, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError | HFValidationError
    ) or status in (404, 410):
        return "HUB_NOT_FOUND", f"the hub has no {where}; check repo and revision"
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        free_bytes = shutil.disk_usage(job.models_dir).free
        return "DISK_FULL", f"the disk filled up while fetching {where}: {free_bytes} bytes free; free space"
    return None


def _status(exc: BaseException) -> int:
    return int(getattr(getattr(exc, "response", None), "status_code", 0) or 0)
