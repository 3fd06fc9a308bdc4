"""Builds: model files made on this node, each once and by a runner of its own."""

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
from headrace_extractor.node.ports import NodeRegistry, RunnerFactory
from headrace_extractor.node.reporting import REPORT_INTERVAL_S, try_to_tell
from headrace_extractor.node.runner_protocol import Convert, Converted, Converting, Message, Quantize, Quantized
from headrace_extractor.node.values import Build, BuildKind

logger = logging.getLogger(__name__)

# The registry takes a build to be forgotten after ten minutes without a report; some steps make no progress for longer.
_SIGN_OF_LIFE_S = 60.0
# A runner sends no event while it writes the files of a model, reads them again and flushes them to disk.
_SILENCE_S = 3600.0
_SLOWEST_BYTES_PER_S = 20e6
# Quantized weights are compared with their source on the CPU, where float16 is several times slower.
_COMPARED = ("float32", "bfloat16")


class Builds:
    """Carries out the builds that the registry wants; a running build goes on even if the registry drops it."""

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
        """Starts the wanted builds that are not running yet."""
        for build in wanted:
            if build.target_path not in self._running:
                task = asyncio.create_task(self._build(build), name=f"build-{build.model.id}")
                self._running[build.target_path] = task

    async def close(self) -> None:
        """Ends all builds and their runners."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _build(self, build: Build) -> None:
        failure: Failure | None = None
        fidelity: Mapping[str, Any] | None = None
        try:
            try:
                fidelity = await self._in_runner(build)
            except ServiceError as exc:
                failure = Failure(reason=reason_of(exc), message=exc.message, metadata=exc.metadata)
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
        finally:  # The build starts again if the next desired state still has it.
            self._running.pop(build.target_path, None)

    async def _in_runner(self, build: Build) -> Mapping[str, Any] | None:
        """Runs the build in a runner that it starts and ends; returns the fidelity of a quantization."""
        runner = await self._start_runner(environment=self._environment)
        progress = _Progress()
        reporting = asyncio.create_task(self._report_progress(build, progress), name=f"progress-{build.model.id}")
        try:
            async with asyncio.timeout(self._silence_s) as silence:
                async for event in runner.run(command_of(build), ends=(Converted, Quantized)):
                    if isinstance(event, Quantized):
                        return event.fidelity
                    if isinstance(event, Converting):
                        progress.note(event)
                        # The end of a large model takes longer: its files are written, read again and flushed.
                        silence_s = self._silence_s + event.total_bytes / _SLOWEST_BYTES_PER_S
                        silence.reschedule(asyncio.get_running_loop().time() + silence_s)
            return None
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
            try:
                await runner.kill()
            except TimeoutError:  # Not a failure of the build: its result, or its own failure, is known by now.
                logger.error("a build's runner can't be ended; it keeps its memory while it lives")  # noqa: TRY400

    async def _report_progress(self, build: Build, progress: _Progress) -> None:
        """Reports progress when there is some, and repeats the last report after `sign_of_life_s` without any."""
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
            except ServiceError as exc:  # The next report may be taken.
                logger.warning(
                    "the registry does not take progress of the build of %s: %s", build.model.id, exc.message
                )
            await asyncio.sleep(REPORT_INTERVAL_S)


class _Progress:
    """The bytes a build has handled so far; `moved` is set at each change."""

    def __init__(self) -> None:
        self.transfer: Transfer | None = None
        self.moved = asyncio.Event()
        self._meter = Meter()
        self._meter.at(0, time.monotonic())

    def note(self, event: Converting) -> None:
        """Notes a runner's event."""
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
    if build.kind is BuildKind.CONVERT_TOKENIZER:
        return Convert(source_path=build.source_path, target_path=build.target_path, tokenizer=True)
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
    """Leaves out the load options that place a model on devices: a build runs on the CPU."""
    return {key: value for key, value in options.items() if key not in ("device_map", "max_memory")}
