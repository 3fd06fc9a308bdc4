"""Advice on loading a model: the devices that fit each form, the models evicted there, the form to take. Pure."""

from __future__ import annotations

from collections.abc import Sequence
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
    """How well a model fits on a device, the best first."""

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
    """A device of a living node. `runtime_bytes` is the size of an empty runner there, 0 while not measured."""

    node: NodeView
    device: DeviceView
    runtime_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """The size of one earlier load of the model, as the node measured it."""

    node_id: str
    device_id: str
    kind: DeviceKind
    dtype: str
    measured_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The outcome of loading one form on one device."""

    site: Site
    fit: Fit
    parts: Bytes
    measured: bool
    evicted_model_ids: tuple[str, ...]
    max_batch_size: int

    @property
    def rank(self) -> tuple[int, int, int, str, str]:
        """Sort key, the best first: the fit, the kind of device, the batch; ids only for a stable order."""
        node, device = self.site.node, self.site.device
        return _FIT_RANK[self.fit], _KIND_RANK[device.kind], -self.max_batch_size, node.id, device.id


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
    """The state that the advice depends on beside the model: devices, earlier loads (the latest first), policy."""

    sites: Sequence[Site]
    learned: Sequence[Learned] = ()
    policy: Policy

    def measured_bytes(self, model: Model, form: Form, site: Site) -> int:
        """Size of the latest load of this form on the device, or else on another of its kind; 0 without one."""
        if model.quantization is not form.quantization:
            return 0
        alike = [each for each in self.learned if each.kind is site.device.kind and each.dtype == form.dtype]
        here = [each for each in alike if (each.node_id, each.device_id) == (site.node.id, site.device.id)]
        return next((each.measured_bytes for each in (*here, *alike)), 0)


def advise(model: Model, profile: Profile, workload: Workload, situation: Situation) -> tuple[Line, ...]:
    """Returns one line for each form that the model may be loaded in."""
    lines = []
    for form in forms_for(model):
        found = [
            _placement(model, profile, form, workload, situation, site)
            for site in situation.sites
            # Runners refuse float16 on a CPU: it is several times slower there than float32.
            if form.dtype != "float16" or site.device.kind is not DeviceKind.CPU
        ]
        placements = tuple(sorted(found, key=lambda placement: placement.rank))
        if placements:
            parts, measured = placements[0].parts, placements[0].measured
        else:
            parts, measured = estimate(profile, form, kind=DeviceKind.CPU, workload=workload), False
        lines.append(Line(form=form, parts=parts, measured=measured, placements=placements))
    return tuple(lines)


def forms_for(model: Model) -> tuple[Form, ...]:
    """The five usual forms; the quantized forms have the dtype of the model's load options, if they name one."""
    chosen = model.load_options.get("dtype")
    if not isinstance(chosen, str):
        return FORMS
    return tuple(
        form if form.quantization is Quantization.NONE else Form(quantization=form.quantization, dtype=chosen)
        for form in FORMS
    )


def recommended(lines: Sequence[Line], stored_dtype: str) -> int:
    """Index of the most exact line that fits on some device; negative if no line does."""
    fitting = [number for number, line in enumerate(lines) if line.has_room]
    return min(fitting, key=lambda number: (_exactness(lines[number].form, stored_dtype), number), default=-1)


def max_batch_size(profile: Profile, form: Form, workload: Workload, *, kind: DeviceKind, free_bytes: int) -> int:
    """The largest batch that runs in `free_bytes`; 0 if a single sequence needs more."""
    low, high = 0, MAX_BATCH_SIZE
    while low < high:
        middle = (low + high + 1) // 2
        tried = workload.with_batch(middle)
        needed = workload_bytes(profile.network, profile.tally, form, tried, kind=kind, eager=profile.eager)
        low, high = (middle, high) if needed <= free_bytes else (low, middle - 1)
    return low


def _exactness(form: Form, stored_dtype: str) -> int:
    """Smaller is more exact. The half precision of the stored files is more exact than the other one."""
    if form.quantization is not Quantization.NONE:
        return {Quantization.INT8: 3, Quantization.INT4: 4}.get(form.quantization, 5)
    if form.dtype == "float32":
        return 0
    stored = {"F16": "float16"}.get(stored_dtype, "bfloat16")
    return 1 if form.dtype == stored else 2


def _placement(  # noqa: PLR0917 - all of them are what a placement depends on.
    model: Model, profile: Profile, form: Form, workload: Workload, situation: Situation, site: Site
) -> Placement:
    parts = estimate(profile, form, kind=site.device.kind, workload=workload, runtime_bytes=site.runtime_bytes)
    measured_bytes = situation.measured_bytes(model, form, site)
    if measured_bytes:
        parts = parts.corrected(measured_bytes)
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
    # Evictions that the policy plans without this load are not its doing.
    due_anyway = {step.residency_id for step in plan(space.node, policy).steps}
    gone = {
        step.residency_id
        for step in plan_with_candidate(model_id, space, policy).steps
        if step.state in (ResidencyState.UNLOADING, ResidencyState.DRAINING) and step.residency_id not in due_anyway
    }
    return Fit.AFTER_EVICTION, tuple(o.model_id for o in space.node.occupants if o.residency_id in gone)
