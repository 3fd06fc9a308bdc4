"""The extractor: `python -m headrace_extractor`. The only place where its rooms are wired together."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import grpc

from headrace.extractor.v1 import corpus_service_pb2, extraction_service_pb2
from headrace_chassis import descriptors, logs
from headrace_chassis.advertising import advertised
from headrace_chassis.auth import read_token
from headrace_chassis.confined.environment import without_secrets
from headrace_chassis.confined.pool import Confined
from headrace_chassis.data_folder import make_private
from headrace_chassis.dialing import Credentials, addresses_of, read_roots
from headrace_chassis.errors import ServiceError
from headrace_chassis.flags import add_common_flags, options_from
from headrace_chassis.folders import readable_folder, usable_folder
from headrace_chassis.loops import going_on
from headrace_chassis.metrics import Metrics
from headrace_chassis.server import Server
from headrace_chassis.shutdown import Shutdown
from headrace_chassis.start import exit_status
from headrace_extractor.corpora.reports import CorpusReports
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.corpora.tokens.texts import TokenTexts
from headrace_extractor.extractions.estimates import CorpusRowCounter
from headrace_extractor.extractions.extractions import Extractions
from headrace_extractor.extractions.reports import SetReports
from headrace_extractor.hub.client import HubDatasets
from headrace_extractor.node.data_folder import boot_nonce, lock_data_folder
from headrace_extractor.node.devices import DEFAULT_MAX_LOADS, device_lister, machine_reader
from headrace_extractor.node.node import Node
from headrace_extractor.node.runner_process import RunnerProcess
from headrace_extractor.node.spare_runners import DEFAULT_SPARE_RUNNERS, SpareRunners
from headrace_extractor.rpc.corpus_servicer import CorpusServicer
from headrace_extractor.rpc.extraction_servicer import ExtractionServicer
from headrace_extractor.rpc.handlers import add_service
from headrace_extractor.rpc.registry_client import RegistryClient
from headrace_extractor.rpc.status import status_table
from headrace_extractor.sets.eviction import DEFAULT_IDLE_S, DEFAULT_QUOTA_BYTES, Limits

logger = logging.getLogger("headrace_extractor")

EXTRACTION = extraction_service_pb2.DESCRIPTOR.services_by_name["ExtractionService"]
CORPUS = corpus_service_pb2.DESCRIPTOR.services_by_name["CorpusService"]
# Imported once, in the process that all children of this server are forked from. Not pyarrow, which starts threads.
_PARSERS = (
    "headrace_extractor.hookpoints.catalogues",
    "headrace_extractor.corpora.counting",
    "headrace_extractor.corpora.ingest.steps",
    "headrace_extractor.corpora.tokens.texts",
    "headrace_extractor.corpora.chat",
)
# Loads that begin at the same moment are few; more spares hold memory for nothing.
_MOST_SPARE_RUNNERS = 16


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(prog="extractor", description=__doc__)
    parser.add_argument("--listen", default="127.0.0.1:7471", metavar="HOST:PORT")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--node-id", default="", metavar="NAME", help="stable name of this node (default: host name)")
    parser.add_argument("--corpus-root", type=Path, action="append", default=[], metavar="PATH", help="may be repeated")
    parser.add_argument(
        "--device",
        type=_device,
        default="",
        metavar="DEVICE",
        help="cpu, cuda, cuda:N or mps (default: what is there)",
    )
    parser.add_argument("--cpu-bytes", type=int, default=0, metavar="N", help="memory for models on the CPU")
    parser.add_argument(
        "--max-loads",
        type=_limit,
        default=DEFAULT_MAX_LOADS,
        metavar="N",
        help=f"most models that load at once (default {DEFAULT_MAX_LOADS}; 0: no limit)",
    )
    parser.add_argument(
        "--max-residents",
        type=_limit,
        default=None,
        metavar="N",
        help="most models resident at once (default 3 below 64 GB of device memory, else no limit; 0: no limit)",
    )
    parser.add_argument(
        "--spare-runners",
        type=_spares,
        default=DEFAULT_SPARE_RUNNERS,
        metavar="N",
        help="processes that import torch ahead of the next load, some 300 MB of main memory each "
        f"(default {DEFAULT_SPARE_RUNNERS}; 0: none)",
    )
    parser.add_argument(
        "--sets-quota-bytes",
        type=_amount,
        default=DEFAULT_QUOTA_BYTES,
        metavar="N",
        help="most bytes of activation sets; the least recently used go first (default 100 GB; 0: no limit)",
    )
    parser.add_argument(
        "--sets-idle-days",
        type=float,
        default=DEFAULT_IDLE_S / 86_400,
        metavar="DAYS",
        help="activation sets that nobody has used for so long go (default 30; 0: never)",
    )
    parser.add_argument(
        "--disk-reserve-bytes",
        type=_amount,
        default=-1,
        metavar="N",
        help="bytes of the disk that activation sets leave free (default 1 GiB, at most 2 %% of the disk)",
    )
    _add_registry_flags(parser)
    add_common_flags(parser)
    return parser.parse_args(arguments)


def _add_registry_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the way to the registry, and of the way back."""
    parser.add_argument(
        "--registry",
        default="127.0.0.1:7470",
        metavar="HOST:PORT[,...]",
        help="address of the registry, or of its replicas, or unix:PATH; the next is asked when one does not answer",
    )
    parser.add_argument(
        "--advertise",
        default="",
        metavar="HOST:PORT",
        help="address clients reach (default: --listen; if that is every interface, this machine's towards --registry)",
    )
    parser.add_argument("--registry-token-file", type=Path, metavar="F", help="bearer token for the registry")
    parser.add_argument(
        "--registry-ca",
        type=Path,
        metavar="F",
        help="PEM root certificates, or `system` for this machine's; switches to TLS, as a token beyond loopback does",
    )


