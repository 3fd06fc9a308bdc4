"""One embedded Postgres a session, and a migrated database of its own for every test that asks for `database_url`.

`registry` is a real registry on a free port in this process; `start_registry` starts one in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from headrace.registry.v1 import (
    activation_set_service_pb2_grpc,
    model_service_pb2_grpc,
    node_service_pb2_grpc,
    residency_service_pb2_grpc,
)
from headrace_chassis.server import ServerOptions
from headrace_chassis.shutdown import Shutdown
from headrace_client.rpc.replicas import MAX_RECEIVE_BYTES
from headrace_registry.__main__ import Settings, run
from headrace_registry.postgres.server.embedded import EmbeddedPostgres
from headrace_registry.postgres.server.migrations import migrate, packaged_migrations
from headrace_registry.residency.policy import Policy

# Idle models may be evicted at once.
AT_ONCE = Policy(min_residency_s=0.0)

# A test database need not be durable.
FAST_SETTINGS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")

# As clients set it: pages of rows may be larger than gRPC's default of 4 MiB.
_MESSAGES = ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES)


@contextlib.contextmanager
def temporary_data_dir() -> Iterator[Path]:
    """Makes a folder for an embedded Postgres.

    It is not below `tmp_path`: pytest closes the folder above that to other users, and so to the user of Postgres.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-test-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def initialized() -> Iterator[Path]:
    """A cluster that was started once and stopped: copying it is faster than making another one."""
    with temporary_data_dir() as folder:
        server = EmbeddedPostgres(folder)
        server.start()
        server.stop()
        yield server.pgdata


@pytest.fixture
def data_dir(initialized: Path) -> Iterator[Path]:
    """A data directory of the test's own, with an empty cluster in it."""
    with temporary_data_dir() as folder:
        subprocess.run(["cp", "-a", str(initialized), str(folder)], check=True)
        yield folder


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    with temporary_data_dir() as folder:
        server = EmbeddedPostgres(folder, settings=FAST_SETTINGS)
        server.own()
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def migrated_template(postgres: EmbeddedPostgres) -> str:
    name = "template_headrace"
    with psycopg.connect(postgres.url, autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name}")
    asyncio.run(migrate(url_of(postgres, name), packaged_migrations()))
    return name


@pytest.fixture
def database_url(postgres: EmbeddedPostgres, migrated_template: str) -> Iterator[str]:
    """A migrated, empty database."""
    with fresh_database(postgres, template=migrated_template) as url:
        yield url


@pytest.fixture
def empty_database_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """A database without a table."""
    with fresh_database(postgres, template="template1") as url:
        yield url


@pytest.fixture
def bare_database_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """A database without a table, with the search path that Postgres has by default."""
    with fresh_database(postgres, template="template1", search_path="DEFAULT") as url:
        yield url


@contextlib.contextmanager
def fresh_database(
    postgres: EmbeddedPostgres, *, template: str, search_path: str = "headrace, public"
) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres.url, autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        # For tests that look into the tables over connections of their own.
        conn.execute(f"ALTER DATABASE {name} SET search_path = {search_path}")
        try:
            yield url_of(postgres, name)
        finally:
            conn.execute(f"DROP DATABASE {name} WITH (FORCE)")


def url_of(postgres: EmbeddedPostgres, name: str) -> str:
    return postgres.url.replace("/postgres?", f"/{name}?")


@dataclass
class RegistryStubs:
    """The four services over one channel."""

    channel: grpc.aio.Channel
    models: model_service_pb2_grpc.ModelServiceAsyncStub = field(init=False)
    residencies: residency_service_pb2_grpc.ResidencyServiceAsyncStub = field(init=False)
    nodes: node_service_pb2_grpc.NodeServiceAsyncStub = field(init=False)
    sets: activation_set_service_pb2_grpc.ActivationSetServiceAsyncStub = field(init=False)

    def __post_init__(self) -> None:
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.residencies = residency_service_pb2_grpc.ResidencyServiceStub(self.channel)
        self.nodes = node_service_pb2_grpc.NodeServiceStub(self.channel)
        self.sets = activation_set_service_pb2_grpc.ActivationSetServiceStub(self.channel)


@dataclass
class RunningRegistry:
    """A registry in this process."""

    address: str
    stubs: RegistryStubs
    data_dir: Path
    shutdown: Shutdown
    task: asyncio.Task[None]

    async def stop(self) -> None:
        self.shutdown.begin()
        await asyncio.wait_for(self.task, 15)


