"""What can go wrong with a hub, and what to do about it: try again, or say why not.

HubFault
├── Cut            the connection ended before the file did; tried again
├── WrongDigest    a file is not what the hub says, twice
├── Unusable       the repo has nothing that can be loaded
├── NotPermitted   the repo has only what an operator has to allow
└── Nonsense       the answer is none of a hub's
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
    """The body ended early."""


class WrongDigest(HubFault):
    """A file is not what the hub says it is."""

    reason = "DIGEST_MISMATCH"


class Unusable(HubFault):
    """The repo has nothing that may be loaded."""

    reason = "MODEL_UNSUPPORTED"


class NotPermitted(HubFault):
    """The repo has only what an operator has to allow."""

    reason = "NOT_ALLOWED"


class Nonsense(HubFault):
    """The hub answered, but not as a hub does."""


def is_transient(exc: BaseException) -> bool:
    """True for what may be gone in a moment: cut connections, timeouts, 408, 429 and 5xx."""
    if isinstance(exc, HfHubHTTPError):
        status = _status(exc)
        return status in (408, 429) or status >= 500
    return isinstance(exc, Cut | httpx2.TransportError)


def retry_after_s(exc: BaseException) -> float:
    """What the hub asked for in `Retry-After` (seconds or a date), else 0."""
    response = getattr(exc, "response", None)
    text = response.headers.get("retry-after", "") if response is not None else ""
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return 0.0


def summary(exc: BaseException) -> str:
    """A few words for people; no addresses, since those of a CDN carry signatures."""
    status = _status(exc)
    return f"it answers {status}" if status else f"{type(exc).__name__}"


def failure_of(exc: Exception, job: Job) -> Event:
    """Maps what ends a job to a reason and a remedy."""
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
    return Event(
        kind="failed", reason="HUB_UNAVAILABLE", message=message, retry_after_s=retry_after_s(exc) or _RETRY_AFTER_S
    )


def _refusal(exc: Exception, job: Job) -> tuple[str, str] | None:
    """What no second try would change."""
    where = f"{job.repo_id}@{job.revision}"
    if isinstance(exc, WrongDigest | Unusable | NotPermitted):
        return exc.reason, str(exc)
    closed = _closed(exc, job)
    if closed:
        return "HUB_GATED", f"{where} {closed}"
    if isinstance(
        exc, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError | HFValidationError
    ) or _status(exc) in (404, 410):
        return "HUB_NOT_FOUND", f"the hub has no {where}; check repo and revision"
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        free_bytes = shutil.disk_usage(job.models_dir).free
        return "DISK_FULL", f"the disk filled up while fetching {where}: {free_bytes} bytes free; make room"
    return None


def _closed(exc: Exception, job: Job) -> str:
    """What to say when the hub does not let us in; empty when it does."""
    if isinstance(exc, GatedRepoError):
        return "is gated; ask for access on its page and pass a token"
    if isinstance(exc, RepositoryNotFoundError) and not job.token and _status(exc) == 401:
        return "does not exist or is private; check the name, or pass a token"
    if isinstance(exc, HfHubHTTPError) and _status(exc) in (401, 403):
        return "is refused by the hub; check the token and its rights"
    return ""


def _status(exc: BaseException) -> int:
    return int(getattr(getattr(exc, "response", None), "status_code", 0) or 0)
