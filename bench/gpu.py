"""`python -m bench.gpu`: Headrace on this machine's GPU, against forward passes alone. `make bench-gpu` runs it.

Prints tables and writes `bench/results/DATE-GPU.json`, which is meant to be committed. `--tiny` does the same
with small models on any device, in seconds, to see that it runs; it writes no results.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from bench import gpu_memory
from bench.figures import Figure, compare, show
from bench.gpu_models import Job
from bench.interleave import interleave
from bench.processes import ROOT, Worker, server
from bench.replay import touch
from headrace_client import BosPolicy, Dtype, HeadraceClient, Recipe
from headrace_client.errors import SetNotFound, StateConflict

LLAMA = Job(architecture="llama-3.1-8b", context_size=1024, batch_size=8, n_contexts=256, layers=(4, 7, 10, 13, 16))
GPT2 = Job(architecture="gpt2-medium", context_size=1024, batch_size=16, n_contexts=1000, layers=(3, 7, 11, 15, 19))
TINY_LLAMA = Job(architecture="llama-tiny", context_size=64, batch_size=4, n_contexts=16, layers=(0, 1, 2, 3, 4))
TINY_GPT2 = Job(architecture="gpt2-tiny", context_size=64, batch_size=4, n_contexts=16, layers=(0, 1, 2, 3, 4))
DEADLINE_S = 1800.0
_POLL_S = 0.2


@dataclass(slots=True)
class Results:
    """Ratios, and absolute values, which are compared with nothing."""

    figures: list[Figure] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)


class Bench:
    """Registry and extractor as users run them, and models with random weights."""

    def __init__(self, stack: ExitStack, work_dir: Path, device: str, console: Console) -> None:
        self._work_dir = work_dir
        self._device = device
        self._console = console
        self._models = work_dir / "models"
        self._models.mkdir()
        self._numbers = count()
        flags = ["--listen", "127.0.0.1:0", "--data-dir"]
        registry, _ = stack.enter_context(
            server(
                "headrace_registry",
                [*flags, str(work_dir / "registry"), "--models-root", str(self._models)],
                work_dir=work_dir,
            )
        )
        node = [*flags, str(work_dir / "node"), "--registry", registry, "--device", device]
        stack.enter_context(server("headrace_extractor", node, work_dir=work_dir))
        self.client = stack.enter_context(HeadraceClient.connect(registry))

    def add(self, job: Job) -> Path:
        """Writes the model and registers it. Another process writes it: its memory is free again when it ends."""
        folder = self._models / job.architecture
        self._say(f"writing {job.architecture} with random weights")
        command = [sys.executable, "-m", "bench.gpu_models", job.architecture, str(folder), self._device]
        subprocess.run(command, check=True, cwd=ROOT, timeout=DEADLINE_S)
        model = self.client.models.register(folder=folder, id=job.architecture, load_options={"dtype": "bfloat16"})
        self.client.models.prepare(model.id)
        self.client.models.wait_ready(model.id, deadline_s=DEADLINE_S)
        return folder

    def upload(self, job: Job) -> str:
        """Uploads new random text, so that no row is cached; returns the corpus id."""
        number = next(self._numbers)
        file = self._work_dir / f"text-{number}.npy"
        np.save(file, job.token_ids(seed=number))
        corpus = self.client.corpora.upload(f"text-{number}", file)
        file.unlink()
        return corpus.id

    def extract(self, job: Job, n_hookpoints: int, corpus_id: str) -> float:
        """Returns the seconds from the request to the last row in this process; deletes the set afterwards."""
        hookpoints = job.hookpoints[-n_hookpoints:]
        recipe = Recipe(
            context_size=job.context_size, batch_size=job.batch_size, bos=BosPolicy.NONE, storage_dtype=Dtype.BFLOAT16
        )
        began = time.perf_counter()
        extraction = self.client.extractions.start(job.architecture, corpus_id, hookpoints, recipe=recipe)
        n_rows = 0
        with self.client.chunks(extraction, columns=hookpoints) as stream:
            for chunk in stream:
                for buffer in chunk.buffers:
                    touch(buffer)
                n_rows += chunk.n_rows
        took = time.perf_counter() - began
        assert n_rows == job.n_rows, f"{n_rows} rows instead of {job.n_rows}"
        self.client.extractions.wait(extraction.id, deadline_s=DEADLINE_S)
        self._delete(extraction.set_id)
        return took

    def unload(self, job: Job) -> None:
        """Unloads the model and waits until it has left the device."""
        self.client.residencies.unload(job.architecture)
        deadline = time.monotonic() + DEADLINE_S
        while self.client.residencies.list(model=job.architecture):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{job.architecture} is not unloaded after {DEADLINE_S:.0f} s")
            time.sleep(_POLL_S)

    def _delete(self, set_id: str) -> None:
        """Deletes a set; tries again until the registry knows the set, and knows that it has no readers."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                return self.client.sets.delete(set_id)
            except (SetNotFound, StateConflict):
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)

    def _say(self, text: str) -> None:
        self._console.print(f"gpu: {text}")


