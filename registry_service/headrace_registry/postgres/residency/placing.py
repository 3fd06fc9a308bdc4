"""Places a model on a device in one transaction: locks the devices, reads them, decides, carries the plan out."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

from headrace_registry.errors import ModelNotReady, NodeLost, NodeNotFound
from headrace_registry.models.allowances import Allowances
from headrace_registry.models.models import Failure, Model, ModelState
from headrace_registry.postgres import statements
from headrace_registry.postgres.models.models import read_model
from headrace_registry.postgres.residency.failure_memory import LearnedSizes, read_backoffs
from headrace_registry.postgres.residency.node_views import LockedNode, lock_nodes, read_nodes
from headrace_registry.postgres.residency.transitions import carry_out_plan, move, read_residency
from headrace_registry.postgres.rows import model_of
from headrace_registry.postgres.server.pool import Connection
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.placement import Backoff, Decision, Space, decide_placement
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.refusals import refusal
from headrace_registry.residency.residency import ResidencyState
from headrace_registry.residency.scheduling import DeviceView, Outcome
from headrace_registry.residency.wishes import DeviceKey, Placed, Wish
from headrace_registry.sizing.reservation import estimated_bytes, load_dtype

RESIDENCY_INSERT = """
INSERT INTO residencies (id, model_id, node_id, device_id, state, reserved_bytes, admitted_bytes, estimated_bytes,
                         load_dtype, fence, node_epoch, reason, actor)
VALUES (%(id)s, %(model_id)s, %(node_id)s, %(device_id)s, 'QUEUED', %(reserved_bytes)s, %(reserved_bytes)s,
        %(estimated_bytes)s, %(load_dtype)s, nextval('residency_fences'), %(node_epoch)s, %(reason)s, %(actor)s)
"""

# The reason of a new residency that has to wait.
_WHY_QUEUED = {
    Outcome.WAIT: "waits for memory on its way back",
    Outcome.EVICT: "waits for what is evicted for it",
    Outcome.QUEUE: "waits for what others hold",
}


async def place(
    conn: Connection,
    wish: Wish,
    policy: Policy,
    allowances: Allowances,
    avoid: Mapping[DeviceKey, Failure] | None = None,
) -> Placed:
    """Finds or makes the residency that will serve the wish; the caller then adds its waiter.

    `avoid` are devices where the caller has seen the load fail. Raises the error of a decision that refuses, and
    NotAllowed if the load would run code that is not allowed any more.
    """
    model = await ready_model(conn, wish.model_id)
    nodes = await lock_living_nodes(conn, wish)
    spaces = await read_spaces(conn, model, wish, nodes, avoid or {})
    if not spaces:
        raise NodeNotFound("/".join(part for part in (wish.node_id, wish.device_id) if part))
    new_id = uuid.uuid4().hex
    decision = decide_placement(model.id, spaces, policy, residency_id=new_id, actor=wish.actor)
    if wish.if_resident_only:
        joined = await read_residency(conn, decision.joined) if decision.joined else None
        if joined is None or joined.state is not ResidencyState.RESIDENT:
            raise ModelNotReady(
                f"model {wish.model_id!r} is not resident; LoadModel first, or leave if_resident_only out",
                resource=("model", wish.model_id),
            )
    if decision.action.refuses:
        raise refusal(model.id, decision, spaces)
    if decision.joined:
        changed = decision.plan is not None and await carry_out_plan(conn, decision.plan)
        return Placed(residency=await read_residency(conn, decision.joined), changed=changed)
    allowances.check(model.source, model.load_options)
    await _line_up(conn, model, decision, new_id, actor=wish.actor, node=nodes[decision.space.node.id])
    return Placed(residency=await read_residency(conn, new_id), changed=True)


async def _line_up(
    conn: Connection, model: Model, decision: Decision, residency_id: str, *, actor: str, node: LockedNode
) -> None:
    """Puts the model last in the device's queue and carries the plan out, by which it may load at once."""
    space, due = decision.space, decision.plan
    assert due is not None
    values = {
        "id": residency_id,
        "model_id": model.id,
        "node_id": space.node.id,
        "device_id": space.device.id,
        "reserved_bytes": space.required_bytes,
        "estimated_bytes": _estimate(model, space.device.kind, node),
        "load_dtype": load_dtype(model.load_options, space.device.kind),
        "node_epoch": node.epoch,
        "reason": "asked for",
        "actor": actor,
    }
    await conn.execute(RESIDENCY_INSERT, values)
    # A load that had to wait for nothing gives the request as its reason, and not the room.
    steps = [replace(step, reason="asked for") if step.residency_id == residency_id else step for step in due.steps]
    await carry_out_plan(conn, replace(due, steps=tuple(steps)))
    outcome = due.outcomes[residency_id]
    if outcome is not Outcome.LOAD:  # The insertion is no event: this transition into QUEUED is the first one.
        await move(conn, residency_id, ResidencyState.QUEUED, reason=_WHY_QUEUED[outcome], actor=actor)


