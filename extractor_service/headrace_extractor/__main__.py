"""The extractor: `python -m headrace_extractor`. The only place where its rooms are wired together."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import socket
import sys
import uuid
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import grpc

from headrace.extractor.v1 import corpus_service_pb2, extraction_service_pb2
from headrace_chassis import descriptors, logs
from headrace_chassis.errors import StartError
from headrace_chassis.flags import add_common_flags, options_from
from headrace_chassis.metrics import Metrics
from headrace_chassis.server import Server
from headrace_chassis.shutdown import Shutdown
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.corpora.tokenizer import Tokenizer
from headrace_extractor.extractions.estimates import CorpusRowCounter
from headrace_extractor.extractions.extractions import Extractions
from headrace_extractor.extractions.reports import SetReports
from headrace_extractor.hub.client import HubDatasets
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
# Loads that begin at the same moment are few; more spares hold memory for nothing.
_MOST_SPARE_RUNNERS = 16


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(prog="headrace_extractor", description=__doc__)
    parser.add_argument("--listen", default="127.0.0.1:7471", metavar="HOST:PORT")
    parser.add_argument("--registry", default="127.0.0.1:7470", metavar="HOST:PORT")
    parser.add_argument(
        "--advertise", default="", metavar="HOST:PORT", help="address clients reach (default: --listen)"
    )
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
    parser.add_argument("--registry-token-file", type=Path, metavar="F", help="bearer token for the registry")
    parser.add_argument("--registry-ca", type=Path, metavar="F", help="PEM root certificates; switches to TLS")
    add_common_flags(parser)
    return parser.parse_args(arguments)


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


@lru_cache(maxsize=4)
def _tokenizer(files_path: str) -> Tokenizer:
    return Tokenizer.load(files_path)


async def _decode_tokens(files_path: str, token_ids: Sequence[int]) -> list[str]:
    return await asyncio.to_thread(lambda: _tokenizer(files_path).decode_each(token_ids))


def _registry_client(args: argparse.Namespace) -> RegistryClient:
    name = args.node_id or re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")
    return RegistryClient(
        args.registry,
        node_id=name if re.match(r"^[a-z]", name) else f"node-{name}"[:63],
        version=version("headrace"),
        boot_nonce=uuid.uuid4().hex,
        token=args.registry_token_file.read_text().strip() if args.registry_token_file else "",
        root_certificates=args.registry_ca.read_bytes() if args.registry_ca else None,
    )


async def serve(args: argparse.Namespace, environment: dict[str, str]) -> None:
    """Serves until a signal."""
    shutdown, metrics = Shutdown(), Metrics()
    devices = device_lister(args.device, args.cpu_bytes)
    registry = _registry_client(args)
    corpora = CorpusStore(args.data_dir / "corpora", allowed_roots=args.corpus_root)
    machine = machine_reader(devices(), max_loads=args.max_loads, max_residents=args.max_residents)
    runners = SpareRunners(RunnerProcess.start, environment=environment, n_spares=args.spare_runners)
    node = Node(registry, runners, devices, environment=environment, machine=machine)
    limits = Limits(
        quota_bytes=args.sets_quota_bytes, idle_s=args.sets_idle_days * 86_400, reserve_bytes=args.disk_reserve_bytes
    )
    extractions = Extractions(
        args.data_dir,
        models=registry,
        corpora=corpora,
        node=node,
        counter=CorpusRowCounter(corpora, registry),
        device_id=devices()[0].id,
        registry=registry,
        limits=limits,
    )
    extraction_rpc = ExtractionServicer(extractions, decode_tokens=_decode_tokens, metrics=metrics, shutdown=shutdown)
    corpus_rpc = CorpusServicer(corpora, HubDatasets(environment), in_use=extractions.uses_corpus, shutdown=shutdown)

    def add_services(server: grpc.aio.Server) -> None:
        add_service(server, EXTRACTION, extraction_rpc, framed=("StreamActivations",))
        add_service(server, CORPUS, corpus_rpc)

    server = Server(
        options_from(args),
        service_names=(EXTRACTION.full_name, CORPUS.full_name),
        add_services=add_services,
        statuses=status_table(),
        metrics=metrics,
        shutdown=shutdown,
    )
    extractions.recover()
    await server.start()
    logger.info("listening", extra={"address": server.address, "data_dir": str(args.data_dir)})

    reports = SetReports(extractions.sets, extractions.keeper, registry, epoch=lambda: node.epoch)
    background = [
        asyncio.create_task(
            node.run(address=args.advertise or server.address, on_registered=extractions.report_all), name="node"
        ),
        asyncio.create_task(extractions.report_changes(reports.report), name="reports"),
        asyncio.create_task(extractions.keeper.run(), name="sets"),
    ]
    if args.spare_runners:
        background.append(asyncio.create_task(runners.run(), name="spare-runners"))
    waiting = asyncio.create_task(server.wait(), name="wait")
    try:
        await asyncio.wait([waiting, *background], return_when=asyncio.FIRST_COMPLETED)
    finally:
        shutdown.begin()
        waiting.cancel()
        corpora.close()  # Ends running ingests: their threads would delay the exit.
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
    args.data_dir = args.data_dir.resolve()
    args.data_dir.mkdir(parents=True, exist_ok=True)
    logs.configure(args.log_level, sys.stderr)
    descriptors.raise_limit()
    try:
        asyncio.run(serve(args, environment))
    except StartError as exc:
        logger.error("%s", exc)  # noqa: TRY400 -- the message says it all
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