def _device(text: str) -> str:
    if not re.fullmatch(r"|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError("takes cpu, cuda, cuda:N or mps")
    return text


def _limit(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 10_000:
        raise argparse.ArgumentTypeError("takes 0 (no limit) to 10000")
    return number


def _spares(text: str) -> int:
    number = int(text)
    if not 0 <= number <= _MOST_SPARE_RUNNERS:
        raise argparse.ArgumentTypeError(f"takes 0 to {_MOST_SPARE_RUNNERS}")
    return number


def _amount(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("takes a number of bytes, 0 or more")
    return number


def _registry_client(args: argparse.Namespace, addresses: Sequence[str]) -> RegistryClient:
    name = args.node_id or re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")
    credentials = Credentials(
        token=read_token(args.registry_token_file, flag="--registry-token-file") if args.registry_token_file else "",
        root_certificates=read_roots(args.registry_ca, flag="--registry-ca") if args.registry_ca else None,
        ca_flag="--registry-ca",
    )
    return RegistryClient(
        addresses,
        node_id=name if re.match(r"^[a-z]", name) else f"node-{name}"[:63],
        version=version("headrace"),
        boot_nonce=boot_nonce(args.data_dir),
        credentials=credentials,
    )


def _warm_parsers() -> Confined:
    confined = Confined(errors=ServiceError, preload=_PARSERS)
    confined.warm()
    return confined


def _limits(args: argparse.Namespace) -> Limits:
    return Limits(
        quota_bytes=args.sets_quota_bytes, idle_s=args.sets_idle_days * 86_400, reserve_bytes=args.disk_reserve_bytes
    )


async def serve(args: argparse.Namespace, environment: dict[str, str]) -> None:
    """Serves until a signal."""
    shutdown, metrics = Shutdown(), Metrics()
    options, registries = options_from(args), addresses_of(args.registry, flag="--registry")
    devices = device_lister(args.device, args.cpu_bytes)
    registry = _registry_client(args, registries)
    confined = _warm_parsers()
    ids = CorpusReports(registry, epoch=lambda: node.epoch, held=lambda: corpora.digests())  # noqa: PLW0108
    corpora = CorpusStore(args.data_dir / "corpora", allowed_roots=args.corpus_root, confinement=confined, register=ids)
    machine = machine_reader(devices(), max_loads=args.max_loads, max_residents=args.max_residents)
    public = without_secrets(environment)
    runners = SpareRunners(RunnerProcess.start, environment=public, n_spares=args.spare_runners)
    node = Node(registry, runners, devices, environment=public, machine=machine)
    extractions = Extractions(
        args.data_dir,
        models=registry,
        corpora=corpora,
        node=node,
        counter=CorpusRowCounter(corpora, registry, confined),
        device_id=devices()[0].id,
        registry=registry,
        limits=_limits(args),
        confinement=confined,
    )
    rpc = ExtractionServicer(extractions, decode_tokens=TokenTexts(confined).decode, metrics=metrics, shutdown=shutdown)
    corpus_rpc = CorpusServicer(corpora, HubDatasets(environment), in_use=extractions.uses_corpus, shutdown=shutdown)

    def add_services(server: grpc.aio.Server) -> None:
        add_service(server, EXTRACTION, rpc, framed=("StreamActivations",))
        add_service(server, CORPUS, corpus_rpc)

    server = Server(
        options,
        service_names=(EXTRACTION.full_name, CORPUS.full_name),
        add_services=add_services,
        statuses=status_table(),
        metrics=metrics,
        shutdown=shutdown,
    )
    extractions.recover()
    advertised(options.listen, given=args.advertise, towards=registries)  # Better refused before than after the start.
    await server.start()
    address = advertised(server.address, given=args.advertise, towards=registries)
    logger.info("listening", extra={"address": server.address, "data_dir": str(args.data_dir)})
    reports = SetReports(extractions.sets, extractions.keeper, registry, epoch=lambda: node.epoch)
    background = [
        asyncio.create_task(node.run(address=address, on_registered=extractions.report_all), name="node"),
        asyncio.create_task(going_on(ids.run, name="the reports of corpora")),
        asyncio.create_task(going_on(lambda: extractions.report_changes(reports.report), name="reports")),
        asyncio.create_task(going_on(extractions.keeper.run, name="the upkeep of sets")),
    ]
    if args.spare_runners:
        background.append(asyncio.create_task(going_on(runners.run, name="spare runners")))
    waiting = asyncio.create_task(server.wait(), name="wait")
    try:
        await asyncio.wait([waiting, *background], return_when=asyncio.FIRST_COMPLETED)
    finally:
        shutdown.begin()
        waiting.cancel()
        corpora.close()  # Ends running ingests: their threads would delay the exit.
        confined.close()
        await server.stop()
        await extractions.close()
        for task in background:
            task.cancel()
        outcomes = await asyncio.gather(*background, return_exceptions=True)
        await registry.close()
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome


def main(arguments: Sequence[str], environment: dict[str, str]) -> int:
    """Runs the server; returns the exit status."""
    args = parse(arguments)
    logs.configure(args.log_level, sys.stderr)
    descriptors.raise_limit()

    def run() -> None:
        make_private(args.data_dir)
        args.data_dir = usable_folder(args.data_dir, flag="--data-dir")
        args.corpus_root = [readable_folder(root, flag="--corpus-root") for root in args.corpus_root]
        with lock_data_folder(args.data_dir):
            for name in ("activations", "corpora", "extractions"):
                usable_folder(args.data_dir / name, flag="--data-dir, its folder")
            asyncio.run(serve(args, environment))

    return exit_status("extractor", run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
