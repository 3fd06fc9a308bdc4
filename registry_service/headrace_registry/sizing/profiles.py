"""What the estimator knows of a registered model: from its files, from the hub before they are here, or from memory."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from headrace_chassis.errors import ServiceError
from headrace_registry.errors import HubGated, HubUnavailable, ModelNotReady
from headrace_registry.models.models import Model, ModelState, Quantization, SourceKind
from headrace_registry.models.roots import ModelRoots
from headrace_registry.sizing.catalog import CATALOG, Catalog
from headrace_registry.sizing.estimate import Profile, profile_of
from headrace_registry.sizing.headers import Headers, read_headers

_MAX_KEPT = 256
_FRESH_S = 3600.0


class HeaderSource(Protocol):
    """Where the headers of a hub repo come from."""

    async def headers(self, repo_id: str, revision: str) -> Headers:
        """Raises the hub's errors within a deadline."""
        ...


class Profiles:
    """Profiles by model; kept in memory, since files of one commit never change."""

    def __init__(self, *, hub: HeaderSource, roots: ModelRoots, catalog: Catalog = CATALOG) -> None:
        self._hub = hub
        self._roots = roots
        self._catalog = catalog
        self._kept: dict[tuple[str, ...], tuple[float, Profile]] = {}

    async def of(self, model: Model) -> Profile:
        """Raises ModelNotReady for what can't be known yet, and the errors of hub and files."""
        profile = await self._remembered(model)
        return replace(profile, eager=model.load_options.get("attn_implementation") == "eager")

    async def _remembered(self, model: Model) -> Profile:
        # A branch may move; a commit and a folder of the store stay what they are.
        key = (model.source.location, model.commit_sha or model.source.revision, model.files_path)
        now = asyncio.get_running_loop().time()
        kept = self._kept.get(key)
        if kept is not None and (model.commit_sha or now < kept[0] + _FRESH_S):
            return kept[1]
        profile = await self._read(model)
        self._kept[key] = (now, profile)
        while len(self._kept) > _MAX_KEPT:
            self._kept.pop(next(iter(self._kept)))
        return profile

    async def _read(self, model: Model) -> Profile:
        if model.state is ModelState.READY:
            return await self._from_files(model, model.files_path)
        if model.source.kind is SourceKind.HUB:
            return await self._from_hub(model)
        if model.source.kind is SourceKind.FOLDER:
            return await self._from_files(model, model.source.location)
        raise ModelNotReady(
            f"a GGUF file shows its tensors once it is converted; PrepareModel {model.id!r} first",
            resource=("model", model.id),
        )

    async def _from_files(self, model: Model, folder: str) -> Profile:
        check = self._roots.check_inside if model.source.kind is SourceKind.FOLDER else None
        try:
            return (await asyncio.to_thread(read_headers, Path(folder), check)).profile()
        except ServiceError:
            if model.architecture is None or model.quantization is not Quantization.NONE:
                raise
            return profile_of(model.architecture, model.parameters_by_dtype)

    async def _from_hub(self, model: Model) -> Profile:
        repo_id = model.source.location
        try:
            headers = await self._hub.headers(repo_id, model.commit_sha or model.source.revision or "main")
        except (HubGated, HubUnavailable):
            entry = self._catalog.of_repo(repo_id)
            if entry is None:
                raise
            return entry.profile
        return headers.profile()
