"""A real server on the chassis with a service made for tests, in process or as a process of its own.

`probe_server(**options)` starts one on a free port; `python tests/fix_chassis.py FLAGS` is the same as a program.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import logging
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.wrappers_pb2 import StringValue

from headrace.registry.v1 import model_service_pb2_grpc
from headrace_chassis import logs
from headrace_chassis.deadline import current_deadline
from headrace_chassis.errors import ServiceError, ShuttingDown
from headrace_chassis.flags import add_common_flags, options_from
from headrace_chassis.metrics import Metrics
from headrace_chassis.server import Server, ServerOptions
from headrace_chassis.shutdown import Shutdown
from headrace_chassis.status import StatusTable
from headrace_chassis.watch import watch

PROTOS = Path(__file__).parents[1] / "protos"
SERVICE = "headrace.test.Probe"
TOKEN = "correct-horse-battery-staple"


class ProbeError(ServiceError):
    """Root of the probe's tree."""


class ThingMissing(ProbeError):
    """NOT_FOUND."""


class FieldWrong(ProbeError):
    """INVALID_ARGUMENT."""


class ThingBusy(ProbeError):
    """RESOURCE_EXHAUSTED."""


class StateWrong(ProbeError):
    """FAILED_PRECONDITION."""


class VeryStateWrong(StateWrong):
    """Has no row of its own."""


class OtherAway(ProbeError):
    """UNAVAILABLE, after a wait in the server."""

    waited = True


class Unlisted(ServiceError):
    """Has no row at all."""