def measure_throughput(bench: Bench, job: Job, device: str, console: Console, *, rounds: int) -> Results:
    """Measures one and five hookpoints of a large model, up to the client, against bare passes; and copies alone."""
    results = Results()
    memory = {"before": gpu_memory.used_bytes()}
    folder = bench.add(job)
    with gpu_memory.watched() as peak:
        bench.extract(job, len(job.layers), bench.upload(job))  # Loads the model.
    memory["during"] = peak.used_bytes
    with Worker("bench.gpu_passes", [str(folder), device, json.dumps(asdict(job))]) as worker:

        def alone(kind: str, n_hookpoints: int) -> float:
            question = {"kind": kind, "n_hookpoints": n_hookpoints}
            return float(worker.ask(question, deadline_s=DEADLINE_S)["seconds"])

        n_all = len(job.layers)
        sides: dict[str, Callable[[], float]] = {
            "one": lambda: bench.extract(job, 1, bench.upload(job)),
            "five": lambda: bench.extract(job, n_all, bench.upload(job)),
            "bare": partial(alone, "bare", 1),
            "dropped": partial(alone, "dropped", n_all),
            "staged": partial(alone, "staged", n_all),
            "waiting": partial(alone, "waiting", n_all),
        }
        for kind in ("bare", "dropped", "staged", "waiting"):
            sides[kind]()  # Kernels are chosen and pinned memory is allocated.
        console.print(f"gpu: {', '.join(sides)} in turns, {rounds} rounds of {job.n_rows:,} rows")
        rates = {side: [job.n_rows / s for s in seconds] for side, seconds in interleave(sides, rounds).items()}
    bench.unload(job)
    memory["after"] = gpu_memory.used_bytes()
    rows = partial(compare, unit="rows/s")
    results.figures += [
        rows("one hookpoint vs bare passes", rates["one"], rates["bare"], target=0.9),
        rows("five hookpoints vs bare passes", rates["five"], rates["bare"], target=0.9),
        rows("copies under way vs rows dropped", rates["staged"], rates["dropped"], target=0.95),
        rows("copies under way vs waited for", rates["staged"], rates["waiting"], target=1.0),
    ]
    width = 2 * _width(folder)
    results.values |= {
        "bytes/s to the client, one hookpoint": median(rates["one"]) * width,
        "bytes/s to the client, five hookpoints": median(rates["five"]) * width * n_all,
        # Token id, document and position of each row: 4 bytes each.
        "bytes/s to the log, five hookpoints": median(rates["five"]) * (width * n_all + 12),
        **{f"bytes of the device in use {when}": float(amount) for when, amount in memory.items()},
    }
    return results


def measure_start_to_finish(bench: Bench, job: Job) -> Results:
    """Measures from a model that is not loaded to the last row of all hookpoints, and again while it is resident."""
    bench.add(job)
    cold_s = bench.extract(job, len(job.layers), bench.upload(job))
    warm_s = bench.extract(job, len(job.layers), bench.upload(job))
    bench.unload(job)
    name = f"{job.architecture}, {job.n_contexts:,} of {job.context_size:,} tokens, {len(job.layers)} layers"
    return Results(values={f"seconds, {name}, with loading": cold_s, f"seconds, {name}, resident": warm_s})


def _width(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("hidden_size") or config["n_embd"])


def _machine() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "grpcio")}
    return {"date": datetime.now(UTC).date().isoformat(), **gpu_memory.describe(), **versions}


def _save(results: Results, machine: Mapping[str, str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {**machine, "figures": [asdict(each) for each in results.figures]}
    path.write_text(json.dumps({**content, "values": results.values}, indent=2) + "\n")


def main() -> int:
    """Measures and prints; a missed target is shown, not an error."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:0 or cpu (default cuda)")
    parser.add_argument("--tiny", action="store_true", help="small models, to see whether it runs")
    parser.add_argument("--rounds", type=int, default=3, help="turns (default 3)")
    parser.add_argument("--work-dir", type=Path, help="folder for 40 GB meanwhile (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="default: bench/results/DATE-GPU.json; nothing with --tiny")
    args = parser.parse_args()
    console, machine = Console(), _machine()
    if args.device.startswith("cuda") and "gpu" not in machine:
        console.print("This machine has no NVIDIA GPU (nvidia-smi says nothing); `--tiny --device cpu` needs none.")
        return 1
    llama, gpt2 = (TINY_LLAMA, TINY_GPT2) if args.tiny else (LLAMA, GPT2)
    with tempfile.TemporaryDirectory(prefix="headrace-gpu-", dir=args.work_dir) as folder, ExitStack() as stack:
        bench = Bench(stack, Path(folder), args.device, console)
        results = measure_throughput(bench, llama, args.device, console, rounds=args.rounds)
        results.values |= measure_start_to_finish(bench, gpt2).values
    show(results.figures, console)
    for name, value in results.values.items():
        console.print(f"  {name:72} {value:18,.1f}", highlight=False)
    slug = re.sub(r"[^a-z0-9]+", "-", machine.get("gpu", "none").lower())
    output = args.output or (None if args.tiny else ROOT / "bench" / "results" / f"{machine['date']}-{slug}.json")
    if output:
        _save(results, machine, output)
        console.print(f"written to {output}; please commit it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
