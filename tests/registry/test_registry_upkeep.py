"""Upkeep under load: purges in batches, dead nodes found whatever else fails, one order of locks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid

import psycopg
from psycopg.rows import dict_row

from fix_registry import until
from fix_residency import World
from headrace_chassis.errors import ServiceError
from headrace_chassis.loops import going_on
from headrace_registry.errors import DatabaseUnavailable
from headrace_registry.postgres.models.models import ModelStore
from headrace_registry.postgres.models.validations import ValidationStore
from headrace_registry.postgres.purge import PURGES, Purge
from headrace_registry.postgres.requests import Request
from headrace_registry.postgres.residency.events import EventStore
from headrace_registry.postgres.residency.leases import LEASES_EXPIRE, LeaseStore
from headrace_registry.postgres.residency.nodes import NodeStore
from headrace_registry.postgres.residency.pins import PinStore
from headrace_registry.postgres.residency.residencies import ResidencyStore
from headrace_registry.postgres.residency.upkeep import _MAX_STANDING, ResidencyUpkeep
from headrace_registry.postgres.server.pool import Database
from headrace_registry.postgres.statements import MODEL_LOCK
from headrace_registry.residency.leases import LeaseTerms
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.residency import ResidencyReport, ResidencyState
from headrace_registry.residency.wishes import Wish
from headrace_registry.sizing.reservation import estimated_bytes
from headrace_registry.wakeups import Wakeups
from headrace_registry.workers.lease_wait import LeaseWaits
from headrace_registry.workers.rounds import attempt
from headrace_registry.workers.upkeep import Upkeep

S = ResidencyState
LONG_AGO = "clock_timestamp() - interval '30 days'"
ROWS = f"""
INSERT INTO models (id, identity, source_kind, location, state, parameters_by_dtype)
SELECT 'm' || n, 'm' || n, 'folder', '/m', 'READY', '{{"F32": 100}}' FROM generate_series(1, %(models)s) n;
INSERT INTO nodes (id, address, epoch, boot_nonce, state, heartbeat_time)
SELECT 'n' || n, 'localhost:1', 1, 'b', 'ALIVE', {LONG_AGO} FROM generate_series(1, %(nodes)s) n;
INSERT INTO devices (node_id, id, kind, capacity_bytes)
SELECT 'n' || n, 'cpu', 'CPU', 1000000000 FROM generate_series(1, %(nodes)s) n;
INSERT INTO residencies (id, model_id, node_id, device_id, state, reserved_bytes, load_dtype, node_epoch, reason, actor,
                         update_time)
SELECT 'r' || n, 'm1', 'n1', 'cpu', 'UNLOADED', 1, 'float32', 1, 'test', 'test', {LONG_AGO}
FROM generate_series(1, %(residencies)s) n;
INSERT INTO leases (id, residency_id, model_id, holder, fence, ttl_s, state, expire_time, end_time)
SELECT 'l' || n, 'r' || (n %% %(residencies)s + 1), 'm1', 'h', 1, 60, 'RELEASED', {LONG_AGO}, {LONG_AGO}
FROM generate_series(1, %(leases)s) n;
INSERT INTO requests (request_id, method, arguments, response, create_time)
SELECT n::text, 'LoadModel', '', '', {LONG_AGO} FROM generate_series(1, %(requests)s) n;
INSERT INTO model_events (model_id, seq, time, message, model)
SELECT 'm1', -n, {LONG_AGO}, 'old', '{{}}' FROM generate_series(1, %(requests)s) n;
INSERT INTO validation_attempts (id, model_id, node_id, device_id, node_epoch, load_options, quantization,
                                 reserved_bytes, done, held, expire_time)
