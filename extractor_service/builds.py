"""Builds: model files made on this node, each by a runner of its own, once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chassis.errors import ServiceError
from extractor_service.errors import ModelUnsupported, reason_of
from extractor_service.ports import NodeRegistry, Runner, RunnerFactory
from extractor_service.reporting import REPORT_INTERVAL_S, try_to_tell
from extractor_service.runner_protocol import Convert, Converted, Converting, Message, Quantize, Quantized
from extractor_service.values import Build, Failure, TransferMeter

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
    ) -> None:
        self._registry = registry
        self._start_runner = start_runner
        self._epoch = epoch
        self._environment = environment
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
        failure: Failure | None = None
        fidelity: Mapping[str, Any] | None = None
        runner: Runner | None = None
        try:
            runner = await self._start_runner(environment=self._environment)
            fidelity = await self._carry_out(runner, build)
        except ServiceError as exc:
            failure = Failure(reason=reason_of(exc), message=exc.message)
        finally:
            if runner:
                await runner.kill()
        await try_to_tell(
            lambda: self._registry.report_build(
                self._epoch(), build, done=failure is None, transfer=None, failure=failure, fidelity=fidelity
            ),
            5,
            f"build of {build.model.id}",
        )
        self._running.pop(build.target_path, None)

    async def _carry_out(self, runner: Runner, build: Build) -> Mapping[str, Any] | None:
        meter, reported = TransferMeter(time.monotonic()), 0.0
        async for event in runner.run(command_of(build), ends=(Converted, Quantized)):
            now = time.monotonic()
            if isinstance(event, Quantized):
                return event.fidelity
            if isinstance(event, Converting) and now - reported >= REPORT_INTERVAL_S:
                reported = now
                transfer = meter.at(event.done_bytes, event.total_bytes, now)
                await try_to_tell(
                    lambda transfer=transfer: self._registry.report_build(  # type: ignore[misc]
                        self._epoch(), build, done=False, transfer=transfer, failure=None
                    ),
                    1,
                    f"build of {build.model.id}",
                )
        return None


def command_of(build: Build) -> Message:
    """What a runner is told. Raises ModelUnsupported for a build that neither quantizes nor converts."""
    model = build.model
    if build.source_path and model.quantization == "none":
        return Convert(source_path=build.source_path, target_path=build.target_path)
    if build.source_path:
        dtype = model.compute_dtype("cpu")
        return Quantize(
            source_path=build.source_path,
            target_path=build.target_path,
            quantization=model.quantization,
            dtype=dtype if dtype in _COMPARED else _COMPARED[0],
            load_options=numeric_options(model.load_options),
        )
    if not model.gguf_path:
        raise ModelUnsupported(f"Model {model.id} is no GGUF file and needs no conversion.")
    return Convert(source_path=model.gguf_path, target_path=build.target_path)


def numeric_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out where the model is to be loaded: a build runs on the CPU."""
    return {key: value for key, value in options.items() if key not in ("device_map", "max_memory")}
