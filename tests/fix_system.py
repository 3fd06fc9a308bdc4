"""The whole of Headrace as its users run it: registry, extractor, runners and Postgres as processes, real sockets.

`system` is one pair for the whole session, with tokens on, for tests that break nothing. `fragile` is another pair, for
tests that kill and restart; each of them must leave it running. `start_system` starts more. Processes that are left at
the end are ended by their ids.
"""

# ruff: noqa: PLC0415 -- torch is imported by the tests that need it, not by every run

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from fix_runner import save_model
from headrace_client import HeadraceClient, StreamTuning
from headrace_client.values import PROVENANCE_COLUMNS, Recipe

N_LAYERS = 4
WIDTH = 32
BOS_ID, EOS_ID = 0, 1
MODEL = "tiny"
HOOKPOINT = "blocks.2.hook_resid_post"
TOKEN = "a-token-of-the-tests-0123456789"
# One short document per pass: the slowest recipe, which leaves time for a kill in the middle.
SLOW = Recipe(context_size=32, batch_size=1, packing="one_document")
FAST = Recipe(context_size=64, batch_size=16)
# Longer than any step has taken on a slow machine: a test that needs it has found a hang.
PATIENCE_S = 90.0
_WORDS = "water wheel race mill stone grain head flow gate sluice turn drive carry".split()


# -- models and corpora ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def text_llama(tmp_path_factory):
    """A llama with random weights and a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=258,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return _with_tokenizer(save_model(LlamaForCausalLM, config, tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="session")
def text_gpt2(text_llama):
    """A GPT-2 with random weights and a tokenizer of bytes, in a folder next to the llama's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=258,
        n_embd=WIDTH,
        n_layer=N_LAYERS,
        n_head=4,
        n_positions=512,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return _with_tokenizer(save_model(GPT2LMHeadModel, config, text_llama.with_name("gpt2")))


def _with_tokenizer(folder):
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = tokenizers.Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    inner.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def texts(n, *, seed=0, longest=8):
    """Random documents of one to `longest` words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(_WORDS, k=rng.randint(1, longest))) for _ in range(n)]


# -- processes ---------------------------------------------------------------------------------------------------------


class Process:
    """One server: started, killed and started again on the same address."""

    def __init__(self, module: str, folder: Path, arguments: list[str]) -> None:
        self.name = module
        self.address = f"127.0.0.1:{free_port()}"
        self.metrics_address = f"127.0.0.1:{free_port()}"
        self.log_path = folder / f"{module}.log"
        self._ready_file = folder / f"{module}.ready"
        self._command = [
            *(sys.executable, "-m", module, "--listen", self.address, "--metrics-listen", self.metrics_address),
            *("--ready-file", str(self._ready_file), *arguments),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def add_arguments(self, *arguments: str) -> None:
        """Adds arguments, from the next start on."""
        self._command += arguments

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the process and waits until it serves, or until a test kills it."""
        self._ready_file.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
        with self.log_path.open("ab") as log:
            process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stderr=log, env=environment)
        self._process = process
        eventually(lambda: self._ready_file.exists() or process.poll() is not None, f"{self.name} serves")
        assert process.returncode in (None, -signal.SIGKILL), self.log_path.read_text()[-3000:]

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def terminate(self, deadline_s: float = 30.0) -> int:
        """Sends SIGTERM; returns the exit status."""
        assert self._process is not None
        self._process.terminate()
        try:
            return self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def log_lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log_path.read_text().splitlines() if line.startswith("{")]

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a metric that carry these labels."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found if all(label in line for label in wanted))


