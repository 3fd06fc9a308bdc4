"""Memory of past loads: devices where a model is not tried for a while, and the bytes it really took."""

from __future__ import annotations

from typing import Any

from headrace_registry.models.models import Failure, Model
from headrace_registry.postgres import statements
from headrace_registry.postgres.rows import failure_of, json_of
from headrace_registry.postgres.server.pool import Connection
from headrace_registry.residency.placement import Backoff
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.scheduling import DeviceView
from headrace_registry.residency.wishes import DeviceKey

BACKOFFS = """
SELECT f.node_id, f.device_id, f.failure, extract(epoch FROM f.retry_time - registry_now())::float8 AS left_s
FROM load_failures f JOIN models m ON m.id = f.model_id
WHERE f.model_id = %(model_id)s AND f.retry_time > registry_now() AND f.load_options = m.load_options
"""
FAILURE_READ = """
SELECT f.n_failures, f.n_deaths,
       extract(epoch FROM registry_now() - f.retry_time)::float8 AS since_retry_s,
       extract(epoch FROM registry_now() - f.death_time)::float8 AS since_death_s
FROM load_failures f JOIN models m ON m.id = f.model_id
WHERE f.model_id = %(model_id)s AND f.node_id = %(node_id)s AND f.device_id = %(device_id)s
  AND f.load_options = m.load_options
"""
FAILURE_WRITE = """
INSERT INTO load_failures (model_id, node_id, device_id, load_options, n_failures, n_deaths, failure, retry_time,
                           death_time)
SELECT id, %(node_id)s, %(device_id)s, load_options, %(n_failures)s, %(n_deaths)s, %(failure)s,
       registry_now() + make_interval(secs => %(backoff_s)s), CASE WHEN %(died)s THEN registry_now() END
FROM models WHERE id = %(model_id)s
ON CONFLICT (model_id, node_id, device_id) DO UPDATE
SET load_options = excluded.load_options, n_failures = excluded.n_failures, n_deaths = excluded.n_deaths,
    failure = excluded.failure, retry_time = excluded.retry_time, fail_time = registry_now(),
    death_time = COALESCE(excluded.death_time, load_failures.death_time)
"""
# A success does not forget deaths: a model that loads and dies in turns has not recovered.
FAILURE_CLEAR = """
UPDATE load_failures SET n_failures = 0, retry_time = registry_now()
WHERE model_id = %(model_id)s AND node_id = %(node_id)s AND device_id = %(device_id)s
"""
# Whatever made loads fail or runners die may have gone with the restart of the node.
FAILURES_FORGIVE = """
UPDATE load_failures SET n_failures = 0, n_deaths = 0, retry_time = LEAST(retry_time, registry_now())
WHERE node_id = %(node_id)s
"""
LEARN = """
INSERT INTO learned_sizes (model_id, load_dtype, quantization, node_id, device_id, device_kind, estimated_bytes,
                           measured_bytes)
SELECT r.model_id, r.load_dtype, m.quantization, r.node_id, r.device_id, d.kind, r.estimated_bytes, r.measured_bytes
FROM residencies r JOIN models m ON m.id = r.model_id JOIN devices d ON d.node_id = r.node_id AND d.id = r.device_id
WHERE r.id = %(id)s AND r.measured_bytes > 0 AND r.estimated_bytes > 0
ON CONFLICT (model_id, load_dtype, quantization, node_id, device_id) DO UPDATE
SET device_kind = excluded.device_kind, estimated_bytes = excluded.estimated_bytes,
    measured_bytes = excluded.measured_bytes, time = registry_now()
"""


Row = dict[str, Any]


async def read_backoffs(conn: Connection, model_id: str) -> dict[DeviceKey, Backoff]:
    """Returns the devices where the model is not to be tried now, by node and device id."""
    rows = await (await conn.execute(BACKOFFS, {"model_id": model_id})).fetchall()
    found = {}
    for row in rows:
        failure = failure_of(row["failure"])
        assert failure is not None
        found[row["node_id"], row["device_id"]] = Backoff(left_s=row["left_s"], failure=failure)
    return found


async def note_failure(conn: Connection, residency: Row, failure: Failure, policy: Policy) -> None:
    """Notes that a load failed: the model is not tried on that device for a time that doubles with each failure."""
    before = await _read_failure(conn, residency)
    recent = before is not None and before["since_retry_s"] < policy.max_backoff_s
    n_failures = (before["n_failures"] if before is not None and recent else 0) + 1
    n_deaths = before["n_deaths"] if before is not None and recent else 0
    backoff_s = policy.failure_backoff_s(n_failures)
    await _write_failure(
        conn, residency, failure, n_failures=n_failures, n_deaths=n_deaths, backoff_s=backoff_s, died=False
    )


async def note_death(conn: Connection, residency: Row, failure: Failure, policy: Policy) -> None:
    """Notes that the runner of a loaded model died.

    The model may load again at once, unless it died before and that death, or this load, was less than
    `death_window_s` ago.
    """
    before = await _read_failure(conn, residency)
    n_deaths = 0
    if before is not None and before["since_death_s"] is not None:
        again = min(before["since_death_s"], residency["age_s"]) < policy.death_window_s
        n_deaths = before["n_deaths"] if again else 0
    backoff_s = policy.failure_backoff_s(n_deaths)
    await _write_failure(conn, residency, failure, n_failures=0, n_deaths=n_deaths + 1, backoff_s=backoff_s, died=True)


async def note_success(conn: Connection, residency: Row) -> None:
    """Notes that a load succeeded: forgets the model's failures on the device and remembers its measured size."""
    await conn.execute(FAILURE_CLEAR, _key(residency))
    await conn.execute(LEARN, {"id": residency["id"]})


async def forgive(conn: Connection, node_id: str) -> None:
    """Notes that a node started anew: every model may be loaded there at once."""
    await conn.execute(FAILURES_FORGIVE, {"node_id": node_id})


class LearnedSizes:
    """The sizes measured when a model was loaded before."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows  # The latest first.

    @classmethod
    async def read(cls, conn: Connection, model: Model) -> LearnedSizes:
        """Reads the sizes of the model in its quantization."""
        parameters = {"model_id": model.id, "quantization": model.quantization}
        return cls(await (await conn.execute(statements.LEARNED, parameters)).fetchall())

    def required_bytes(self, estimate: int, *, node_id: str, device: DeviceView, dtype: str) -> int:
        """Returns the size measured on this device, else the estimate times the ratio measured on one of its kind."""
        alike = [row for row in self._rows if row["device_kind"] == device.kind and row["load_dtype"] == dtype]
        for row in alike:
            if row["node_id"] == node_id and row["device_id"] == device.id:
                return int(row["measured_bytes"])
        if alike:
            return max(1, int(estimate * alike[0]["measured_bytes"] // alike[0]["estimated_bytes"]))
        return estimate


async def _read_failure(conn: Connection, residency: Row) -> Row | None:
    return await (await conn.execute(FAILURE_READ, _key(residency))).fetchone()


async def _write_failure(
    conn: Connection,
    residency: Row,
    failure: Failure,
    *,
    n_failures: int,
    n_deaths: int,
    backoff_s: float,
    died: bool,
) -> None:
    values = {
        **_key(residency),
        "n_failures": n_failures,
        "n_deaths": n_deaths,
        "failure": json_of(failure),
        "backoff_s": backoff_s,
        "died": died,
    }
    await conn.execute(FAILURE_WRITE, values)


def _key(residency: Row) -> Row:
    return {name: residency[name] for name in ("model_id", "node_id", "device_id")}
