"""What extractions need from outside, each with a real implementation in a room and a fake in the tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Protocol

from headrace_extractor.meters import Transfer
from headrace_extractor.models import ModelInfo
from headrace_extractor.node.values import (
    Lease,
)


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
