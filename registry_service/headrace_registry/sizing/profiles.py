"""Profiles of registered models: from their files, or from the hub before the files are downloaded."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from headrace_chassis.confined.in_process import IN_PROCESS
from headrace_chassis.confined.ports import Confinement
from headrace_chassis.errors import ServiceError
from headrace_registry.errors import HubGated, HubUnavailable, ModelNotReady
from headrace_registry.models.files import PARSE_LIMITS, unreadable
from headrace_registry.models.models import Model, ModelState, Quantization, SourceKind
from headrace_registry.models.roots import ModelRoots
from headrace_registry.sizing.catalog import CATALOG, Catalog
from headrace_registry.sizing.estimate import Profile, profile_of
from headrace_registry.sizing.headers import profile_from_json, told_profile

_MAX_KEPT = 256
# A branch that moves is noticed after an hour at most.
_FRESH_S = 3600.0


class HeaderSource(Protocol):
    """Reads headers of hub repos."""

    async def profile(self, repo_id: str, revision: str, *, token: str = "") -> Profile:
        """Returns the profile of a revision. Raises the hub's errors, HubUnavailable at a deadline."""
        ...


class Profiles:
    """Profiles by model; kept in memory, since files of one commit never change."""

    def __init__(
        self, *, hub: HeaderSource, roots: ModelRoots, catalog: Catalog = CATALOG, confinement: Confinement = IN_PROCESS
    ) -> None:
        self._confinement = confinement
        self._hub = hub
        self._roots = roots
        self._catalog = catalog
        self._kept: dict[tuple[str, ...], tuple[float, Profile]] = {}

    async def of(self, model: Model, *, token: str = "") -> Profile:
        """Returns a model's profile. Raises ModelNotReady for an unconverted GGUF file, and errors of hub and files."""
        # A branch may move; a commit and a folder of the store never change.
        key = (model.source.location, model.commit_sha or model.source.revision, model.files_path)
        now = asyncio.get_running_loop().time()
        kept = self._kept.get(key)
        if kept is not None and (model.commit_sha or now < kept[0] + _FRESH_S):
            profile = kept[1]
        else:
            profile = await self._read(model, token)
            self._kept[key] = (now, profile)
            while len(self._kept) > _MAX_KEPT:
                self._kept.pop(next(iter(self._kept)))
        # Not part of the key: the load options of a model may change while its files stay.
        return replace(profile, eager=model.load_options.get("attn_implementation") == "eager")

    async def _read(self, model: Model, token: str) -> Profile:
        source = model.source
        if model.state is ModelState.READY:
            return await self._from_files(model, model.files_path)
        if source.kind is SourceKind.FOLDER:
            return await self._from_files(model, source.location)
        if source.kind is SourceKind.GGUF:
            raise ModelNotReady(
                f"a GGUF file shows its tensors once it is converted; PrepareModel {model.id!r} first",
                resource=("model", model.id),
            )
        try:
            revision = model.commit_sha or source.revision or "main"
            return await self._hub.profile(source.location, revision, token=token)
        except (HubGated, HubUnavailable):
            # The catalog has the numbers of curated models, also offline and for gated repos.
            entry = self._catalog.of_repo(source.location)
            if entry is None:
                raise
            return entry.profile

    async def _from_files(self, model: Model, folder: str) -> Profile:
        roots = self._roots.paths if model.source.kind is SourceKind.FOLDER else None
        try:
            told = await self._confinement.call(
                told_profile,
                {"folder": folder, "roots": roots},
                refuse=unreadable(Path(folder).name),
                limits=PARSE_LIMITS,
            )
            return profile_from_json(told)
        except ServiceError:  # Files lost or moved; the inspection's numbers are in the database.
            if model.architecture is None or model.quantization is not Quantization.NONE:
                raise
            return profile_of(model.architecture, model.parameters_by_dtype)
