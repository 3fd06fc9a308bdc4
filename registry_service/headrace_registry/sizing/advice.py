"""Where a model would fit in each form, what it would push out, and which form to take. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from headrace_registry.models.models import Model, Quantization
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.placement import Action, Space, decide_on_device, plan_with_candidate
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.residency import ResidencyState
from headrace_registry.residency.scheduling import DeviceView, NodeView, plan
from headrace_registry.sizing.estimate import FORMS, Bytes, Profile, estimate
from headrace_registry.sizing.reservation import load_dtype
from headrace_registry.sizing.tensors import Form
from headrace_registry.sizing.workload import MAX_BATCH_SIZE, Workload, workload_bytes


class Fit(StrEnum):
    """Whether a model has room on a device, the best first."""

    RESIDENT = "RESIDENT"
    FREE = "FREE"
    AFTER_EVICTION = "AFTER_EVICTION"
    BUSY = "BUSY"
    NEVER = "NEVER"


_FITS = {
    Action.JOIN: Fit.RESIDENT,
    Action.LOAD: Fit.FREE,
    Action.WAIT: Fit.AFTER_EVICTION,
    Action.EVICT: Fit.AFTER_EVICTION,
    Action.TOO_LARGE: Fit.NEVER,
}
_ROOM = (Fit.RESIDENT, Fit.FREE, Fit.AFTER_EVICTION)
_FIT_RANK = {fit: rank for rank, fit in enumerate(Fit)}
_KIND_RANK = {DeviceKind.CUDA: 0, DeviceKind.MPS: 1, DeviceKind.CPU: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A device of a living node; `runtime_bytes` is what an empty runner takes there, 0 while not measured."""

    node: NodeView
    device: DeviceView
    runtime_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What a load of the model measured."""

    node_id: str
    device_id: str
    kind: DeviceKind
    dtype: str
    measured_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What loading would mean on one device."""

    site: Site
    fit: Fit
    parts: Bytes
    measured: bool
    evicted_model_ids: tuple[str, ...]
    max_batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One form of a model; `placements` are sorted, the best first."""

    form: Form
    parts: Bytes
    measured: bool
    placements: tuple[Placement, ...]

    @property
    def has_room(self) -> bool:
        """True if it fits somewhere, now or once idle models are evicted."""
        return any(placement.fit in _ROOM for placement in self.placements)


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the advice depends on beside the model: the devices, what was measured before, the policy."""

    sites: Sequence[Site]
    learned: Sequence[Learned] = ()
    policy: Policy


def advise(model: Model, profile: Profile, workload: Workload, situation: Situation) -> tuple[Line, ...]:
    """One line for each form the model may be loaded in."""
    return tuple(_line(model, profile, form, workload, situation) for form in forms_for(model))


def forms_for(model: Model) -> tuple[Form, ...]:
    """The five usual forms; the quantized ones in the dtype that the model's options ask for."""
    chosen = model.load_options.get("dtype")
    if not isinstance(chosen, str):
        return FORMS
    return tuple(
        form if form.quantization is Quantization.NONE else Form(quantization=form.quantization, dtype=chosen)
        for form in FORMS
    )


def recommended(lines: Sequence[Line], stored_dtype: str) -> int:
    """Index of the most exact line with room somewhere; negative if there is none."""
    fitting = [number for number, line in enumerate(lines) if line.has_room]
    return min(fitting, key=lambda number: (_exactness(lines[number].form, stored_dtype), number), default=-1)


def max_batch_size(profile: Profile, form: Form, workload: Workload, *, kind: DeviceKind, free_bytes: int) -> int:
    """The largest batch whose passes fit in `free_bytes`; 0 if not even one sequence does."""
    low, high = 0, MAX_BATCH_SIZE
    while low < high:
        middle = (low + high + 1) // 2
        tried = workload.with_batch(middle)
        needed = workload_bytes(profile.network, profile.tally, form, tried, kind=kind, eager=profile.eager)
        low, high = (middle, high) if needed <= free_bytes else (low, middle - 1)
    return low


