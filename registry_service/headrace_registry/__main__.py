"""Wires the registry together and runs it: database, migrations, loops, server.

`python -m headrace_registry --data-dir DIR`. No other module reads the environment.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import grpc

from headrace.registry.v1 import (
    activation_set_service_pb2_grpc,
    model_service_pb2_grpc,
    node_service_pb2_grpc,
    residency_service_pb2_grpc,
)
from headrace_chassis import descriptors, logs
from headrace_chassis.confined.pool import Confined
from headrace_chassis.data_folder import make_private
from headrace_chassis.errors import ServiceError, StartError
from headrace_chassis.flags import add_common_flags, options_from
from headrace_chassis.folders import usable_folder
from headrace_chassis.loops import going_on
from headrace_chassis.metrics import Metrics
from headrace_chassis.places import Limits, OwnPlaces
from headrace_chassis.server import Server, ServerOptions
from headrace_chassis.shutdown import Shutdown
from headrace_chassis.start import exit_status
from headrace_registry.errors import FieldInvalid
from headrace_registry.hub.client import HubClient
from headrace_registry.hub.headers import HubHeaders
from headrace_registry.models.allowances import NOTHING_ALLOWED, Allowances
from headrace_registry.models.folders import ModelFolders
from headrace_registry.models.identifiers import checked_repo
from headrace_registry.models.roots import ModelRoots
from headrace_registry.postgres.models.corpora import CorpusStore
from headrace_registry.postgres.models.estimates import EstimateStore
from headrace_registry.postgres.models.folders import FolderStore
from headrace_registry.postgres.models.models import ModelStore
from headrace_registry.postgres.models.preparations import PreparationStore
from headrace_registry.postgres.models.records import RecordStore
from headrace_registry.postgres.models.sets import SetStore
from headrace_registry.postgres.models.validations import ValidationStore
from headrace_registry.postgres.purge import Purge
from headrace_registry.postgres.residency.events import EventStore
from headrace_registry.postgres.residency.leases import LeaseStore
from headrace_registry.postgres.residency.nodes import NodeStore
from headrace_registry.postgres.residency.pins import PinStore
from headrace_registry.postgres.residency.residencies import ResidencyStore
from headrace_registry.postgres.residency.upkeep import ResidencyUpkeep
from headrace_registry.postgres.server.connect import migrate_when_reachable
from headrace_registry.postgres.server.embedded import EmbeddedPostgres
from headrace_registry.postgres.server.keeper import Keeper
from headrace_registry.postgres.server.listener import Listener
from headrace_registry.postgres.server.pool import DEFAULT_CONNECTIONS, Database
from headrace_registry.residency.policy import POLICY_HELP, Policy
from headrace_registry.rpc.estimate import MemoryEstimates
from headrace_registry.rpc.model_servicer import ModelServicer
from headrace_registry.rpc.node_servicer import NodeServicer
from headrace_registry.rpc.residency_servicer import ResidencyServicer
from headrace_registry.rpc.set_servicer import SetServicer
from headrace_registry.rpc.status import STATUSES, reason_of
from headrace_registry.sizing.profiles import Profiles
from headrace_registry.wakeups import POLL_S, Wakeups
from headrace_registry.workers.deletion import Deletions
from headrace_registry.workers.freshness import Freshness
from headrace_registry.workers.health import HealthWatch
from headrace_registry.workers.lease_wait import LeaseWaits
from headrace_registry.workers.preparation import Preparer
from headrace_registry.workers.rounds import FailureCount, Worker
from headrace_registry.workers.storekeeper import Storekeeper
from headrace_registry.workers.upkeep import Upkeep

log = logging.getLogger("headrace_registry")

SERVICES = tuple(
    f"headrace.registry.v1.{name}"
    for name in ("ModelService", "ResidencyService", "NodeService", "ActivationSetService")
)

# Nodes, which hold a stream each, and calls that wait for a lease take no places of others, nor lose theirs to them.
OWN_PLACES = (
    OwnPlaces(prefix="/headrace.registry.v1.NodeService/", limits=Limits(max_rpcs=8192, max_streams=4096)),
    OwnPlaces(
        prefix="/headrace.registry.v1.ResidencyService/AcquireLease", limits=Limits(max_rpcs=1024, max_streams=1024)
    ),
)

DEFAULT_QUOTA_BYTES = 50 * 10**9


class PolicyInvalid(StartError):
    """A number of the residency policy is out of range."""


class RootInvalid(StartError):
    """A `--models-root` is no folder."""


class RepoInvalid(StartError):
    """A flag's value can't be the id of a hub repo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings from the command line and the environment."""

    server: ServerOptions
    data_dir: Path
    database_url: str  # Empty: embedded.
    model_roots: tuple[Path, ...]
    heartbeat_interval_s: float
    environment: Mapping[str, str]
    policy: Policy = field(default_factory=Policy)
    models_quota_bytes: int = DEFAULT_QUOTA_BYTES
    allowances: Allowances = NOTHING_ALLOWED
    poll_s: float = POLL_S
    database_connections: int = DEFAULT_CONNECTIONS


def main() -> int:
    """Runs until a signal; returns the exit status."""
    args = _parser().parse_args()
    logs.configure(args.log_level, sys.stderr)
    descriptors.raise_limit()
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # Calls without a connection fail, and say why.

    def serve() -> None:
        make_private(args.data_dir)
        asyncio.run(run(_settings(args, os.environ), shutdown=Shutdown()))

    return exit_status("registry", serve)


async def run(settings: Settings, *, shutdown: Shutdown, handle_signals: bool = True) -> None:
    """Serves until a signal or the shutdown. Raises StartError."""
    keeper: Keeper | None = None
    async with contextlib.AsyncExitStack() as stack:
        url = settings.database_url
        if not url:
            embedded = EmbeddedPostgres(settings.data_dir)
            await asyncio.to_thread(embedded.own)
            # Before the start, so that a start that fails halfway leaves no server.
            stack.push_async_callback(asyncio.to_thread, embedded.stop)
            await asyncio.to_thread(embedded.start)
            keeper, url = Keeper(embedded), embedded.url
        await migrate_when_reachable(url)
        database = Database(
            url,
            max_connections=settings.database_connections,
            on_lost=keeper.look_now if keeper is not None else lambda: None,
        )
        await database.open()
        stack.push_async_callback(database.close)
        # Here, and not in Registry: their end may take as long as a file takes to be read.
        confined = Confined(errors=ServiceError, preload=("headrace_registry.sizing.headers",))
        stack.callback(confined.close)
        registry = Registry(settings, database, url, shutdown, confined)
        if keeper is not None:
            # No other replica can use this data directory, so every claim is one of a registry that is gone.
            await registry.preparations.release(None)
        await registry.serve(keeper, handle_signals=handle_signals)


class Registry:
    """Stores, loops and servicers of one process."""

    def __init__(self, settings: Settings, database: Database, url: str, shutdown: Shutdown, files: Confined) -> None:
        wakeups, policy = Wakeups(poll_s=settings.poll_s), settings.policy
        self._options, self._shutdown = settings.server, shutdown
        self._database, self._metrics = database, Metrics()
        failed = self._metrics.loop_failed
        self.preparations, records = PreparationStore(database, wakeups), RecordStore(database, wakeups)
        models, nodes = ModelStore(database, wakeups), NodeStore(database, wakeups)
        leases, validations = LeaseStore(database, wakeups, policy), ValidationStore(database, wakeups, policy)
        residencies = ResidencyStore(database, wakeups, policy, settings.allowances)
        pins, events, sets = PinStore(database, wakeups), EventStore(database), SetStore(database)
        self._listener = Listener(url, database, wakeups)
        hub, roots = HubClient(settings.environment), ModelRoots(settings.model_roots or (settings.data_dir,))
        profiles = Profiles(hub=HubHeaders(settings.environment), roots=roots, confinement=files)
        folders, quota_bytes = ModelFolders(settings.data_dir / "models"), settings.models_quota_bytes
        stored = FolderStore(database, wakeups, folders, quota_bytes=quota_bytes)
        self._storekeeper = Storekeeper(stored, folders, failed=failed)
        self._preparer = Preparer(
            store=self.preparations,
            records=records,
            wakeups=wakeups,
            roots=roots,
            storekeeper=self._storekeeper,
            allowances=settings.allowances,
            downloader=hub,
            worker=uuid.uuid4().hex,
            reason_of=reason_of,
            confinement=files,
            failed=failed,
        )
        self._upkeep = _upkeep(settings, database, wakeups, failed)
        sizes = MemoryEstimates(models=models, estimates=EstimateStore(database, policy), profiles=profiles)
        self._models = ModelServicer(
            models=models,
            deletions=Deletions(models=models, wakeups=wakeups),
            preparations=self.preparations,
            preparer=self._preparer,
            validations=validations,
            roots=roots,
            allowances=settings.allowances,
            commits=hub,
            freshness=Freshness(records),
            estimates=sizes,
            wakeups=wakeups,
            shutdown=shutdown,
        )
        self._residencies = ResidencyServicer(
            residencies=residencies,
            leases=leases,
            nodes=nodes,
            lease_waits=LeaseWaits(residencies=residencies, wakeups=wakeups),
            pins=pins,
            events=events,
            wakeups=wakeups,
            shutdown=shutdown,
        )
        self._nodes = NodeServicer(
            nodes=nodes,
            residencies=residencies,
            preparations=self.preparations,
            validations=validations,
            corpora=CorpusStore(database),
            wakeups=wakeups,
            shutdown=shutdown,
            heartbeat_interval_s=settings.heartbeat_interval_s,
        )
        self._sets = SetServicer(sets=sets)

    def add_services(self, server: grpc.aio.Server) -> None:
        """Registers the four services."""
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self._models, server)
        residency_service_pb2_grpc.add_ResidencyServiceServicer_to_server(self._residencies, server)
        node_service_pb2_grpc.add_NodeServiceServicer_to_server(self._nodes, server)
        activation_set_service_pb2_grpc.add_ActivationSetServiceServicer_to_server(self._sets, server)

    async def serve(self, keeper: Keeper | None, *, handle_signals: bool) -> None:
        """Serves until the shutdown begins. The loops run until the last call has ended, since calls wait for them."""
        server = Server(
            self._options,
            service_names=SERVICES,
            add_services=self.add_services,
            statuses=STATUSES,
            metrics=self._metrics,
            shutdown=self._shutdown,
            handle_signals=handle_signals,
            own_places=OWN_PLACES,
        )

        async def announce(serving: bool) -> None:
            for name in ("", *SERVICES):
                server.set_health(name, serving=serving and not self._shutdown.begun)

        async with asyncio.TaskGroup() as group:
            loops: list[asyncio.Task[None]] = []

            def keep_running(*workers: Worker) -> None:
                for worker in workers:
                    name = type(worker).__name__
                    running = going_on(worker.run, name=name, failed=self._metrics.loop_failed)
                    loops.append(group.create_task(running, name=name))

            keep_running(self._preparer, self._storekeeper, self._upkeep, self._listener)
            if keeper is not None:
                keep_running(keeper)
            try:
                await server.start()
                keep_running(HealthWatch(self._database, announce))
                log.info("registry ready", extra={"fields": {"address": server.address}})
                await server.wait()
            finally:
                await server.stop()
                for loop in loops:
                    loop.cancel()


def _upkeep(settings: Settings, database: Database, wakeups: Wakeups, failed: FailureCount) -> Upkeep:
    return Upkeep(
        leases=LeaseStore(database, wakeups, settings.policy),
        nodes=NodeStore(database, wakeups),
        residencies=ResidencyUpkeep(database, wakeups, settings.policy, settings.allowances),
        pins=PinStore(database, wakeups),
        validations=ValidationStore(database, wakeups, settings.policy),
        purge=Purge(database, EventStore(database)),
        heartbeat_interval_s=settings.heartbeat_interval_s,
        failed=failed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="registry", description="Headrace's registry of models and residency.")
    parser.add_argument("--listen", default="127.0.0.1:7470", metavar="HOST:PORT", help="default 127.0.0.1:7470")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="models, and the embedded Postgres")
    parser.add_argument(
        "--database-url", default="", metavar="URL", help="Postgres 14+ (default: DATABASE_URL, or embedded)"
    )
    parser.add_argument(
        "--database-connections",
        type=_connections,
        default=DEFAULT_CONNECTIONS,
        metavar="N",
        help=f"most connections at once, besides one that listens (default {DEFAULT_CONNECTIONS})",
    )
    parser.add_argument(
        "--models-root",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="folders and GGUF files may be registered from below it (repeatable; default: the data dir)",
    )
    parser.add_argument(
        "--heartbeat-interval-s", type=_interval, default=5.0, metavar="S", help="asked of nodes (default 5)"
    )
    parser.add_argument(
        "--models-quota-bytes",
        type=_quota,
        default=DEFAULT_QUOTA_BYTES,
        metavar="N",
        help="most bytes in the model store; files out of use are removed first (default 50 GB)",
    )
    parser.add_argument(
        "--allow-pickle",
        action="append",
        default=[],
        metavar="REPO",
        help="pickled weights of this hub repo may be read and converted (repeatable)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="append",
        default=[],
        metavar="REPO",
        help="code of this hub repo may run on the nodes (repeatable)",
    )
    # One flag for each number of the policy, with its default.
    group = parser.add_argument_group("residency")
    for each in fields(Policy):
        kind: type[int | float] = int if isinstance(each.default, int) else float
        group.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=kind,
            default=each.default,
            metavar="N" if kind is int else "S",
            help=f"{POLICY_HELP[each.name]} (default {each.default:g})",
        )
    add_common_flags(parser)
    return parser


def _quota(text: str) -> int:
    n_bytes = int(text)
    if n_bytes < 1:
        raise argparse.ArgumentTypeError("takes a positive number of bytes")
    return n_bytes


def _connections(text: str) -> int:
    number = int(text)
    if not 2 <= number <= 1000:
        raise argparse.ArgumentTypeError("takes 2 to 1000")
    return number


def _interval(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 300:
        raise argparse.ArgumentTypeError("takes 0.1 to 300 seconds")
    return seconds


def _settings(args: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    for root in args.models_root:
        if not root.is_dir():
            raise RootInvalid(f"--models-root {root} is no folder; make it, or give another one.")
    server = options_from(args)
    try:
        policy = Policy(**{each.name: getattr(args, each.name) for each in fields(Policy)})
    except ValueError as exc:
        raise PolicyInvalid(f"--{str(exc).replace('_', '-')}.") from exc
    return Settings(
        server=server,
        data_dir=usable_folder(args.data_dir, flag="--data-dir"),
        database_url=args.database_url or environment.get("DATABASE_URL", ""),
        model_roots=tuple(args.models_root),
        heartbeat_interval_s=args.heartbeat_interval_s,
        policy=policy,
        environment=dict(environment),
        models_quota_bytes=args.models_quota_bytes,
        database_connections=args.database_connections,
        allowances=Allowances(
            pickle_repos=frozenset(_repo(text) for text in args.allow_pickle),
            code_repos=frozenset(_repo(text) for text in args.trust_remote_code),
        ),
    )


def _repo(text: str) -> str:
    try:
        return checked_repo(text, "").location
    except FieldInvalid:
        raise RepoInvalid(f"{text!r} is no repo; give the exact id, such as owner/name.") from None


if __name__ == "__main__":
    sys.exit(main())
