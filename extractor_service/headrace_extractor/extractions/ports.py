"""Models, leases and corpora as extractions need them; implemented in other rooms, and by fakes in the tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from headrace_extractor.meters import Transfer
from headrace_extractor.models import ModelInfo
from headrace_extractor.node.values import Lease


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """A place in a queue for a device or a runner; 1: next."""

    position: int


class Models(Protocol):
    """Models and leases in the registry. Every method may raise RegistryUnavailable."""

    async def get_model(self, model_id: str) -> ModelInfo:
        """Raises ModelNotFound."""

    def acquire_lease(
        self, model_id: str, *, holder: str, wait_s: float
    ) -> AsyncGenerator[Lease | Transfer | QueuePosition, None]:
        """Yields queue positions, then the progress of loading, and the lease last."""

    async def renew_lease(self, lease: Lease) -> None:
        """Extends a lease by its time to live. Raises LeaseLost once it has expired."""

    async def release_lease(self, lease: Lease) -> None:
        """Ends a lease."""


class HasDigest(Protocol):
    """A corpus, as far as a set's identity depends on it."""

    @property
    def digest(self) -> str:
        """SHA-256 over its documents."""

    @property
    def chat(self) -> bool:
        """True if its documents are conversations."""

    @property
    def tokenized(self) -> bool:
        """True if its documents are token ids, which need no tokenizer."""


class Corpora(Protocol):
    """Corpora on this node."""

    def get(self, corpus_id: str) -> HasDigest:
        """Raises CorpusNotFound."""

    def path(self, corpus_id: str) -> Path:
        """The folder of its documents."""
