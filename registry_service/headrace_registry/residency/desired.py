"""The desired state of a node: models to hold in memory, files to build, models to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace_registry.models.builds import BuildKind
from headrace_registry.models.models import Model
from headrace_registry.residency.residency import Residency


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Files a node shall make in the folder `target_path`; `source_path` is empty for a GGUF file."""

    kind: BuildKind
    model: Model
    target_path: str
    source_path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """A model that a node shall try to load and run, with load options that may differ from the model's own."""

    attempt_id: str
    model: Model
    device_id: str
    load_options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """Everything a node shall hold, build and try."""

    assignments: tuple[tuple[Residency, Model], ...]
    builds: tuple[Build, ...] = ()
    validations: tuple[Validation, ...] = ()

    def key(self) -> tuple[object, ...]:
        """Returns a value that is equal for states that ask the same of the node; progress of loads is not in it."""
        held = tuple((residency.id, residency.fence, residency.state) for residency, _ in self.assignments)
        builds = tuple((build.kind, build.model.id, build.target_path, build.source_path) for build in self.builds)
        return held, builds, tuple(validation.attempt_id for validation in self.validations)
