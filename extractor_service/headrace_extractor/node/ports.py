"""Ports of a node: each has a real implementation in another room and a fake in the tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from headrace_extractor.errors import Failure, RunnerLost
from headrace_extractor.meters import Transfer
from headrace_extractor.node.runner_protocol import Message
from headrace_extractor.node.values import Build, DesiredState, Device, Machine, ResidencyReport, ValidationReport


class NodeRegistry(Protocol):
    """The registry as a node uses it. Every method may raise RegistryUnavailable, and with `epoch` also EpochStale."""

    async def register(self, address: str, devices: Sequence[Device], machine: Machine) -> tuple[int, float]:
        """Announces this node, which clients reach at `address`; returns the epoch and the heartbeat interval in s."""

    async def heartbeat(self, epoch: int, devices: Sequence[Device], machine: Machine) -> None:
        """Tells that this node is alive, and its free memory."""

    def assignments(self, epoch: int) -> AsyncGenerator[DesiredState, None]:
        """Yields the whole desired state at once and after each change."""

    async def report_residency(self, epoch: int, report: ResidencyReport) -> None:
        """Reports the state of a residency; LeaseLost if its fence is stale."""

    async def report_build(
        self,
        epoch: int,
        build: Build,
        *,
        done: bool,
        transfer: Transfer | None,
        failure: Failure | None,
        fidelity: Mapping[str, Any] | None = None,
    ) -> None:
        """Reports the progress or the end of a build; `fidelity` as in `runner_protocol.Quantized`."""

    async def report_validation(self, epoch: int, report: ValidationReport) -> None:
        """Reports the steps of a validation; StateConflict once it is over in the registry."""


class Runner(Protocol):
    """A process that holds one model."""

    @property
    def busy(self) -> bool:
        """True while a command runs; the next command waits for its end."""

    @property
    def log_tail(self) -> str:
        """The last lines that the process wrote to its standard error."""

    def run(self, command: Message, *, ends: Sequence[type[Message]]) -> AsyncGenerator[Message, None]:
        """Sends a command and yields its events up to one of the types `ends`.

        Raises the error that a `failed` event names, and RunnerLost if the process ends first.
        """

    async def send(self, command: Message) -> None:
        """Sends a command that has no answer of its own, such as `grant`."""

    async def wait(self) -> None:
        """Waits until the process has ended."""

    def lost(self) -> RunnerLost:
        """Returns the error of the process once it has ended."""

    async def kill(self) -> None:
        """Ends the process and waits until it has gone; TimeoutError if it does not."""


class RunnerFactory(Protocol):
    """Starts runners."""

    async def __call__(self, *, environment: Mapping[str, str]) -> Runner:
        """Starts a runner with these environment variables."""
