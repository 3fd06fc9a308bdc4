"""The parent's side of reading a repo's headers: one child for each repo, few at once, killed at the deadline."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Mapping

from headrace_chassis.confined.environment import hub_environment
from headrace_registry.errors import HubGated, HubNotFound, HubUnavailable, ModelUnsupported
from headrace_registry.hub.events import Job
from headrace_registry.sizing.estimate import Profile
from headrace_registry.sizing.headers import profile_from_json

log = logging.getLogger(__name__)

_DEADLINE_S = 30.0
_AT_ONCE = 2
_RETRY_AFTER_S = 30.0
_MAX_ANSWER_BYTES = 8 * 1024 * 1024
_ERRORS = {
    "HUB_GATED": HubGated,
    "HUB_NOT_FOUND": HubNotFound,
    "HUB_UNAVAILABLE": HubUnavailable,
    "MODEL_UNSUPPORTED": ModelUnsupported,
}


class HubHeaders:
    """Reads headers from the hub through child processes, which get the part of `environment` that concerns the hub."""

    def __init__(self, environment: Mapping[str, str], *, deadline_s: float = _DEADLINE_S) -> None:
        self._environment = hub_environment(environment)
        self._deadline_s = deadline_s
        self._free = asyncio.Semaphore(_AT_ONCE)

    async def profile(self, repo_id: str, revision: str, *, token: str = "") -> Profile:
        """Returns the profile of a revision. Raises the hub's errors, and HubUnavailable at the deadline."""
        job = Job(repo_id=repo_id, revision=revision, token=token)
        try:
            async with asyncio.timeout(self._deadline_s), self._free:
                answer = json.loads(await self._ask(job))
                if "reason" in answer:
                    error = _ERRORS.get(answer["reason"], HubUnavailable)
                    raise error(answer["message"], retry_after_s=answer["retry_after_s"] or None)
                return profile_from_json(answer["profile"])
        except TimeoutError:
            message = f"the hub did not show the headers of {repo_id} within {self._deadline_s:.0f} s; try again"
            raise HubUnavailable(message, retry_after_s=_RETRY_AFTER_S) from None
        except (ValueError, TypeError, KeyError) as exc:
            log.warning("the headers of %s can't be read: %s", repo_id, exc)
            message = f"what the hub shows of {repo_id} is no safetensors header; PrepareModel it first"
            raise ModelUnsupported(message) from exc

    async def _ask(self, job: Job) -> bytes:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "headrace_registry.hub.peek",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=self._environment,
            limit=_MAX_ANSWER_BYTES,
            start_new_session=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(job.line())
            await child.stdin.drain()
            return await child.stdout.readline()
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
            await child.wait()
