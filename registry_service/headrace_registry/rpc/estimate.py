"""EstimateMemory: check the request, read model and devices, advise, answer."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from datetime import UTC, datetime

from headrace.registry.v1 import model_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace_registry.inputs import checked_id
from headrace_registry.models.models import Model, NewModel
from headrace_registry.postgres.models.estimates import EstimateStore
from headrace_registry.postgres.models.models import ModelStore
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.sizing.advice import Fit, Line, Placement, advise, recommended
from headrace_registry.sizing.fitting import fitting_quantization
from headrace_registry.sizing.profiles import Profiles
from headrace_registry.sizing.workload import Workload

_FITS = {fit: pb.Fit.Value(f"FIT_{fit}") for fit in Fit}
_DEFAULT_CONTEXT = 1024


class MemoryEstimates:
    """Answers EstimateMemory."""

    def __init__(self, *, models: ModelStore, estimates: EstimateStore, profiles: Profiles) -> None:
        self._models = models
        self._estimates = estimates
        self._profiles = profiles

    async def answer(self, request: pb.EstimateMemoryRequest) -> pb.EstimateMemoryResponse:
        """Reads the model, its tensors and the devices; changes nothing."""
        workload = workload_from_pb(request)
        model = await self._models.get(checked_id(request.model_id, field="model_id"))
        profile = await self._profiles.of(model)
        situation = await self._estimates.situation(model)
        # In a thread: over hundreds of devices it would hold every other call up for a second.
        lines = await asyncio.to_thread(advise, model, profile, workload, situation)
        return pb.EstimateMemoryResponse(
            estimates=[line_to_pb(line) for line in lines], recommended=recommended(lines, profile.stored_dtype)
        )

    async def fitted(self, new: NewModel, fit_bytes: int, *, token: str = "") -> NewModel:
        """Returns the registration with the most exact quantization that fits. Raises ModelTooLarge.

        The bytes are those on the best kind of device that lives, and on a GPU while no node does.
        """
        now = datetime.now(UTC)
        values = {field.name: getattr(new, field.name) for field in fields(new)}
        model = Model(**values, create_time=now, update_time=now)
        kinds = {site.device.kind for site in (await self._estimates.situation(model)).sites}
        kind = next(
            (kind for kind in (DeviceKind.CUDA, DeviceKind.MPS, DeviceKind.CPU) if kind in kinds), DeviceKind.CUDA
        )
        profile = await self._profiles.of(model, token=token)
        chosen = fitting_quantization(profile, new.load_options, fit_bytes, kind, wanted=new.quantization)
        return replace(new, quantization=chosen)


def workload_from_pb(request: pb.EstimateMemoryRequest) -> Workload:
    """Checks a workload; a zero means the default."""
    return Workload(
        batch_size=request.batch_size or 1,
        context_size=request.context_size or _DEFAULT_CONTEXT,
        n_hookpoints=request.n_hookpoints or 1,
    )


def line_to_pb(line: Line) -> pb.MemoryEstimate:
    """Total."""
    parts = line.parts
    return pb.MemoryEstimate(
        quantization=model_pb2.Quantization.Value(f"QUANTIZATION_{line.form.quantization}"),
        dtype=line.form.dtype,
        weight_bytes=parts.weight_bytes,
        overhead_bytes=parts.total_bytes - parts.weight_bytes,
        runtime_bytes=parts.runtime_bytes,
        workload_bytes=parts.workload_bytes,
        total_bytes=parts.total_bytes,
        measured=line.measured,
        fits_on=[
            f"{each.site.node.id}/{each.site.device.id}"
            for each in line.placements
            if each.fit in (Fit.RESIDENT, Fit.FREE)
        ],
        placements=[placement_to_pb(each) for each in line.placements],
    )


def placement_to_pb(placement: Placement) -> pb.Placement:
    """Total."""
    return pb.Placement(
        node_id=placement.site.node.id,
        device_id=placement.site.device.id,
        fit=_FITS[placement.fit],
        required_bytes=placement.parts.total_bytes,
        evicted_model_ids=placement.evicted_model_ids,
        max_batch_size=placement.max_batch_size,
    )
