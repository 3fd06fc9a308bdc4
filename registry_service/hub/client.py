"""The parent's side: spawns the download child, reads its events, kills it when told or when it stalls."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncGenerator, Mapping

from registry_service.errors import DiskFull, HubGated, HubNotFound, HubUnavailable, ModelUnsupported
from registry_service.hub.events import Event, Job

log = logging.getLogger(__name__)

# A download that brings no byte for so long is hung, not slow.
_STALL_S = 300.0
_RETRY_AFTER_S = 30.0
_ERRORS = {
    "HUB_GATED": HubGated,
    "HUB_NOT_FOUND": HubNotFound,
    "HUB_UNAVAILABLE": HubUnavailable,
    "MODEL_UNSUPPORTED": ModelUnsupported,
    "DISK_FULL": DiskFull,
}
_MAX_LINE_BYTES = 64 * 1024
_LOG_TAIL_BYTES = 2000


class HubClient:
    """Downloads from the hub; `environment` is the child's."""

    def __init__(self, environment: Mapping[str, str], *, stall_s: float = _STALL_S) -> None:
        self._environment = dict(environment)
        self._stall_s = stall_s

    async def fetch(self, job: Job) -> AsyncGenerator[Event, None]:
        """Yields `resolved`, `progress` and at last `done`. Raises the hub errors. Closing it kills the download."""
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "registry_service.hub.download",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
            limit=_MAX_LINE_BYTES,
            start_new_session=True,
        )
        assert child.stdin is not None
        assert child.stderr is not None
        complaints = asyncio.create_task(_tail(child.stderr))
        try:
            child.stdin.write(job.line())
            await child.stdin.drain()
            async for event in self._events(child):
                yield event
                if event.kind == "done":
                    return
            text = (await complaints).decode(errors="replace").strip()
            log.warning("download child ended without a word: %s", text)
            raise HubUnavailable("the download process died; prepare again", retry_after_s=_RETRY_AFTER_S)
        finally:
            await _end(child)
            complaints.cancel()
            await asyncio.gather(complaints, return_exceptions=True)

    async def _events(self, child: asyncio.subprocess.Process) -> AsyncGenerator[Event, None]:
        assert child.stdout is not None
        loop = asyncio.get_running_loop()
        best, grown = -1, loop.time()
        while True:
            try:
                async with asyncio.timeout_at(grown + self._stall_s):
                    line = await child.stdout.readline()
            except TimeoutError:
                raise _stalled(self._stall_s) from None
            if not line:
                return
            event = Event.parse(line)
            if event.kind == "failed":
                raise _ERRORS.get(event.reason, HubUnavailable)(
                    event.message, retry_after_s=_RETRY_AFTER_S if event.reason == "HUB_UNAVAILABLE" else None
                )
            if event.done_bytes > best:
                best, grown = event.done_bytes, loop.time()
            elif loop.time() > grown + self._stall_s:
                raise _stalled(self._stall_s)
            yield event


def _stalled(stall_s: float) -> HubUnavailable:
    return HubUnavailable(f"no byte came for {stall_s:.0f} s; prepare again", retry_after_s=_RETRY_AFTER_S)


async def _end(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    await child.wait()


async def _tail(stream: asyncio.StreamReader) -> bytes:
    """Drains a stream, so that the child never blocks on it; keeps its end."""
    kept = b""
    while block := await stream.read(4096):
        kept = (kept + block)[-_LOG_TAIL_BYTES:]
    return kept
