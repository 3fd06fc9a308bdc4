"""What a node shall hold, build and try."""

from __future__ import annotations

from dataclasses import dataclass

from headrace_registry.models.models import Model
from headrace_registry.residency.residency import Residency


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Files a node shall make, quantized from the folder `source_path`; converted if the model is not quantized."""

    model: Model
    target_path: str
    source_path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """A model a node shall try, with the options to try."""

    attempt_id: str
    model: Model
    device_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """All a node shall hold, build and try."""

    assignments: tuple[tuple[Residency, Model], ...]
    builds: tuple[Build, ...] = ()
    validations: tuple[Validation, ...] = ()

    def key(self) -> tuple[object, ...]:
        """Equal keys ask the same of the node."""
        held = tuple((residency.id, residency.fence, residency.state) for residency, _ in self.assignments)
        builds = tuple((build.model.id, build.target_path, build.source_path) for build in self.builds)
        return held, builds, tuple(validation.attempt_id for validation in self.validations)