STATUSES = StatusTable(
    {
        ThingMissing: (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        FieldWrong: (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID"),
        ThingBusy: (grpc.StatusCode.RESOURCE_EXHAUSTED, "CAPACITY_BUSY"),
        StateWrong: (grpc.StatusCode.FAILED_PRECONDITION, "STATE_CONFLICT"),
        OtherAway: (grpc.StatusCode.UNAVAILABLE, "REGISTRY_UNAVAILABLE"),
    }
)

ERRORS: dict[str, Callable[[], BaseException]] = {
    "missing": lambda: ThingMissing("No model `a`; register it first.", resource=("model", "a")),
    "field": lambda: FieldWrong("`limit` is -1; give 0 or more.", field="limit", metadata={"limit": "-1"}),
    "busy": lambda: ThingBusy("All is leased; try later.", retry_after_s=2.5, metadata={"holders": "x,y"}),
    "state": lambda: VeryStateWrong("Not ready; prepare it first.", resource=("model", "a")),
    "all": lambda: StateWrong("Everything.", field="f", resource=("model", "a"), retry_after_s=1, metadata={"a": "b"}),
    "long": lambda: StateWrong(
        "é" * 5000 + " Do this.",
        field="f" * 5000,
        resource=("model", "n" * 5000),
        retry_after_s=1,
        metadata={f"key{i}": "v" * 3000 for i in range(100)} | {"k" * 500: "x"},
    ),
    "away": lambda: OtherAway("The registry is away."),
    "shutting-down": ShuttingDown,
    "unlisted": lambda: Unlisted("the password is 1234"),
    "bug": lambda: RuntimeError("the password is 1234"),
    "group": lambda: ExceptionGroup("tasks", [ThingMissing("No model `a`.")]),
    "mixed-group": lambda: ExceptionGroup("tasks", [ThingMissing("x"), ValueError("the password is 1234")]),
    "not-implemented-bug": lambda: NotImplementedError("the password is 1234"),
}


def failure(name: str) -> BaseException:
    """Makes a new error, so that no two tests share a traceback."""
    return ERRORS[name]()


@dataclass
class Probe:
    """The service's behaviour, and its notes of opened and closed calls."""

    shutdown: Shutdown
    heartbeat_s: float = 0.05
    seen: list[str] = field(default_factory=list)
    stop_ignoring: asyncio.Event = field(default_factory=asyncio.Event)

    async def unary(self, request: StringValue, context: Any) -> StringValue:
        command = request.value
        if command in ERRORS:
            raise failure(command)
        if command.startswith("sleep "):
            await asyncio.sleep(float(command.split()[1]))
        if command == "block":
            time.sleep(3600)  # noqa: ASYNC251 - the fault itself: a blocked loop
        if command == "request id":
            logging.getLogger("probe").info("inside")
            return StringValue(value=logs.current_request_id.get())
        if command == "deadline":
            left_s = (current_deadline.get() or 0.0) - asyncio.get_running_loop().time()
            return StringValue(value=f"{left_s:.0f}")
        if command == "ignore cancellation":
            await self._ignore_cancellation()
        return StringValue(value=command.upper())

    async def _ignore_cancellation(self) -> None:
        while not self.stop_ignoring.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.stop_ignoring.wait()

    async def generate(self, request: StringValue, context: Any) -> AsyncIterator[bytes]:
        """Yields `n` messages of raw bytes, then fails or waits."""
        count, _, then = request.value.partition(" ")
        self.seen.append("generate opened")
        try:
            for index in range(int(count)):
                yield b"%d" % index
            if then in ERRORS:
                raise failure(then)
            if then == "wait":
                await asyncio.sleep(3600)
        finally:
            self.seen.append("generate closed")

    async def write(self, request: StringValue, context: Any) -> None:
        """Does the same with the reader and writer API."""
        count, _, then = request.value.partition(" ")
        for index in range(int(count)):
            await context.write(b"%d" % index)
        if then in ERRORS:
            raise failure(then)
        if then == "wait":
            await asyncio.sleep(3600)

    async def watch(self, request: StringValue, context: Any) -> AsyncIterator[bytes]:
        async for event in watch(
            self._events(), heartbeat=lambda: b"heartbeat", shutdown=self.shutdown, interval_s=self.heartbeat_s
        ):
            yield event

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            yield b"snapshot"
            await asyncio.sleep(3600)
        finally:
            self.seen.append("events closed")

    async def upload(self, requests: AsyncIterator[StringValue], context: Any) -> StringValue:
        total = 0
        async for request in requests:
            if request.value in ERRORS:
                raise failure(request.value)
            total += len(request.value)
        self.seen.append(f"upload complete {total}")
        return StringValue(value=str(total))

    async def chat(self, requests: AsyncIterator[StringValue], context: Any) -> AsyncIterator[StringValue]:
        async for request in requests:
            if request.value in ERRORS:
                raise failure(request.value)
            yield StringValue(value=request.value.upper())

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        read, write = StringValue.FromString, StringValue.SerializeToString
        return {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary, read, write),
            "Generate": grpc.unary_stream_rpc_method_handler(self.generate, read, None),
            "Write": grpc.unary_stream_rpc_method_handler(self.write, read, None),
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch, read, None),
            "Upload": grpc.stream_unary_rpc_method_handler(self.upload, read, write),
            "Chat": grpc.stream_stream_rpc_method_handler(self.chat, read, write),
        }


MODEL_SERVICE = "headrace.registry.v1.ModelService"


def make_server(options: ServerOptions, *, handle_signals: bool) -> tuple[Server, Probe, Metrics, Shutdown]:
    """Wires a server with the probe and a generated servicer without overridden methods."""
    shutdown, metrics = Shutdown(), Metrics()
    probe = Probe(shutdown)

    def add_services(server: grpc.aio.Server) -> None:
        server.add_registered_method_handlers(SERVICE, probe.handlers())
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(model_service_pb2_grpc.ModelServiceServicer(), server)

    server = Server(
        options,
        service_names=[SERVICE, MODEL_SERVICE],
        add_services=add_services,
        statuses=STATUSES,
        metrics=metrics,
        shutdown=shutdown,
        handle_signals=handle_signals,
    )
    return server, probe, metrics, shutdown