StartRegistry = Callable[..., "contextlib.AbstractAsyncContextManager[RunningRegistry]"]


@contextlib.asynccontextmanager
async def running_registry(
    database_url: str,
    data_dir: Path,
    *,
    roots: tuple[Path, ...] = (),
    heartbeat_interval_s: float = 5.0,
    environment: dict[str, str] | None = None,
    policy: Policy = AT_ONCE,
    max_streams: int = 256,
    **more: Any,
) -> AsyncIterator[RunningRegistry]:
    await asyncio.to_thread(data_dir.mkdir, exist_ok=True, parents=True)
    ready_file = data_dir / f"ready-{uuid.uuid4().hex[:8]}"
    shutdown = Shutdown()
    settings = Settings(
        server=ServerOptions(listen="127.0.0.1:0", grace_s=4.0, ready_file=ready_file, max_streams=max_streams),
        data_dir=data_dir,
        database_url=database_url,
        model_roots=roots,
        heartbeat_interval_s=heartbeat_interval_s,
        environment=environment if environment is not None else {**os.environ, "HF_HUB_OFFLINE": "1"},
        policy=policy,
        **more,
    )
    task = asyncio.create_task(run(settings, shutdown=shutdown, handle_signals=False))
    while not ready_file.exists():
        if task.done():
            task.result()
        await asyncio.sleep(0.02)
    address = ready_file.read_text()
    async with grpc.aio.insecure_channel(address, options=[_MESSAGES]) as channel:
        try:
            yield RunningRegistry(address, RegistryStubs(channel), data_dir, shutdown, task)
        finally:
            shutdown.begin()
            await asyncio.wait_for(task, 20)


@pytest_asyncio.fixture
async def registry(database_url: str, tmp_path: Path) -> AsyncIterator[RunningRegistry]:
    """A registry with the test's folder as its model root."""
    async with running_registry(database_url, tmp_path / "data", roots=(tmp_path,)) as started:
        yield started


@dataclass
class RegistryProcess:
    """A registry in a process of its own."""

    process: subprocess.Popen[bytes]
    address: str
    log_path: Path

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def log_lines(self) -> list[dict[str, object]]:
        lines = self.log_path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.fixture
def start_registry(tmp_path: Path, data_dir: Path) -> Iterator[Callable[..., RegistryProcess]]:
    """Starts registries as processes; ends those that still run after the test."""
    started: list[RegistryProcess] = []

    def start(*flags: str, listen: str = "127.0.0.1:0", environment: dict[str, str] | None = None) -> RegistryProcess:
        ready_file = tmp_path / f"ready-{len(started)}"
        log_path = tmp_path / f"registry-{len(started)}.log"
        command = [sys.executable, "-m", "headrace_registry", "--listen", listen, "--data-dir", str(data_dir)]
        with log_path.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--ready-file", str(ready_file), "--grace-s", "4", *flags],
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if name != "DATABASE_URL"} | (environment or {}),
            )
        running = RegistryProcess(process, "", log_path)
        started.append(running)
        deadline = time.monotonic() + 40
        while not ready_file.exists():
            assert process.poll() is None, log_path.read_text()
            assert time.monotonic() < deadline, log_path.read_text()
            time.sleep(0.05)
        running.address = ready_file.read_text()
        return running

    yield start
    for each in started:
        if each.process.poll() is None:
            each.terminate()
    EmbeddedPostgres(data_dir).stop()  # A killed registry leaves its server running.


@dataclass(frozen=True)
class Refusal:
    """The status and details of a failed call."""

    code: grpc.StatusCode
    reason: str
    message: str
    metadata: dict[str, str]
    retry_after_s: float | None
    fields: tuple[str, ...]


def refusal_of(exc: grpc.aio.AioRpcError) -> Refusal:
    status = rpc_status.from_call(exc)
    assert status is not None, exc
    info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    retry_after_s = None
    fields: tuple[str, ...] = ()
    for detail in status.details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
        if detail.Unpack(bad):
            fields = tuple(violation.field for violation in bad.field_violations)
    return Refusal(exc.code(), info.reason, status.message, dict(info.metadata), retry_after_s, fields)


async def refused(call: object) -> Refusal:
    """Awaits a call, or reads a stream, that must fail."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call  # type: ignore[misc]
    except grpc.aio.AioRpcError as exc:
        return refusal_of(exc)
    raise AssertionError("the call succeeded")
