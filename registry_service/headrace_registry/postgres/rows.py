"""Turns rows into values, and values into JSON columns. Events store rows as JSON, where times are text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb

from headrace_models.folder import FileStamp
from headrace_registry.models.models import (
    Architecture,
    Failure,
    Fidelity,
    LayerFidelity,
    Model,
    ModelCard,
    ModelState,
    Quantization,
    Source,
    SourceKind,
    Transfer,
)
from headrace_registry.models.sets import ActivationSet, SetPin, SetReport
from headrace_registry.residency.leases import Lease
from headrace_registry.residency.nodes import Device, DeviceKind, Node, NodeState
from headrace_registry.residency.pins import Pin
from headrace_registry.residency.residency import Occupant, Residency, ResidencyState

Row = Mapping[str, Any]

# A dictionary is faster than a call of the enum, which shows in pages of a thousand models.
_SOURCE_KINDS = {str(kind): kind for kind in SourceKind}
_QUANTIZATIONS = {str(quantization): quantization for quantization in Quantization}
_MODEL_STATES = {str(state): state for state in ModelState}


def model_of(row: Row) -> Model:
    """Reads a row of `models`, or its JSON in an event."""
    return Model(
        id=row["id"],
        source=Source(
            kind=_SOURCE_KINDS[row["source_kind"]], location=row["location"], revision=row["source_revision"]
        ),
        commit_sha=row["commit_sha"],
        quantization=_QUANTIZATIONS[row["quantization"]],
        load_options=row["load_options"],
        labels=row["labels"],
        state=_MODEL_STATES[row["state"]],
        failure=failure_of(row["failure"]),
        transfer=transfer_of(row["transfer"]),
        architecture=Architecture(**row["architecture"]) if row["architecture"] else None,
        n_parameters=row["n_parameters"],
        weight_bytes=row["weight_bytes"],
        parameters_by_dtype=row["parameters_by_dtype"],
        files_path=row["files_path"],
        tokenizer_digest=row["tokenizer_digest"],
        fidelity=fidelity_of(row.get("fidelity")),
        card=ModelCard(**row["card"]) if row.get("card") else None,
        store_bytes=row.get("store_bytes", 0),  # Events of earlier versions lack this column and the next.
        last_used_time=_time(row["last_used_time"]) if row.get("last_used_time") is not None else None,
        revision=row["revision"],
        event_seq=row["event_seq"],
        create_time=_time(row["create_time"]),
        update_time=_time(row["update_time"]),
        files=stamps_of(row.get("files") or ()),
    )


def stamps_of(files: Iterable[Mapping[str, Any]]) -> tuple[FileStamp, ...]:
    """Reads a column of stamps."""
    return tuple(FileStamp(**each) for each in files)


def node_of(row: Row, devices: tuple[Device, ...]) -> Node:
    """Reads a row of `nodes`."""
    return Node(
        id=row["id"],
        address=row["address"],
        epoch=row["epoch"],
        state=NodeState(row["state"]),
        version=row["version"],
        heartbeat_time=row["heartbeat_time"],
        devices=devices,
        memory_bytes=row["memory_bytes"],
        memory_free_bytes=row["memory_free_bytes"],
        runtime_bytes=row["runtime_bytes"],
        max_loads=row["max_loads"],
        max_residents=row["max_residents"],
    )


def device_of(row: Row) -> Device:
    """Reads a row of `devices` with `reserved_bytes`."""
    return Device(
        id=row["id"],
        kind=DeviceKind(row["kind"]),
        name=row["name"],
        capacity_bytes=row["capacity_bytes"],
        free_bytes=row["free_bytes"],
        reserved_bytes=row["reserved_bytes"],
        total_bytes=row["total_bytes"],
        lost_bytes=row["lost_bytes"],
        capability=row["capability"],
        flash_attention=row["flash_attention"],
    )


def residency_of(row: Row) -> Residency:
    """Reads a row of `residencies` with `n_leases`, or its JSON in an event."""
    return Residency(
        id=row["id"],
        model_id=row["model_id"],
        node_id=row["node_id"],
        device_id=row["device_id"],
        state=ResidencyState(row["state"]),
        reserved_bytes=row["reserved_bytes"],
        measured_bytes=row["measured_bytes"],
        fence=row["fence"],
        node_epoch=row["node_epoch"],
        n_leases=row.get("n_leases", 0),  # Events of the first version lack this column.
        reason=row["reason"],
        actor=row["actor"],
        transfer=transfer_of(row["transfer"]),
        failure=failure_of(row["failure"]),
        create_time=_time(row["create_time"]),
        update_time=_time(row["update_time"]),
        last_used_time=_time(row["last_used_time"]),
        queue_position=row.get("queue_position", 0),  # RESIDENCY_IN_FULL alone has this column and the next two.
        pinned=row.get("pinned", False),
        holders=tuple(row.get("holders") or ()),
        # Events of earlier versions lack these two.
        load_begin_time=_time(row["load_begin_time"]) if row.get("load_begin_time") else None,
        resident_time=_time(row["resident_time"]) if row.get("resident_time") else None,
    )


def occupant_of(row: Row) -> Occupant:
    """Reads a row of OCCUPANTS_OF_NODES."""
    return Occupant(
        residency_id=row["id"],
        model_id=row["model_id"],
        device_id=row["device_id"],
        state=ResidencyState(row["state"]),
        reserved_bytes=row["reserved_bytes"],
        queue_seq=row["queue_seq"],
        n_leases=len(row["holders"]),
        n_waiters=row["n_waiters"],
        pinned=row["pinned"],
        pinned_for_good=row["pinned_for_good"],
        age_s=row["age_s"],
        idle_s=row["idle_s"],
        actor=row["actor"],
        holders=tuple(row["holders"]),
    )


def lease_of(row: Row) -> Lease:
    """Reads a row of `leases` with its node."""
    return Lease(
        id=row["id"],
        residency_id=row["residency_id"],
        model_id=row["model_id"],
        holder=row["holder"],
        fence=row["fence"],
        ttl_s=row["ttl_s"],
        expire_time=row["expire_time"],
        node_id=row["node_id"],
        node_address=row["node_address"],
    )


def pin_of(row: Row) -> Pin:
    """Reads a row of `pins`."""
    names = ("model_id", "node_id", "owner", "reason", "expire_time", "create_time")
    return Pin(**{name: row[name] for name in names})


def set_of(row: Row) -> ActivationSet:
    """Reads a row of `activation_sets`."""
    counts, words = (
        ("n_rows", "size_bytes", "complete"),
        ("model_id", "corpus_id", "retention", "path", "identity_json"),
    )
    names = ("id", "node_id", *counts, *words)
    report = SetReport(
        columns=tuple(row["columns"]),
        last_used_time=row["last_used_time"],
        holders=tuple(row["holders"]),
        **{name: row[name] for name in names},
    )
    return ActivationSet(
        report=report, create_time=row["create_time"], update_time=row["update_time"], deleting=row["deleting"]
    )


def set_pin_of(row: Row) -> SetPin:
    """Reads a row of `set_pins`."""
    return SetPin(set_id=row["set_id"], owner=row["owner"], reason=row["reason"], expire_time=row["expire_time"])


def transfer_of(value: dict[str, Any] | None) -> Transfer | None:
    """Reads a JSON column."""
    return Transfer(**value) if value else None


def failure_of(value: dict[str, Any] | None) -> Failure | None:
    """Reads a JSON column. A newer replica may have written more into it."""
    return Failure(reason=value["reason"], message=value["message"]) if value else None


def fidelity_of(value: dict[str, Any] | None) -> Fidelity | None:
    """Reads a JSON column."""
    if not value:
        return None
    return Fidelity(**{**value, "layers": tuple(LayerFidelity(**layer) for layer in value["layers"])})


def json_of(
    value: Transfer | Failure | Architecture | Fidelity | ModelCard | Mapping[str, Any] | None,
) -> Jsonb | None:
    """Makes the parameter for a JSON column."""
    if value is None:
        return None
    if isinstance(value, Failure):  # These two alone: replicas of earlier versions read no others.
        return Jsonb({"reason": value.reason, "message": value.message})
    return Jsonb(dict(value) if isinstance(value, Mapping) else asdict(value))


def _time(value: datetime | str) -> datetime:
    return datetime.fromisoformat(value) if isinstance(value, str) else value
