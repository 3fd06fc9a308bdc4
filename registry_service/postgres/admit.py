"""Admission in one transaction: locks the devices, reads what is on them, calls the decision, writes it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from registry_service.errors import ModelNotReady, NodeLost, NodeNotFound
from registry_service.memory import estimated_bytes, load_dtype
from registry_service.models import Model, ModelState, Quantization
from registry_service.nodes import DeviceKind
from registry_service.placement import refusal
from registry_service.postgres import queries
from registry_service.postgres.model_store import read_model
from registry_service.postgres.pool import Connection
from registry_service.postgres.residency_moves import move, promote, read_residency
from registry_service.postgres.rows import model_of, occupant_of
from registry_service.residency import Action, Decision, Residency, ResidencyState, Space, decide_placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A model wanted on a device. Empty `node_id` or `device_id`: the registry chooses."""

    model_id: str
    node_id: str = ""
    device_id: str = ""
    actor: str
    if_resident_only: bool = False


async def admit(conn: Connection, wish: Wish) -> Residency:
    """Returns the residency that will serve the wish. Raises what refuses it."""
    model = await _ready_model(conn, wish.model_id)
    devices, epochs = await _lock_devices(conn, wish)
    spaces = await _spaces(conn, model, wish, devices)
    decision = decide_placement(model.id, spaces)
    if decision.action is Action.JOIN:
        await promote(conn, decision.space.node_id, decision.space.device_id)
        joined = await read_residency(conn, decision.joined)
        _check_only_resident(wish, resident=joined.state is ResidencyState.RESIDENT)
        return joined
    _check_only_resident(wish, resident=False)
    if decision.action in (Action.BUSY, Action.TOO_LARGE):
        raise refusal(model.id, decision, spaces)
    return await _place(conn, model, wish, decision, epochs[decision.space.node_id])


async def _place(conn: Connection, model: Model, wish: Wish, decision: Decision, epoch: int) -> Residency:
    space = decision.space
    for victim in decision.victims:
        reason = f"evicted for {model.id}"
        await move(conn, victim, ResidencyState.UNLOADING, reason=reason, actor=wish.actor, new_fence=True)
    loads = decision.action is Action.LOAD
    residency_id = uuid.uuid4().hex
    values = {
        "id": residency_id,
        "model_id": model.id,
        "node_id": space.node_id,
        "device_id": space.device_id,
        "state": ResidencyState.LOADING if loads else ResidencyState.QUEUED,
        "reserved_bytes": space.required_bytes,
        "load_dtype": load_dtype(model.load_options, space.kind),
        "node_epoch": epoch,
        "reason": "asked for" if loads else "waits for memory",
        "actor": wish.actor,
    }
    await conn.execute(queries.RESIDENCY_INSERT, values)
    await conn.execute(queries.RESIDENCY_EVENT, {"id": residency_id})
    return await read_residency(conn, residency_id)


async def _ready_model(conn: Connection, model_id: str) -> Model:
    row = await (await conn.execute(queries.MODEL_KEEP, {"id": model_id})).fetchone()
    model = model_of(row) if row is not None else await read_model(conn, model_id)
    assert model.quantization is Quantization.NONE
    if model.state is not ModelState.READY:
        raise ModelNotReady(
            f"model {model_id!r} is {model.state}; PrepareModel and wait until it is READY",
            metadata={"state": model.state},
            resource=("model", model_id),
        )
    return model


def _check_only_resident(wish: Wish, *, resident: bool) -> None:
    if wish.if_resident_only and not resident:
        raise ModelNotReady(
            f"model {wish.model_id!r} is not resident; LoadModel first, or leave if_resident_only out",
            resource=("model", wish.model_id),
        )


async def _lock_devices(conn: Connection, wish: Wish) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Locks the devices the wish allows; returns those of living nodes, and these nodes' epochs."""
    place = {"node_id": wish.node_id, "device_id": wish.device_id}
    devices = await (await conn.execute(queries.DEVICES_LOCK, place)).fetchall()
    name = "/".join(part for part in (wish.node_id, wish.device_id) if part)
    if name and not devices:
        raise NodeNotFound(name)
    ids = [device["node_id"] for device in devices]
    alive = await (await conn.execute(queries.NODES_ALIVE, {"ids": ids})).fetchall()
    epochs = {row["id"]: row["epoch"] for row in alive}
    if not epochs:
        raise NodeLost(
            f"node {wish.node_id!r} is silent" if wish.node_id else "no node is alive; start an extractor",
            retry_after_s=2.0,
        )
    return [device for device in devices if device["node_id"] in epochs], epochs


async def _spaces(conn: Connection, model: Model, wish: Wish, devices: Sequence[dict[str, Any]]) -> list[Space]:
    place = {"node_id": wish.node_id, "device_id": wish.device_id}
    rows = await (await conn.execute(queries.OCCUPANTS, place)).fetchall()
    required = {kind: await _required_bytes(conn, model, kind) for kind in {DeviceKind(d["kind"]) for d in devices}}
    return [
        Space(
            node_id=device["node_id"],
            device_id=device["id"],
            kind=DeviceKind(device["kind"]),
            capacity_bytes=device["capacity_bytes"],
            required_bytes=required[DeviceKind(device["kind"])],
            occupants=tuple(
                occupant_of(row)
                for row in rows
                if row["node_id"] == device["node_id"] and row["device_id"] == device["id"]
            ),
        )
        for device in devices
    ]


async def _required_bytes(conn: Connection, model: Model, kind: DeviceKind) -> int:
    """What the model took the last time on such a device; before the first load, the estimate."""
    dtype = load_dtype(model.load_options, kind)
    parameters = {"model_id": model.id, "kind": kind, "load_dtype": dtype}
    row = await (await conn.execute(queries.RESIDENCY_LEARNED, parameters)).fetchone()
    return row["measured_bytes"] if row is not None else estimated_bytes(model.parameters_by_dtype, dtype)
