"""Builds: model files made on this node, each by a runner of its own, once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace_chassis.errors import ServiceError
from headrace_chassis.meters import Meter
from headrace_extractor.errors import Failure, LoadFailed, ModelUnsupported, reason_of
from headrace_extractor.meters import Transfer
from headrace_extractor.node.ports import NodeRegistry, Runner, RunnerFactory
from headrace_extractor.node.reporting import REPORT_INTERVAL_S, try_to_tell
from headrace_extractor.node.runner_protocol import Convert, Converted, Converting, Message, Quantize, Quantized
from headrace_extractor.node.values import Build, BuildKind

logger = logging.getLogger(__name__)

# A step may say nothing for longer than the ten minutes after which the registry takes a build to be forgotten.
_SIGN_OF_LIFE_S = 60.0
# A runner says nothing while it writes the files of a model, reads them again and brings them to disk.
_SILENCE_S = 3600.0
_SLOWEST_BYTES_PER_S = 20e6
# Quantized weights are compared with their source on the CPU, where float16 is several times slower.
_COMPARED = ("float32", "bfloat16")


class Builds:
    """Carries out what the registry wants built; each build goes on to its end, whatever is asked meanwhile."""

    def __init__(
        self,
        registry: NodeRegistry,
        start_runner: RunnerFactory,
        *,
        epoch: Callable[[], int],
        environment: Mapping[str, str],
        sign_of_life_s: float = _SIGN_OF_LIFE_S,
        silence_s: float = _SILENCE_S,
    ) -> None:
        self._registry = registry
        self._start_runner = start_runner
        self._epoch = epoch
        self._environment = environment
        self._sign_of_life_s = sign_of_life_s
        self._silence_s = silence_s
        self._running: dict[str, asyncio.Task[None]] = {}

    def follow(self, wanted: Sequence[Build]) -> None:
        """Starts what is wanted and does not run yet."""
        for build in wanted:
            if build.target_path not in self._running:
                task = asyncio.create_task(self._build(build), name=f"build-{build.model.id}")
                self._running[build.target_path] = task

    async def close(self) -> None:
        """Ends all of them, with their runners."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _build(self, build: Build) -> None:
        try:
            await self._build_and_tell(build)
        finally:  # If it is still wanted, it begins anew.
            self._running.pop(build.target_path, None)

    async def _build_and_tell(self, build: Build) -> None:
        failure: Failure | None = None
        fidelity: Mapping[str, Any] | None = None
        try:
            fidelity = await self._in_runner(build)
        except ServiceError as exc:
            failure = Failure(reason=reason_of(exc), message=exc.message)
        except OSError as exc:  # TimeoutError is one.
            failure = Failure(
                reason=LoadFailed.reason, message=f"The build broke off ({exc!r}); look at the node's log."
            )
        await try_to_tell(
            lambda: self._registry.report_build(
                self._epoch(), build, done=failure is None, transfer=None, failure=failure, fidelity=fidelity
            ),
            5,
            f"build of {build.model.id}",
        )

    async def _in_runner(self, build: Build) -> Mapping[str, Any] | None:
        runner = await self._start_runner(environment=self._environment)
        progress = _Progress()
        telling = asyncio.create_task(self._tell(build, progress), name=f"progress-{build.model.id}")
        try:
            return await self._carry_out(runner, build, progress)
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            await _end(runner)

    async def _carry_out(self, runner: Runner, build: Build, progress: _Progress) -> Mapping[str, Any] | None:
        async with asyncio.timeout(self._silence_s) as silence:
            async for event in runner.run(command_of(build), ends=(Converted, Quantized)):
                if isinstance(event, Quantized):
                    return event.fidelity
                if isinstance(event, Converting):
                    progress.note(event)
                    silence_s = self._silence_s + event.total_bytes / _SLOWEST_BYTES_PER_S
                    silence.reschedule(asyncio.get_running_loop().time() + silence_s)
        return None

    async def _tell(self, build: Build, progress: _Progress) -> None:
        """Reports progress as it comes, and what is known already when none comes for long."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._sign_of_life_s):
                    await progress.moved.wait()
            progress.moved.clear()
            try:
                await try_to_tell(
                    lambda: self._registry.report_build(
                        self._epoch(), build, done=False, transfer=progress.transfer, failure=None
                    ),
                    1,
                    f"build of {build.model.id}",
                )
            except ServiceError as exc:  # The next word may be heard.
                logger.warning("progress of the build of %s is not heard: %s", build.model.id, exc.message)
            await asyncio.sleep(REPORT_INTERVAL_S)


async def _end(runner: Runner) -> None:
    try:
        await runner.kill()
    except TimeoutError:  # What it made, or why it failed, is known all the same.
        logger.error("a build's runner can't be ended; it keeps its memory while it lives")  # noqa: TRY400


class _Progress:
    """How far a build is."""

    def __init__(self) -> None:
        self.transfer: Transfer | None = None
        self.moved = asyncio.Event()
        self._meter = Meter()
        self._meter.at(0, time.monotonic())

    def note(self, event: Converting) -> None:
        """Takes what a runner said."""
        rate = self._meter.at(event.done_bytes, time.monotonic())
        self.transfer = Transfer(done_bytes=event.done_bytes, total_bytes=event.total_bytes, rate_bytes_per_s=rate)
        self.moved.set()


def command_of(build: Build) -> Message:
    """The runner's command for a build. Raises ModelUnsupported for an unknown kind or a missing GGUF file."""
    model = build.model
    if build.kind is BuildKind.CONVERT_GGUF:
        if not model.gguf_path:
            raise ModelUnsupported(f"Model {model.id} is no GGUF file and needs no conversion.")
        return Convert(source_path=model.gguf_path, target_path=build.target_path)
    if build.kind is BuildKind.CONVERT_PICKLED:
        return Convert(source_path=build.source_path, target_path=build.target_path)
    if build.kind is BuildKind.QUANTIZE:
        dtype = model.compute_dtype("cpu")
        return Quantize(
            source_path=build.source_path,
            target_path=build.target_path,
            quantization=model.quantization,
            dtype=dtype if dtype in _COMPARED else _COMPARED[0],
            load_options=numeric_options(model.load_options),
        )
    raise ModelUnsupported(f"Model {model.id} needs a build of a kind that this extractor does not know; update it.")


def numeric_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out where the model is to be loaded: a build runs on the CPU."""
    return {key: value for key, value in options.items() if key not in ("device_map", "max_memory")}
