"""Tiny random models, corpora of token ids, and runners in this process and in their own."""

# ruff: noqa: PLC0415 -- torch is imported by the tests that need it, not by every run

from __future__ import annotations

import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.corpora.writer import DocumentWriter
from headrace_extractor.node.runner_protocol import Extract, Failed, decode, encode
from headrace_log.index import SegmentIndex
from headrace_log.layout import PROVENANCE, ColumnSpec, Dtype
from headrace_log.manifest import Manifest, set_id_of
from headrace_log.reader import SetReader

VOCAB_SIZE = 97
N_LAYERS = 4
WIDTH = 32
_NUMPY_DTYPES = {Dtype.FLOAT32: np.float32, Dtype.FLOAT16: np.float16, Dtype.BFLOAT16: np.uint16, Dtype.INT32: np.int32}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    return save_model(LlamaForCausalLM, config, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=WIDTH, n_layer=N_LAYERS, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2
    )
    return save_model(GPT2LMHeadModel, config, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(params=["llama", "gpt2"])
def tiny_model(request):
    """Path of a model with random weights of ordinary size, each architecture in turn."""
    return request.getfixturevalue(f"tiny_{request.param}")


def save_model(kind, config, folder):
    import torch

    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # The default initialisation is so small that attention hardly matters.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def load(path, **options):
    from headrace_extractor.runner.models.loading import load_model

    settings = {"device": "cpu", "dtype": "float32", "load_options": {}, "on_progress": lambda *_: None} | options
    return load_model(Path(path), **settings)


def documents(n, *, seed=0, longest=60):
    """Returns random documents, without special tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB_SIZE, rng.integers(1, longest)).astype(np.int32) for _ in range(n)]


@pytest.fixture
def make_corpus(tmp_path):
    def make(token_ids):
        folder = tmp_path / f"corpus-{time.monotonic_ns()}"
        with DocumentWriter(folder, tokenized=True) as writer:
            for document in token_ids:
                writer.add(np.asarray(document, dtype="<i4").tobytes())
            writer.finish(corpus_id=folder.name, origin="test", create_time=0.0)
        return folder

    return make


@pytest.fixture
def make_set(tmp_path):
    def make(hookpoints, *, width=WIDTH, segment_rows=100, shapes=None, **recipe):
        recipe = Recipe(**{"context_size": 64, "batch_size": 2, "bos": "document"} | recipe)
        folder = tmp_path / f"set-{time.monotonic_ns()}"
        dtype, shapes = Dtype(recipe.storage_dtype), shapes or {}
        columns = [
            ColumnSpec(name=name, dtype=dtype, width=math.prod(shapes.get(name, (width,))), shape=shapes.get(name, ()))
            for name in hookpoints
        ]
        identity = {"recipe": recipe.to_json(), "made_for": str(folder)}
        Manifest(
            set_id=set_id_of(identity), identity=identity, columns=(*PROVENANCE, *columns), segment_rows=segment_rows
        ).save(folder)
        return folder

    return make


@pytest.fixture
def extract(make_corpus, make_set):
    """Extracts in this process; returns (rows by column, events)."""

    def run(model, token_ids, hookpoints, *, allow_non_finite=False, max_rows=0, **recipe):
        folder = make_set(hookpoints, **recipe)
        command = Extract(
            set_id="x",
            set_path=str(folder),
            corpus_path=str(make_corpus(token_ids)),
            allow_non_finite=allow_non_finite,
            max_rows=max_rows,
        )
        events = run_command(command, model)
        return read_rows(folder, events[-1].n_rows), events

    return run


def run_command(command, model, gate=None, on_event=lambda _: None):
    from headrace_extractor.runner.gate import Gate
    from headrace_extractor.runner.passes.extract import run_extraction

    events = []

    def emit(event):
        events.append(event)
        on_event(event)

    run_extraction(command, gate or Gate(command.grant_row), model, emit)
    return events


def read_rows(folder, n_rows):
    """Returns all rows of a set by column, as numpy arrays; bfloat16 as its bits."""
    manifest = Manifest.load(folder)
    rows = {}
    for column in manifest.columns:
        reader = SetReader(folder, [column.name])
        parts, row = [], 0
        while row < n_rows:
            run = reader.read(row, n_rows, end_row=n_rows)
            parts.append(np.frombuffer(bytes(run.columns[0]), dtype=_NUMPY_DTYPES[column.dtype]))
            row = run.end_row
        reader.close()
        values = np.concatenate(parts) if parts else np.empty(0, _NUMPY_DTYPES[column.dtype])
        rows[column.name] = values.reshape(-1) if column.is_provenance else values.reshape(-1, column.width)
    return rows


def digests(folder):
    """Returns first row, row count and digests of each segment."""
    return [(record.first_row, record.n_rows, record.digests) for record in SegmentIndex.load(folder).records]


class RunnerInProcess:
    """A real runner; every wait has a deadline."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "headrace_extractor.runner"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._events = queue.Queue()
        self.seen = []
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self):
        return self._process.pid

    def send(self, command):
        self.send_raw(encode(command))

    def send_raw(self, line):
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def next(self, deadline_s=30.0):
        event = self._events.get(timeout=deadline_s)
        self.seen.append(event)
        return event

    def until(self, *kinds, deadline_s=30.0):
        """Reads events up to one of these kinds; any other `failed` event is an error."""
        end = time.monotonic() + deadline_s
        while True:
            event = self.next(max(0.0, end - time.monotonic()))
            if isinstance(event, kinds):
                return event
            assert not isinstance(event, Failed), event

    def close_input(self):
        self._process.stdin.close()

    def signal(self, number):
        os.kill(self.pid, number)

    def wait(self, deadline_s=10.0):
        return self._process.wait(deadline_s)

    def kill(self):
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout):
            stream.close()

    def _read(self):
        try:
            for line in self._process.stdout:
                self._events.put(decode(line))
        except ValueError:
            return  # Closed by `kill`.


@pytest.fixture
def start_runner():
    runners = []

    def start():
        runners.append(RunnerInProcess())
        return runners[-1]

    yield start
    for runner in runners:
        runner.kill()
