"""What a node needs from outside, each with a real implementation in a room and a fake in the tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from headrace_extractor.errors import Failure
from headrace_extractor.meters import Transfer
from headrace_extractor.node.runner_protocol import Message
from headrace_extractor.node.values import Build, DesiredState, Device, Machine, ResidencyReport, ValidationReport


class NodeRegistry(Protocol):
    """The registry as a node sees it. Every method may raise RegistryUnavailable; those with `epoch`, EpochStale."""

    async def register(self, devices: Sequence[Device], machine: Machine) -> tuple[int, float]:
        """Announces this node; returns the epoch and the heartbeat interval in seconds."""

    async def heartbeat(self, epoch: int, devices: Sequence[Device], machine: Machine) -> None:
        """Tells that this node lives and what it has free."""

    def assignments(self, epoch: int) -> AsyncGenerator[DesiredState, None]:
        """Yields the whole desired state at once and after each change."""

    async def report_residency(self, epoch: int, report: ResidencyReport) -> None:
        """Tells how a residency stands; LeaseLost if the fence is stale."""

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
        """Tells how a build stands; `fidelity` as in `runner_protocol.Quantized`."""

    async def report_validation(self, epoch: int, report: ValidationReport) -> None:
        """Tells how a validation stands; StateConflict once it is over."""


class Runner(Protocol):
    """A process that holds one model."""

    @property
    def busy(self) -> bool:
        """True while a command runs; the next one waits for its end."""

    def run(self, command: Message, *, ends: Sequence[type[Message]]) -> AsyncGenerator[Message, None]:
        """Sends a command, yields its events up to one of `ends`; raises what `failed` says, or RunnerLost."""

    async def send(self, command: Message) -> None:
        """Sends a command that has no answer of its own."""

    async def wait(self) -> None:
        """Waits until the process has ended."""

    async def kill(self) -> None:
        """Ends the process and waits until it has gone; TimeoutError if it does not."""


class RunnerFactory(Protocol):
    """Starts runners."""

    async def __call__(self, *, environment: Mapping[str, str]) -> Runner:
        """Starts one."""