@dataclass
class System:
    """Registry and extractor on one data directory, and clients of them."""

    folder: Path
    registry: Process
    extractor: Process
    token: str = ""
    data_dir: Path = field(init=False)
    _clients: list[HeadraceClient] = field(default_factory=list)
    _orphans: list[psutil.Process] = field(default_factory=list)
    _n_variants: int = 0

    def __post_init__(self) -> None:
        self.data_dir = self.folder / "data"

    def connect(self, **options: object) -> HeadraceClient:
        """Makes another client, which is closed at the end."""
        client = HeadraceClient.connect(self.registry.address, token=self.token or None, **options)
        self._clients.append(client)
        return client

    @property
    def client(self) -> HeadraceClient:
        """The client that tests share."""
        return self._clients[0] if self._clients else self.connect()

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that a bare stub must send."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def add_model(self, model_id: str, folder: Path) -> None:
        self.client.models.register(folder=folder, id=model_id)
        self.client.models.prepare(model_id)
        self.client.models.wait_ready(model_id, deadline_s=PATIENCE_S)

    def variant(self, documents: list[str]) -> str:
        """Uploads a corpus with the rows of `documents` and a new digest, so that no row is cached."""
        self._n_variants += 1
        corpus_id = f"variant-{self._n_variants}"
        # Empty documents change the digest and make no rows.
        self.client.corpora.upload(corpus_id, documents=[*documents, *[""] * self._n_variants])
        return corpus_id

    def runners(self) -> list[psutil.Process]:
        """The extractor's children that hold models, the oldest first."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.extractor.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "headrace_extractor.runner" in child.cmdline():
                        found.append(child)
        return sorted(found, key=lambda child: child.create_time())

    def postmaster(self) -> psutil.Process | None:
        """The process of the embedded Postgres; None if it does not run."""
        try:
            pid = int((self.data_dir / "postgres" / "postmaster.pid").read_text().split("\n", 1)[0])
            process = psutil.Process(pid)
            living = process.name() == "postgres" and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, psutil.NoSuchProcess):
            return None
        return process if living else None

    def kill_extractor(self) -> None:
        """Sends kill -9 to the extractor alone: its runners must notice by themselves."""
        self._orphans += self.runners()
        self.extractor.kill()

    def kill_runner(self, number: signal.Signals = signal.SIGKILL) -> None:
        for runner in self.runners():
            runner.send_signal(number)

    def kill_postmaster(self) -> None:
        postmaster = self.postmaster()
        assert postmaster is not None
        postmaster.kill()

    def end_postmaster(self) -> None:
        """Ends a Postgres that a killed registry left behind."""
        postmaster = self.postmaster()
        if postmaster is None:
            return
        backends = postmaster.children(recursive=True)
        postmaster.send_signal(signal.SIGINT)  # Postgres' fast shutdown.
        _, left = psutil.wait_procs([postmaster, *backends], timeout=20)
        for process in left:
            process.kill()

    def close_clients(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()

    def stop(self) -> None:
        """Ends all processes, by force if need be; asserts that no runner is left."""
        self.close_clients()
        runners = [*self._orphans, *(self.runners() if self.extractor.running else [])]
        try:
            for process in (self.extractor, self.registry):
                if process.running:
                    process.terminate()
            _, left = psutil.wait_procs(runners, timeout=10)
            assert not left
        finally:
            for process in (self.extractor, self.registry):
                if process.running:
                    process.kill()
            self.end_postmaster()
            shutil.rmtree(self.data_dir, ignore_errors=True)


def free_port() -> int:
    """Returns a free port below the range of outgoing connections, so that a restart finds it free again."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


StartSystem = Callable[..., System]


@contextlib.contextmanager
def systems(folder: Path) -> Iterator[StartSystem]:
    """Yields a function that starts systems; stops all of them at the end."""
    started: list[System] = []

    def start(
        *, models_root: Path, token: str = "", registry: tuple[str, ...] = (), extractor: tuple[str, ...] = ()
    ) -> System:
        home = folder / f"s{len(started)}"
        home.mkdir(parents=True)
        common = ["--grace-s", "5"]
        if token:
            (home / "token").write_text(token)
            common += ["--token-file", str(home / "token")]
            extractor = (*extractor, "--registry-token-file", str(home / "token"))
        data = [] if "--data-dir" in extractor else ["--data-dir", str(home / "data")]
        serving = Process(
            "headrace_registry",
            home,
            [*common, "--data-dir", str(home / "data"), "--models-root", str(models_root), *registry],
        )
        working = Process(
            "headrace_extractor",
            home,
            # A spare runner takes seconds of a core's time that most tests have no use for.
            [
                *common,
                *data,
                *("--registry", serving.address, "--device", "cpu", "--node-id", "here", "--spare-runners", "0"),
                *extractor,
            ],
        )
        system = System(home, serving, working, token)
        started.append(system)
        serving.start()
        working.start()
        eventually(lambda: any(node.state == "ALIVE" for node in system.client.nodes()), "the node is alive")
        return system

    try:
        yield start
    finally:
        with contextlib.ExitStack() as stack:  # Each is stopped, even if stopping another one fails.
            for system in started:
                stack.callback(system.stop)