@dataclass
class Running:
    """A started server with a channel to it."""

    server: Server
    probe: Probe
    metrics: Metrics
    shutdown: Shutdown
    channel: grpc.aio.Channel
    log: io.StringIO
    noise: list[dict[str, Any]]

    def unary(self, value: str, **call: Any) -> Any:
        return self._method("unary_unary", "Unary", StringValue.FromString)(StringValue(value=value), **call)

    def stream(self, method: str, value: str, **call: Any) -> Any:
        return self._method("unary_stream", method, None)(StringValue(value=value), **call)

    def upload(self, requests: Any, **call: Any) -> Any:
        return self._method("stream_unary", "Upload", StringValue.FromString)(requests, **call)

    def chat(self, requests: Any = None, **call: Any) -> Any:
        return self._method("stream_stream", "Chat", StringValue.FromString)(requests, **call)

    def _method(self, kind: str, method: str, read: Any) -> Any:
        make = getattr(self.channel, kind)
        return make(f"/{SERVICE}/{method}", StringValue.SerializeToString, read)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    async def rpc_lines(self, n: int = 1) -> list[dict[str, Any]]:
        """Returns the RPC lines once there are `n`; the status reaches the client before the line is written."""
        await eventually(lambda: len([line for line in self.lines() if line["message"] == "rpc"]) >= n)
        return [line for line in self.lines() if line["message"] == "rpc"]

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


async def eventually(condition: Callable[[], bool], *, timeout_s: float = 5.0) -> None:
    """Waits until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the condition may be of a file or another process
            await asyncio.sleep(0.005)


StartServer = Callable[..., Awaitable[Running]]


@pytest.fixture
def log_stream() -> Any:
    """Sends this process's logs to a buffer for the time of a test."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, [(name, logging.getLogger(name).level) for name in ("grpc", "asyncio")]
    stream = io.StringIO()
    logs.configure("debug", stream)
    yield stream
    logging.captureWarnings(capture=False)
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    for name, level in before[2]:
        logging.getLogger(name).setLevel(level)


@pytest_asyncio.fixture
async def probe_server(log_stream: io.StringIO) -> AsyncIterator[StartServer]:
    """Starts servers with the probe; stops them, and fails if asyncio had anything to report."""
    noise: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: noise.append(context))
    running: list[Running] = []

    async def start(*, credentials: grpc.ChannelCredentials | None = None, **options: Any) -> Running:
        settings = ServerOptions(**{"listen": "127.0.0.1:0", "grace_s": 2.0} | options)
        server, probe, metrics, shutdown = make_server(settings, handle_signals=False)
        await server.start()
        arguments = [("grpc.use_local_subchannel_pool", 1)]
        if credentials is None:
            channel = grpc.aio.insecure_channel(server.address, options=arguments)
        else:
            channel = grpc.aio.secure_channel(server.address, credentials, options=arguments)
        running.append(Running(server, probe, metrics, shutdown, channel, log_stream, noise))
        return running[-1]

    yield start
    for each in running:
        await each.channel.close()
        await each.server.stop()
    # grpc.aio's poller outlives the loops of earlier tests and complains about them now and then.
    assert [context for context in noise if "PollerCompletionQueue" not in context["message"]] == []


@pytest.fixture(scope="session")
def canonical_codes() -> dict[str, grpc.StatusCode]:
    """The one canonical code of every reason, as in the comments of `error_reason.proto`."""
    source = (PROTOS / "headrace/common/v1/error_reason.proto").read_text()
    rows = re.findall(r"// ([A-Z_]+): [^\n]*\n  ERROR_REASON_(\w+) = ", source)
    return {reason: grpc.StatusCode[code] for code, reason in rows}


async def _serve(args: argparse.Namespace) -> None:
    server, _, _, _ = make_server(options_from(args), handle_signals=True)
    await server.start()
    await server.wait()
    await server.stop()
    await asyncio.sleep(args.clean_up_s)


def main() -> None:
    """Runs the probe's server as a program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--clean-up-s", type=float, default=0.0, help="how long the service takes after the drain")
    add_common_flags(parser)
    args = parser.parse_args()
    logs.configure(args.log_level, sys.stderr)
    asyncio.run(_serve(args))


if __name__ == "__main__":
    main()
