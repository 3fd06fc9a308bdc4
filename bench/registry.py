"""The registry's overheads: leases, cold loads and pages, each against the least that it could cost.

Registry and extractor as users run them, SmolLM2-135M, and one embedded Postgres that both sides of each ratio share.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import grpc
import psycopg
from rich.console import Console

from bench.end_to_end import MODEL_ID, Services, start_services
from bench.figures import Figure, compare
from bench.interleave import interleave
from bench.processes import Worker, server
from headrace.registry.v1 import residency_service_pb2 as residency_pb
from headrace.registry.v1 import residency_service_pb2_grpc as residency_grpc
from headrace_registry.postgres.server.embedded import EmbeddedPostgres

N_MODELS = 100_000
DEADLINE_S = 300.0
_CALLERS = (1, 32)
_CALLS = 320  # Per turn, of all callers together.
_FILL = """
INSERT INTO models
SELECT (jsonb_populate_record(m, jsonb_build_object('id', 'bench-' || lpad(i::text, 6, '0')))).*
FROM models m, generate_series(1, %(n)s) AS i WHERE m.id = %(id)s
"""
_BARE_LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, local_files_only=True).eval()
"""


def measure(work_dir: Path, console: Console, *, rounds: int) -> list[Figure]:
    """Returns the figures; in all of them less is better."""
    with ExitStack() as stack:
        console.print("registry: starting services, converting the model")
        url = _postgres(stack, work_dir)
        services = start_services(stack, work_dir, database_url=url)
        touch, _ = stack.enter_context(server("bench.registry_servers", ["--database-url", url], work_dir=work_dir))
        figures = [_cold_load(services, console, rounds)]
        with psycopg.connect(url, autocommit=True) as database:
            database.execute(_FILL, {"n": N_MODELS, "id": MODEL_ID})
            database.execute("ANALYZE models")
        worker = stack.enter_context(Worker("bench.registry_calls", [services.registry, touch, url, MODEL_ID]))
        for callers in _CALLERS:
            console.print(f"registry: leases, {callers} at once")
            name = f"lease vs RPC + transaction, {callers}x"
            figures.append(_compare(worker, rounds, name, ("lease", "touch"), callers=callers))
        for size in (50, 1000):
            console.print(f"registry: pages of {size} of {N_MODELS:,} models")
            name = f"ListModels vs psycopg, {size}"
            figures.append(_compare(worker, rounds, name, ("list", "select"), callers=1, size=size))
    return figures


def _compare(worker: Worker, rounds: int, name: str, kinds: tuple[str, str], *, callers: int, size: int = 0) -> Figure:
    def turn(kind: str) -> list[float]:
        question = {"what": kind, "callers": callers, "calls": _CALLS // callers, "size": size}
        return [1000.0 * seconds for seconds in worker.ask(question, deadline_s=DEADLINE_S)["seconds"]]

    for kind in kinds:
        turn(kind)  # Warms up connections, query plans and caches.
    turns = interleave({kind: partial(turn, kind) for kind in kinds}, rounds)
    ours, other = ([value for values in turns[kind] for value in values] for kind in kinds)
    return compare(name, ours, other, target=2.0, unit="ms", sense="max")


def _cold_load(services: Services, console: Console, rounds: int) -> Figure:
    console.print("registry: cold loads")
    with grpc.insecure_channel(services.registry) as channel:
        residencies = residency_grpc.ResidencyServiceStub(channel)
        sides: dict[str, Callable[[], float]] = {
            "headrace": partial(load_and_unload, residencies, MODEL_ID),
            "bare": partial(_bare_load, services.files_path),
        }
        for side in sides.values():
            side()  # Brings files and modules into the page cache.
        seconds = interleave(sides, rounds)
    return compare(
        "cold load vs bare process", seconds["headrace"], seconds["bare"], target=1.25, unit="s", sense="max"
    )


def load_and_unload(residencies: residency_grpc.ResidencyServiceStub, model_id: str) -> float:
    """Returns the seconds from the request to the grant; unloads the model again, untimed."""
    began = time.perf_counter()
    request = residency_pb.AcquireLeaseRequest(model_id=model_id, holder="bench", ttl_s=60, wait_s=120)
    events = list(residencies.AcquireLease(request, timeout=DEADLINE_S))
    seconds = time.perf_counter() - began
    lease = events[-1].granted.lease
    residencies.ReleaseLease(residency_pb.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence), timeout=DEADLINE_S)
    residencies.UnloadModel(residency_pb.UnloadModelRequest(model_id=model_id, force=True), timeout=DEADLINE_S)
    end = time.monotonic() + DEADLINE_S
    listing = residency_pb.ListResidenciesRequest(model_id=model_id)
    while residencies.ListResidencies(listing, timeout=DEADLINE_S).residencies and time.monotonic() < end:
        time.sleep(0.05)
    return seconds


def _bare_load(files_path: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", _BARE_LOAD, files_path], check=True, timeout=DEADLINE_S, capture_output=True)
    return time.perf_counter() - began


def _postgres(stack: ExitStack, work_dir: Path) -> str:
    postgres = EmbeddedPostgres(work_dir / "database")
    postgres.own()
    postgres.start()
    stack.callback(postgres.stop)
    return f"{postgres.url}&options=-csearch_path%3Dheadrace"  # The benchmark looks into the tables itself.
