"""Admission in one transaction: locks the devices, reads what is on them, calls the decision, writes it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from headrace_registry.errors import ModelNotReady, NodeLost, NodeNotFound
from headrace_registry.models.allowances import Allowances
from headrace_registry.models.models import Failure, Model, ModelState
from headrace_registry.postgres import statements
from headrace_registry.postgres.models.models import read_model
from headrace_registry.postgres.residency.failure_memory import LearnedSizes, read_backoffs
from headrace_registry.postgres.residency.node_views import LockedNode, lock_nodes, read_nodes
from headrace_registry.postgres.residency.transitions import plan_and_carry_out, read_residency
from headrace_registry.postgres.rows import model_of
from headrace_registry.postgres.server.pool import Connection
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.placement import Action, Backoff, Decision, Space, decide_placement
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.refusals import refusal
from headrace_registry.residency.residency import Residency, ResidencyState
from headrace_registry.residency.scheduling import DeviceView
from headrace_registry.residency.wishes import DeviceKey, Placed, Wish
from headrace_registry.sizing.reservation import estimated_bytes, load_dtype

RESIDENCY_INSERT = """
INSERT INTO residencies (id, model_id, node_id, device_id, state, reserved_bytes, admitted_bytes, estimated_bytes,
                         load_dtype, fence, node_epoch, reason, actor)
VALUES (%(id)s, %(model_id)s, %(node_id)s, %(device_id)s, 'QUEUED', %(reserved_bytes)s, %(reserved_bytes)s,
        %(estimated_bytes)s, %(load_dtype)s, nextval('residency_fences'), %(node_epoch)s, %(reason)s, %(actor)s)
"""


async def place(
    conn: Connection,
    wish: Wish,
    policy: Policy,
    allowances: Allowances,
    avoid: Mapping[DeviceKey, Failure] | None = None,
) -> Placed:
    """Finds the residency that will serve the wish; the caller then makes itself one of its waiters.

    Raises what refuses it, NotAllowed if code that its load would run is not allowed any more. `avoid` are the places
    where the caller has seen it fail.
    """
    model = await ready_model(conn, wish.model_id)
    nodes = await lock_living(conn, wish)
    spaces = await read_spaces(conn, model, wish, nodes, avoid or {})
    if not spaces:
        raise NodeNotFound("/".join(part for part in (wish.node_id, wish.device_id) if part))
    decision = decide_placement(model.id, spaces, policy)
    if wish.if_resident_only:
        await _check_resident(conn, wish, decision)
    if decision.action.refuses:
        raise refusal(model.id, decision, spaces)
    if decision.joined:
        queued = decision.action is not Action.JOIN
        changed = queued and await plan_and_carry_out(conn, decision.space.node.id, policy, awaited=decision.joined)
        return Placed(residency=await read_residency(conn, decision.joined), changed=changed)
    allowances.check(model.source, model.load_options)
    node = nodes[decision.space.node.id]
    residency = await _line_up(conn, model, decision.space, actor=wish.actor, node=node, policy=policy)
    return Placed(residency=residency, changed=True)


async def _line_up(
    conn: Connection, model: Model, space: Space, *, actor: str, node: LockedNode, policy: Policy
) -> Residency:
    """Puts the model last in the device's queue and does what is due; if it is its turn, it loads."""
    residency_id = uuid.uuid4().hex
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
    await plan_and_carry_out(conn, space.node.id, policy, awaited=residency_id, fresh=True)
    return await read_residency(conn, residency_id)


async def ready_model(conn: Connection, model_id: str) -> Model:
    """Reads a model and keeps it until the transaction ends. Raises ModelNotFound and ModelNotReady."""
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


async def _check_resident(conn: Connection, wish: Wish, decision: Decision) -> None:
    if decision.joined:
        joined = await read_residency(conn, decision.joined)
        if joined.state is ResidencyState.RESIDENT:
            return
    raise ModelNotReady(
        f"model {wish.model_id!r} is not resident; LoadModel first, or leave if_resident_only out",
        resource=("model", wish.model_id),
    )


async def lock_living(conn: Connection, wish: Wish) -> dict[str, LockedNode]:
    """Locks the nodes that the wish allows; returns those that live."""
    place = {"node_id": wish.node_id, "device_id": wish.device_id}
    rows = await (await conn.execute(statements.NODES_OF_PLACE, place)).fetchall()
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
    """The devices that the wish allows, with what the model would take there."""
    learned = await LearnedSizes.read(conn, model)
    backoffs = {place: Backoff(left_s=0.0, failure=failure) for place, failure in avoid.items()}
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