SELECT 'a' || n, 'm1', 'n1', 'cpu', 1, '{{}}', 'NONE', 1, true, false, {LONG_AGO} FROM generate_series(1, 130) n;
ANALYZE
"""


@contextlib.asynccontextmanager
async def opened(url, **options):
    database = Database(url, **options)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


def fill(url, *, models=1, nodes=1, residencies=1, leases=1, requests=1):
    counts = {"models": models, "nodes": nodes, "residencies": residencies, "leases": leases, "requests": requests}
    with psycopg.connect(url, autocommit=True, row_factory=dict_row) as conn:
        for statement in ROWS.split(";"):
            conn.execute(statement, counts if "%(" in statement else None)


def count(url, table, where="true"):
    with psycopg.connect(url) as conn:
        return conn.execute(f"SELECT count(*) FROM {table} WHERE {where}").fetchone()[0]


def upkeep_of(database, **stores):
    wakeups, policy = Wakeups(), Policy()
    chosen = {
        "leases": LeaseStore(database, wakeups),
        "nodes": NodeStore(database, wakeups),
        "residencies": ResidencyUpkeep(database, wakeups, policy),
        "pins": PinStore(database, wakeups),
        "validations": ValidationStore(database, wakeups, policy),
        "purge": Purge(database, EventStore(database)),
        **stores,
    }
    return Upkeep(heartbeat_interval_s=0.1, **chosen)


# -- purges ------------------------------------------------------------------------------------------------------------


async def test_a_purge_of_many_rows_is_many_short_transactions(database_url):
    fill(database_url, residencies=1500, leases=5000, requests=1200)
    async with opened(database_url, deadline_s=2.0) as database:
        await Purge(database, EventStore(database, keep=0)).run()

    tables = ("residencies", "leases", "requests", "model_events", "validation_attempts")
    assert {table: count(database_url, table) for table in tables} == {
        "residencies": 0,
        "leases": 0,
        "requests": 0,
        "model_events": 0,
        "validation_attempts": 100,
    }


def test_rows_of_a_residency_and_old_rows_are_found_by_indexes(database_url):
    fill(database_url, residencies=3000, leases=20_000, requests=5000)
    expected = {
        PURGES["requests"]: "requests_by_age",
        PURGES["leases"]: "leases_ended",
        PURGES["residencies"]: "residencies_ended",
        PURGES["model_events"]: "model_events_by_time",
        LEASES_EXPIRE: "leases_running",
        "DELETE FROM leases WHERE residency_id = 'r1'": "leases_of_residency",
    }
    with psycopg.connect(database_url) as conn:
        for statement, index in expected.items():
            plan = conn.execute("EXPLAIN " + statement, {"limit": 500} if "%(" in statement else None).fetchall()
            assert index in "\n".join(line for (line,) in plan), plan


async def test_a_model_with_a_long_history_is_deleted_at_once(database_url):
    fill(database_url, residencies=1000, leases=30_000)
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("UPDATE validation_attempts SET held = false")
    async with opened(database_url, deadline_s=5.0) as database:
        request = Request(request_id="", method="DeleteModel", arguments=())
        await ModelStore(database, Wakeups()).delete("m1", force=False, etag="", actor="test", request=request)

    assert count(database_url, "leases") == 0


# -- dead nodes --------------------------------------------------------------------------------------------------------


class Failing:
    """Steps that fail in ways that nothing foresaw, or never end."""

    async def purge(self):
        raise RuntimeError("a bug in the pins")

    async def tidy(self):
        await asyncio.sleep(600)

    async def run(self):
        raise psycopg.errors.UndefinedColumn("a purge that fails")


async def test_silent_nodes_are_found_while_every_other_step_fails_or_hangs(database_url, caplog):
    fill(database_url, nodes=3)
    failing, failures = Failing(), []
    async with opened(database_url) as database:
        stores = {"pins": failing, "validations": failing, "residencies": failing, "purge": failing}
        upkeep = upkeep_of(database, failed=failures.append, **stores)
        running = asyncio.create_task(upkeep.run())
        await until(lambda: count(database_url, "nodes", "state = 'LOST'") == 3)
        running.cancel()

    assert {"Failing.purge", "Failing.run"} <= set(failures)


async def test_one_node_that_can_not_be_lost_keeps_no_other_from_it(database_url):
    fill(database_url, nodes=5)
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF NEW.id = 'n1' AND NEW.state = 'LOST' THEN RAISE EXCEPTION 'broken row'; END IF; RETURN NEW; END $$"
        )
        conn.execute("CREATE TRIGGER refuse BEFORE UPDATE ON nodes FOR EACH ROW EXECUTE FUNCTION refuse()")
    now, failures = iter(range(100)), []
    async with opened(database_url) as database:
        upkeep = upkeep_of(database, failed=failures.append, clock=lambda: next(now) * 0.1)
        for _ in range(6):
            await upkeep.lose_silent()

    assert count(database_url, "nodes", "state = 'LOST'") == 4
    assert "lose_silent" in failures


async def test_a_hundred_nodes_that_fall_silent_at_once_are_a_transaction_each(database_url):
    fill(database_url, nodes=100)
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(
            "INSERT INTO residencies (id, model_id, node_id, device_id, state, reserved_bytes, load_dtype, node_epoch, "
            "reason, actor) SELECT 'x' || n, 'm1', 'n' || n, 'cpu', 'RESIDENT', 1, 'float32', 1, 't', 't' "
            "FROM generate_series(1, 100) n"
        )
        before = conn.execute("SELECT count(DISTINCT xmin::text) FROM nodes").fetchone()[0]
    now = iter(range(1000))
    async with opened(database_url) as database:
        upkeep = upkeep_of(database, clock=lambda: next(now) * 0.1)
        for _ in range(5):
            await upkeep.lose_silent()

    assert before == 1
    with psycopg.connect(database_url) as conn:
        assert conn.execute("SELECT count(DISTINCT xmin::text) FROM nodes").fetchone() == (100,)
    assert count(database_url, "residencies", "state = 'LOST' AND state_when_lost = 'RESIDENT'") == 100
    assert count(database_url, "residency_events", "state = 'LOST'") == 100


async def test_no_error_of_a_round_ends_a_loop(caplog):
    rounds, failures = [], []

    async def run():
        rounds.append(1)
        raise ExceptionGroup("a task of the loop", [RuntimeError("a bug")])

    task = asyncio.create_task(going_on(run, name="loop", pause_s=0.01, failed=failures.append))
    await until(lambda: len(rounds) >= 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert task.cancelled()
    assert failures[0] == "loop"
    assert "a bug" in caplog.text


async def test_a_database_that_is_away_is_no_failure_to_count(caplog):
    failures = []

    async def step():
        raise DatabaseUnavailable("away", retry_after_s=1.0)

    assert not await attempt("step", step, failures.append)
    assert failures == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


# -- places in line ----------------------------------------------------------------------------------------------------


async def test_every_standing_place_gets_its_turn(database_url):
    async with opened(database_url) as database:
        upkeep = ResidencyUpkeep(database, Wakeups(), Policy())
        rows = [{"id": str(n)} for n in range(3 * _MAX_STANDING + 5)]
        rounds = [upkeep._next_standing(rows) for _ in range(4)]

    assert [each["id"] for each in rounds[1]][:1] == [str(_MAX_STANDING)]
    assert {each["id"] for chosen in rounds for each in chosen} == {each["id"] for each in rows}
    assert max(len(chosen) for chosen in rounds) == _MAX_STANDING
    assert upkeep._next_standing([{"id": "gone"}]) == [{"id": "gone"}]


# -- locks -------------------------------------------------------------------------------------------------------------


def test_a_report_of_a_failed_load_does_not_wait_for_a_change_of_its_model(database_url):
    """The report holds the device and writes a row that refers to the model; the change holds the model."""
    world = World(database_url, Policy(min_residency_s=0.0))
    try:
        world.start_node("n", {"cpu": 10**9})
        world.add_model("a", 100)
        world.load("a")
        [loading] = world.assignments("n")
        world.run(world._conn.execute("SET lock_timeout = '2s'"))
        with psycopg.connect(database_url) as conn:
            conn.execute(MODEL_LOCK, {"id": "a"})
            world.fails(loading)
            conn.rollback()

        assert world.latest("a")["state"] == "FAILED"
    finally:
        world.close()


async def test_calls_on_the_same_models_from_all_sides_do_not_deadlock(database_url):  # noqa: C901 - one call a case.
    """Loads, leases, changes, forced unloads, plans, losses and reports at once."""
    fill(database_url, models=3, nodes=2)
    with psycopg.connect(database_url, autocommit=True) as conn:
        two = estimated_bytes({"F32": 100}, "float32") * 5 // 2
        conn.execute("UPDATE devices SET capacity_bytes = %s", (two,))
    end = time.monotonic() + 5.0
    async with opened(database_url, max_connections=20) as database:
        wakeups, policy = Wakeups(), Policy(min_residency_s=0.0, backoff_s=0.0, max_backoff_s=0.0, max_wait_s=0.0)
        residencies, nodes = ResidencyStore(database, wakeups, policy), NodeStore(database, wakeups)
        models, leases = ModelStore(database, wakeups), LeaseStore(database, wakeups, policy)
        upkeep, chance = ResidencyUpkeep(database, wakeups, policy), random.Random(1)
        waits = LeaseWaits(residencies=residencies, wakeups=wakeups)
        unremembered = Request(request_id="", method="test", arguments=())

        async def follow(node_id):
            await nodes.hear(node_id, 1)
            desired = await nodes.desired(node_id, 1)
            for told, _ in desired.assignments if desired is not None else ():
                state = S.UNLOADED if told.state in (S.UNLOADING, S.DRAINING) else S.RESIDENT
                state = S.FAILED if chance.random() < 0.2 else state
                given = {"node_id": node_id, "epoch": 1, "fence": told.fence}
                await residencies.report(ResidencyReport(residency_id=told.id, state=state, **given))

        async def lease(model_id):
            wish, terms = Wish(model_id=model_id, actor="test"), LeaseTerms(holder="test", ttl_s=1.0)
            steps = waits.acquire(wish, terms, waiter_id=uuid.uuid4().hex, wait_s=0.5)
            async with contextlib.aclosing(steps):
                async for progress in steps:
                    if progress.lease is not None:
                        await leases.release(progress.lease.id, progress.lease.fence)

        async def once(step, model_id, node_id):
            match step:
                case "follow":
                    await follow(node_id)
                case "lease":
                    await lease(model_id)
                case "update":
                    labels = {"n": str(chance.random())}
                    await models.update(model_id, labels=labels, load_options=None, etag="", request=unremembered)
                case "unload":
                    given = {"node_id": "", "force": True, "actor": "test", "request": unremembered}
                    await residencies.unload(model_id, **given)
                case "tidy":
                    await upkeep.tidy()
                    await leases.expire()
                case "lose":
                    await nodes.lose(node_id, 0.3)

        async def keep(step):
            n_done = 0
            while time.monotonic() < end:
                with contextlib.suppress(ServiceError):
                    await once(step, f"m{chance.randint(1, 3)}", f"n{chance.randint(1, 2)}")
                    n_done += 1
                await asyncio.sleep(0)
            return n_done

        steps = ["follow"] * 3 + ["lease"] * 5 + ["update"] * 3 + ["unload", "tidy", "lose"]
        done = await asyncio.gather(*map(keep, steps))

    assert min(done) > 0
    with psycopg.connect(database_url) as conn:
        [n_deadlocks] = conn.execute(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        ).fetchone()
    assert n_deadlocks == 0
