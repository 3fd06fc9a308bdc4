"""What the core needs from outside, each with a real implementation in a room and a fake in the tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from headrace_extractor.held_set import HeldSet, SetOrders
from headrace_extractor.runner_protocol import Message
from headrace_extractor.values import (
    Build,
    DesiredState,
    Device,
    Failure,
    Lease,
    Machine,
    ModelInfo,
    ResidencyReport,
    Transfer,
    ValidationReport,
)


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


class SetRegistry(Protocol):
    """Activation sets in the registry, as a node sees them. Every method may raise RegistryUnavailable."""

    async def report_set(self, epoch: int, held: HeldSet, *, evict: bool = False) -> SetOrders:
        """Tells what a set of this node holds; with `evict`, asks whether it may go. EpochStale."""

    async def set_orders(self) -> Mapping[str, SetOrders]:
        """What the registry wants of each set that it knows to be here, by id."""


class Models(Protocol):
    """Models and leases, as an extraction needs them. Every method may raise RegistryUnavailable."""

    async def get_model(self, model_id: str) -> ModelInfo:
        """Raises ModelNotFound."""

    def acquire_lease(
        self, model_id: str, *, holder: str, wait_s: float
    ) -> AsyncGenerator[Lease | Transfer | int, None]:
        """Yields queue positions and loading progress, and the lease last."""

    async def renew_lease(self, lease: Lease) -> None:
        """Extends it; LeaseLost once it has expired."""

    async def release_lease(self, lease: Lease) -> None:
        """Ends it."""


class HasDigest(Protocol):
    """A corpus, as far as identity goes."""

    @property
    def digest(self) -> str:
        """SHA-256 over its documents."""

    @property
    def chat(self) -> bool:
        """True when its documents are conversations."""


class Corpora(Protocol):
    """Corpora on this node."""

    def get(self, corpus_id: str) -> HasDigest:
        """Raises CorpusNotFound."""

    def path(self, corpus_id: str) -> Path:
        """Where its documents are."""


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


class Room(Protocol):
    """Room on the disk for sets."""

    async def reserve(
        self, holder: str, folder: Path, *, columns: Sequence[str], n_rows: int, window_bytes: int = 0
    ) -> None:
        """Keeps room for so many rows of a set (or a window) until `release`; evicts what it must. Raises DiskFull."""

    async def fits(self, folder: Path, *, columns: Sequence[str], n_rows: int) -> bool:
        """True if so many rows of a set have room now, beside everything that is there and promised."""

    def release(self, holder: str) -> None:
        """Gives back what a holder reserved and did not use."""

    async def make_room(self, required_bytes: int) -> bool:
        """The disk filled up while a set was written: evicts others; False if there was nothing to evict."""

    def used(self, folder: Path) -> None:
        """Notes that somebody uses the set now."""
