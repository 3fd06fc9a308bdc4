"""The parent's side of downloads: spawns the child, reads its events, kills it when told or when it hangs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace

from headrace_chassis.confined.environment import hub_environment
from headrace_chassis.errors import ServiceError
from headrace_registry.errors import (
    DigestMismatch,
    DiskFull,
    HubGated,
    HubNotFound,
    HubUnavailable,
    ModelUnsupported,
    NotAllowed,
)
from headrace_registry.hub.events import GO, Event, Job
from headrace_registry.models.registration import Resolution

log = logging.getLogger(__name__)

# A child without an event for so long hangs: it counts bytes twice a second, and no listing takes longer.
_SILENCE_S = 120.0
# A try fails after so long without a byte; the child itself tries again.
_STALL_S = 60.0
_BACKOFF_S = 1.0
_STARTS = 3
_RETRY_AFTER_S = 30.0
_RESOLVE_S = 5.0
_TURN_S = 20.0
_RESOLVES_AT_ONCE = 4
_ERRORS: dict[str, type[ServiceError]] = {
    "DIGEST_MISMATCH": DigestMismatch,
    "DISK_FULL": DiskFull,
    "HUB_GATED": HubGated,
    "HUB_NOT_FOUND": HubNotFound,
    "MODEL_UNSUPPORTED": ModelUnsupported,
    "NOT_ALLOWED": NotAllowed,
}
_MAX_LINE_BYTES = 64 * 1024
_LOG_TAIL_BYTES = 2000
_OFFLINE = ("1", "ON", "YES", "TRUE")


class _ChildDied(Exception):
    """The child ended without a last event, or hung and was killed."""


class HubClient:
    """Reaches the hub through child processes, which get the part of `environment` that concerns the hub."""

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        stall_s: float = _STALL_S,
        backoff_s: float = _BACKOFF_S,
        silence_s: float = _SILENCE_S,
    ) -> None:
        self._environment = hub_environment(environment)
        self._stall_s = stall_s
        self._backoff_s = backoff_s
        self._silence_s = silence_s
        self._resolving = asyncio.Semaphore(_RESOLVES_AT_ONCE)

    async def resolve(self, repo_id: str, revision: str, *, token: str = "") -> Resolution:
        """Returns the present commit of a revision, and its config's problem, as far as the hub tells them soon."""
        if self._environment.get("HF_HUB_OFFLINE", "").upper() in _OFFLINE:
            return Resolution()
        job = self._job(Job(repo_id=repo_id, revision=revision, token=token, resolve_only=True))
        found = Resolution()
        try:
            async with asyncio.timeout(_TURN_S) as limit, self._resolving:
                # The time that the hub may take begins once a child can be started: many registrations wait in turn.
                limit.reschedule(asyncio.get_running_loop().time() + _RESOLVE_S)
                async with contextlib.aclosing(self._once(job)) as events:
                    async for event in events:
                        found = Resolution(commit_sha=event.commit_sha, problem=event.message)
                        if event.kind == "done":
                            break
        except (ServiceError, _ChildDied, TimeoutError) as exc:
            if not found.commit_sha:
                log.warning("the commit of %s@%s stays open until it is prepared: %s", repo_id, revision, exc)
        return found

    async def fetch(self, job: Job) -> AsyncGenerator[Event, None]:
        """Yields `resolved`, `progress`, `waiting` and at last `done`. Raises the hub errors.

        The download begins when the caller asks for the event after `resolved`. Closing the generator kills the child.
        A child that dies or hangs is started again, and continues with the bytes on the disk.
        """
        job = self._job(job)
        for start in range(1, _STARTS + 1):
            try:
                async with contextlib.aclosing(self._once(job)) as events:
                    async for event in events:
                        yield event
                        if event.kind == "done":
                            return
            except _ChildDied as exc:
                log.warning("the download of %s broke off: %s", job.repo_id, exc)
                if start == _STARTS:
                    message = f"the download process ended {_STARTS} times: {exc}; prepare again, what came is kept"
                    raise HubUnavailable(message, retry_after_s=_RETRY_AFTER_S) from None
            await asyncio.sleep(self._backoff_s * 2 ** (start - 1))

    def _job(self, job: Job) -> Job:
        return replace(job, stall_s=self._stall_s, backoff_s=self._backoff_s)

    async def _once(self, job: Job) -> AsyncGenerator[Event, None]:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "headrace_registry.hub.download",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
            limit=_MAX_LINE_BYTES,
            start_new_session=True,
        )
        assert child.stderr is not None
        complaints = asyncio.create_task(_tail(child.stderr))
        try:
            await _tell(child, job.line())
            silence_s = self._silence_s
            while event := await self._next(child, silence_s):
                silence_s = self._silence_s + event.retry_after_s
                yield event
                if event.kind == "done":
                    return
                if event.kind == "resolved":
                    await _tell(child, GO)
            text = (await complaints).decode(errors="replace").strip()
            # A traceback on the child's standard error may show the token.
            raise _ChildDied((text.replace(job.token, "***") if job.token else text)[-500:] or "without a word")
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
            await child.wait()
            complaints.cancel()
            await asyncio.gather(complaints, return_exceptions=True)

    async def _next(self, child: asyncio.subprocess.Process, silence_s: float) -> Event | None:
        """Returns the next event, None at the end. Raises the error of a `failed` event, and _ChildDied."""
        assert child.stdout is not None
        try:
            async with asyncio.timeout(silence_s):
                line = await child.stdout.readline()
            event = Event.parse(line) if line else None
        except TimeoutError:
            raise _ChildDied(f"no word for {silence_s:.0f} s") from None
        except (ValueError, TypeError) as exc:
            raise _ChildDied(f"no event: {exc}") from None
        if event is not None and event.kind == "failed":
            error = _ERRORS.get(event.reason, HubUnavailable)
            raise error(event.message, retry_after_s=event.retry_after_s or None)
        return event


async def _tell(child: asyncio.subprocess.Process, line: bytes) -> None:
    assert child.stdin is not None
    with contextlib.suppress(ConnectionError):  # The child died; its output ends, and the reader notices.
        child.stdin.write(line)
        await child.stdin.drain()


async def _tail(stream: asyncio.StreamReader) -> bytes:
    """Reads a stream to its end, so that the child never blocks on it; returns the last bytes."""
    kept = b""
    while block := await stream.read(4096):
        kept = (kept + block)[-_LOG_TAIL_BYTES:]
    return kept
