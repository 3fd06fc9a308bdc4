"""Reads for EstimateMemory, without locks: living nodes with their residencies, and the sizes that loads measured."""

from __future__ import annotations

from headrace_registry.models.models import Model
from headrace_registry.postgres import statements
from headrace_registry.postgres.rows import occupant_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.residency.leases import MAX_S
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.scheduling import DeviceView, NodeView
from headrace_registry.sizing.advice import Learned, Site, Situation

ALL_LIVING_NODES = "SELECT * FROM nodes WHERE state = 'ALIVE' ORDER BY id"
DEVICES_PRESENT = "SELECT * FROM devices WHERE present AND node_id = ANY(%(node_ids)s) ORDER BY node_id, ordinal, id"


class EstimateStore:
    """Reads the state of all devices for advice: by the time of a load it may have changed."""

    def __init__(self, database: Database, policy: Policy) -> None:
        self._database = database
        self._policy = policy

    async def situation(self, model: Model) -> Situation:
        """Reads everything that advice about a model depends on."""

        async def work(conn: Connection) -> Situation:
            parameters = {"model_id": model.id, "quantization": model.quantization}
            rows = await (await conn.execute(statements.LEARNED, parameters)).fetchall()
            learned = tuple(
                Learned(
                    node_id=row["node_id"],
                    device_id=row["device_id"],
                    kind=DeviceKind(row["device_kind"]),
                    dtype=row["load_dtype"],
                    measured_bytes=row["measured_bytes"],
                )
                for row in rows
            )
            return Situation(sites=await _sites(conn), learned=learned, policy=self._policy)

        return await self._database.run(work)


async def _sites(conn: Connection) -> tuple[Site, ...]:
    living = await (await conn.execute(ALL_LIVING_NODES)).fetchall()
    parameters = {"node_ids": [row["id"] for row in living]}
    devices = await (await conn.execute(DEVICES_PRESENT, parameters)).fetchall()
    occupants = await (
        await conn.execute(statements.OCCUPANTS_OF_NODES, {**parameters, "for_good_s": MAX_S})
    ).fetchall()
    views: dict[str, list[DeviceView]] = {row["id"]: [] for row in living}
    for row in devices:
        view = DeviceView(
            id=row["id"],
            kind=DeviceKind(row["kind"]),
            capacity_bytes=row["capacity_bytes"],
            lost_bytes=row["lost_bytes"],
        )
        views[row["node_id"]].append(view)
    sites = []
    for row in living:
        node = NodeView(
            id=row["id"],
            devices=tuple(views[row["id"]]),
            occupants=tuple(occupant_of(o) for o in occupants if o["node_id"] == row["id"]),
            max_loads=row["max_loads"],
            max_residents=row["max_residents"],
        )
        sites += [Site(node=node, device=view, runtime_bytes=row.get("runtime_bytes", 0)) for view in node.devices]
    return tuple(sites)