@pytest.fixture(scope="session")
def system(tmp_path_factory, text_llama):
    """One pair for all tests that break nothing. It requires a token and has the model `tiny`."""
    roots = tmp_path_factory.mktemp("corpora")
    with systems(tmp_path_factory.mktemp("system")) as start:
        started = start(models_root=text_llama.parent, token=TOKEN, extractor=("--corpus-root", str(roots)))
        started.add_model(MODEL, text_llama)
        started.corpus_root = roots
        yield started


@pytest.fixture(scope="module")
def start_system(tmp_path_factory):
    with systems(tmp_path_factory.mktemp("systems")) as start:
        yield start


@pytest.fixture(scope="session")
def fragile(tmp_path_factory, text_llama):
    """A pair that tests kill and restart. It has the model `tiny`."""
    with systems(tmp_path_factory.mktemp("fragile")) as start:
        # No back-off: a model with a runner that keeps dying would be left unloaded for longer each time.
        started = start(models_root=text_llama.parent, registry=("--death-window-s", "0"))
        started.add_model(MODEL, text_llama)
        yield started


# -- reading -----------------------------------------------------------------------------------------------------------


class Digest:
    """SHA-256 of every column over all rows; the cut into chunks does not matter."""

    def __init__(self) -> None:
        self.n_rows = 0
        self._hashes: dict[str, hashlib._Hash] = {}

    def add(self, chunk) -> None:
        assert chunk.first_row == self.n_rows
        self.n_rows = chunk.end_row
        for name, values in chunk.arrays.items():
            self._hashes.setdefault(name, hashlib.sha256()).update(np.ascontiguousarray(values))

    @property
    def value(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self._hashes.items()} | {"n_rows": str(self.n_rows)}


def columns_of(extraction) -> tuple[str, ...]:
    return (*PROVENANCE_COLUMNS, *extraction.hookpoints)


def read(client, extraction, *, on_rows=lambda n_rows: None, chunk_bytes=16_384, **tuning):
    """Reads all rows of all columns; calls `on_rows` with the count after each chunk. `tuning` is a StreamTuning's."""
    digest = Digest()
    tuned = StreamTuning(chunk_bytes=chunk_bytes, **tuning)
    with client.chunks(extraction, columns_of(extraction), tuning=tuned) as stream:
        for chunk in stream:
            digest.add(chunk)
            on_rows(digest.n_rows)
    return digest.value


class At:
    """Calls `act` once, when so many rows have arrived."""

    def __init__(self, row: int, act: Callable[[], object]) -> None:
        self._row = row
        self._act = act
        self.done = False

    def __call__(self, n_rows: int) -> None:
        if n_rows >= self._row and not self.done:
            self.done = True
            self._act()


class Supervisor:
    """Restarts processes after a delay, as an init system would; `join` raises the first error of these threads."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def later(self, delay_s: float, act: Callable[[], object]) -> None:
        def work() -> None:
            time.sleep(delay_s)
            try:
                act()
            except BaseException as exc:  # noqa: BLE001 -- `join` raises it in the test's thread
                self._errors.append(exc)

        thread = threading.Thread(target=work, name="supervisor")
        self._threads.append(thread)
        thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        if self._errors:
            raise self._errors[0]


@pytest.fixture
def supervisor():
    supervisor = Supervisor()
    yield supervisor
    supervisor.join()


def eventually(condition: Callable[[], object], what: str, *, deadline_s: float = PATIENCE_S):
    """Waits until a condition returns a true value; returns that value."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {deadline_s:.0f} s in vain: {what}"
        time.sleep(0.03)
    return value