def _exactness(form: Form, stored_dtype: str) -> int:
    """Smaller is more exact; half precision is as exact as the files if they are stored in it."""
    if form.quantization is not Quantization.NONE:
        return {Quantization.INT8: 3, Quantization.INT4: 4}.get(form.quantization, 5)
    if form.dtype == "float32":
        return 0
    stored = {"F16": "float16"}.get(stored_dtype, "bfloat16")
    return 1 if form.dtype == stored else 2


def _line(model: Model, profile: Profile, form: Form, workload: Workload, situation: Situation) -> Line:
    found = [
        _placement(model, profile, form, workload, situation, site)
        for site in situation.sites
        if _can_hold(form, site.device.kind)
    ]
    placements = tuple(sorted(found, key=_rank))
    if placements:
        return Line(form=form, parts=placements[0].parts, measured=placements[0].measured, placements=placements)
    parts = estimate(profile, form, kind=DeviceKind.CPU, workload=workload)
    return Line(form=form, parts=parts, measured=False, placements=())


def _can_hold(form: Form, kind: DeviceKind) -> bool:
    """Runners refuse float16 on a CPU: it is several times slower there than float32."""
    return form.dtype != "float16" or kind is not DeviceKind.CPU


def _placement(  # noqa: PLR0917 - all of them are what a placement depends on.
    model: Model, profile: Profile, form: Form, workload: Workload, situation: Situation, site: Site
) -> Placement:
    parts = estimate(profile, form, kind=site.device.kind, workload=workload, runtime_bytes=site.runtime_bytes)
    measured_bytes = _measured_bytes(model, form, site, situation.learned)
    if measured_bytes:
        parts = _corrected(parts, measured_bytes)
    own = model.quantization is form.quantization and load_dtype(model.load_options, site.device.kind) == form.dtype
    space = Space(node=site.node, device=site.device, required_bytes=parts.total_bytes)
    fit, evicted = _fit(model.id if own else "", space, situation.policy)
    rest = site.device.capacity_bytes - site.device.lost_bytes - parts.total_bytes + parts.workload_bytes
    batch = max_batch_size(profile, form, workload, kind=site.device.kind, free_bytes=rest)
    return Placement(
        site=site,
        fit=fit,
        parts=parts,
        measured=bool(measured_bytes),
        evicted_model_ids=evicted,
        max_batch_size=batch,
    )


def _fit(model_id: str, space: Space, policy: Policy) -> tuple[Fit, tuple[str, ...]]:
    action = decide_on_device(model_id, space, policy).action
    if action is not Action.EVICT:
        return _FITS.get(action, Fit.BUSY), ()
    due_anyway = {step.residency_id for step in plan(space.node, policy).steps}
    gone = {
        step.residency_id
        for step in plan_with_candidate(model_id, space, policy).steps
        if step.state in (ResidencyState.UNLOADING, ResidencyState.DRAINING) and step.residency_id not in due_anyway
    }
    return Fit.AFTER_EVICTION, tuple(o.model_id for o in space.node.occupants if o.residency_id in gone)


def _measured_bytes(model: Model, form: Form, site: Site, learned: Iterable[Learned]) -> int:
    """What it took on this device, or else on one of its kind; 0 if it never was on one. The latest are first."""
    if model.quantization is not form.quantization:
        return 0
    alike = [each for each in learned if each.kind is site.device.kind and each.dtype == form.dtype]
    here = [each for each in alike if (each.node_id, each.device_id) == (site.node.id, site.device.id)]
    return next((each.measured_bytes for each in (*here, *alike)), 0)


def _corrected(parts: Bytes, measured_bytes: int) -> Bytes:
    """The measured size stands for weights, buffers and runtime; the runtime is what the others leave of it."""
    weight_bytes = min(parts.weight_bytes, measured_bytes)
    buffer_bytes = min(parts.buffer_bytes, measured_bytes - weight_bytes)
    return Bytes(
        weight_bytes=weight_bytes,
        buffer_bytes=buffer_bytes,
        load_bytes=0,
        runtime_bytes=measured_bytes - weight_bytes - buffer_bytes,
        workload_bytes=parts.workload_bytes,
    )


def _rank(placement: Placement) -> tuple[int, int, int, str, str]:
    device = placement.site.device
    return (
        _FIT_RANK[placement.fit],
        _KIND_RANK[device.kind],
        -placement.max_batch_size,
        placement.site.node.id,
        device.id,
    )
