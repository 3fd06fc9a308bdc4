"""Cold loads with a spare runner against cold loads without one: `python -m bench.cold_load`, or `--only cold-load`.

Two pairs of registry and extractor as users run them, each with a tiny llama and SmolLM2-135M. A turn is timed from
`AcquireLease` of a model that is not loaded to the grant. Before each turn the spare has had time to import.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import grpc
import psutil
from rich.console import Console

from bench.end_to_end import MODEL_ID, start_services
from bench.figures import Figure, compare, show
from bench.interleave import interleave
from bench.processes import START_DEADLINE_S, ProcessFailed
from bench.registry import load_and_unload
from headrace.registry.v1 import residency_service_pb2_grpc as residency_grpc

_TINY_ID = "tiny"
_SIDES = {"spare": "1", "none": "0"}


def measure(work_dir: Path, console: Console, *, rounds: int) -> list[Figure]:
    """Returns the figures; in all of them less is better."""
    console.print("cold load: starting services, converting the model")
    tiny = _save_tiny(work_dir / "models" / _TINY_ID)
    with ExitStack() as stack:
        residencies = {}
        for side, n_spares in _SIDES.items():
            folder = work_dir / side
            folder.mkdir()
            services = start_services(
                stack,
                folder,
                registry_flags=("--models-root", str(tiny.parent)),
                extractor_flags=("--spare-runners", n_spares),
            )
            services.client.models.register(folder=tiny, id=_TINY_ID)
            services.client.models.prepare(_TINY_ID)
            services.client.models.wait_ready(_TINY_ID, deadline_s=START_DEADLINE_S)
            channel = stack.enter_context(grpc.insecure_channel(services.registry))
            residencies[side] = residency_grpc.ResidencyServiceStub(channel)

        figures = []
        for model_id, name in ((_TINY_ID, "tiny llama"), (MODEL_ID, "SmolLM2-135M")):
            console.print(f"cold load: {name}")
            sides = {side: partial(_turn, stub, model_id) for side, stub in residencies.items()}
            for turn in sides.values():
                turn()  # Brings files and modules into the page cache.
            seconds = interleave(sides, rounds)
            figures.append(
                compare(
                    f"spare vs none, {name}",
                    seconds["spare"],
                    seconds["none"],
                    unit="s",
                    target=0.5,
                    sense="max",
                )
            )
    return figures


def _turn(residencies: residency_grpc.ResidencyServiceStub, model_id: str) -> float:
    _until_runners_rest()
    return load_and_unload(residencies, model_id)


def _until_runners_rest() -> None:
    """Waits until the runners have used no processor time for 1.5 s; a spare starts one second after a load."""
    end, before = time.monotonic() + START_DEADLINE_S, -1.0
    while time.monotonic() < end:
        time.sleep(1.5)
        now = 0.0
        for process in psutil.Process().children(recursive=True):
            if "headrace_extractor.runner" in process.cmdline():
                times = process.cpu_times()
                now += times.user + times.system
        if now == before:
            return
        before = now
    raise ProcessFailed(f"runners were busy for {START_DEADLINE_S:.0f} s, although no load was asked for")


def _save_tiny(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 -- seconds, and only this benchmark's

    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> None:
    """Measures this alone and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.cold_load", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        show(measure(Path(folder), console, rounds=args.rounds), console)


if __name__ == "__main__":
    main()