async def ready_model(conn: Connection, model_id: str) -> Model:
    """Reads a READY model and keeps it unchanged until the transaction ends. Raises ModelNotFound, ModelNotReady."""
    row = await (await conn.execute(statements.MODEL_KEEP, {"id": model_id})).fetchone()
    model = model_of(row) if row is not None else await read_model(conn, model_id)
    if row is not None and row["deleting"]:
        raise ModelNotReady(f"model {model_id!r} is being deleted; use another one", resource=("model", model_id))
    if model.state is not ModelState.READY:
        raise ModelNotReady(
            f"model {model_id!r} is {model.state}; PrepareModel and wait until it is READY",
            metadata={"state": model.state},
            resource=("model", model_id),
        )
    return model


async def lock_living_nodes(conn: Connection, wish: Wish) -> dict[str, LockedNode]:
    """Locks the nodes that the wish allows; returns the living ones. Raises NodeNotFound, NodeLost if none lives."""
    allowed = {"node_id": wish.node_id, "device_id": wish.device_id}
    rows = await (await conn.execute(statements.NODES_WITH_DEVICE, allowed)).fetchall()
    name = "/".join(part for part in (wish.node_id, wish.device_id) if part)
    if name and not rows:
        raise NodeNotFound(name)
    node_ids = [row["node_id"] for row in rows]
    await lock_nodes(conn, node_ids)
    nodes = await read_nodes(conn, node_ids)
    if not nodes:
        raise NodeLost(
            f"node {wish.node_id!r} is silent" if wish.node_id else "no node is alive; start an extractor",
            retry_after_s=2.0,
        )
    return nodes


async def read_spaces(
    conn: Connection,
    model: Model,
    wish: Wish,
    nodes: Mapping[str, LockedNode],
    avoid: Mapping[DeviceKey, Failure],
) -> Sequence[Space]:
    """Returns the devices that the wish allows, with the bytes the model would take there and its backoff."""
    learned = await LearnedSizes.read(conn, model)
    # A device is avoided by this call even after its stored backoff is over.
    backoffs = {key: Backoff(left_s=0.0, failure=failure) for key, failure in avoid.items()}
    backoffs |= await read_backoffs(conn, model.id)

    def required_bytes(node: LockedNode, device: DeviceView) -> int:
        estimate = _estimate(model, device.kind, node)
        dtype = load_dtype(model.load_options, device.kind)
        return learned.required_bytes(estimate, node_id=node.view.id, device=device, dtype=dtype)

    return [
        Space(
            node=node.view,
            device=device,
            required_bytes=required_bytes(node, device),
            backoff=backoffs.get((node.view.id, device.id)),
        )
        for node in nodes.values()
        for device in node.view.devices
        if wish.allows(node.view.id, device.id)
    ]


def _estimate(model: Model, kind: DeviceKind, node: LockedNode) -> int:
    return estimated_bytes(
        model.parameters_by_dtype,
        load_dtype(model.load_options, kind),
        architecture=model.architecture,
        quantization=model.quantization,
        kind=kind,
        runtime_bytes=node.runtime_bytes,
    )
