"""The runner's frame: commands in, events out, one command carried out at a time.

A thread reads commands, so that `grant` and `stop` reach a running extraction and the end of input ends the process at
once. Rooms that need torch are imported when the first command that needs them has arrived: the process answers within
a moment of its start, and a failed import is answered like any other failure.
"""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from headrace_extractor import errors
from headrace_extractor.node.runner_protocol import (
    MAX_LINE_BYTES,
    Convert,
    Converted,
    Converting,
    Extract,
    Failed,
    Grant,
    Load,
    Loaded,
    Loading,
    Message,
    Prepare,
    Prepared,
    Quantize,
    Quantized,
    Stop,
    Validate,
    decode,
    encode,
)
from headrace_extractor.runner.freed_memory import freed_memory_kept
from headrace_extractor.runner.gate import Gate, Gates
from headrace_extractor.runner.throttle import Throttle
from headrace_log.errors import DigestMismatch, DiskFull, LockHeld, LogError, NoLocks, TooManyFiles

if TYPE_CHECKING:
    from headrace_extractor.runner.models.loading import LoadedModel

# The server waits for the end of one extraction before it sends the next; a queue this long is a mistake of its own.
_MAX_WAITING = 64
# Smooth for a person to watch; each event wakes the server.
_PROGRESS_PER_SECOND = 20


class EventSink:
    """Writes events as lines, for both threads of the runner."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def emit(self, message: Message) -> None:
        """Writes one line; ends the process if the server has closed its end of the pipe."""
        line = memoryview(encode(message))
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._fd, line) :]
            except BrokenPipeError:
                os._exit(1)


class Runner:
    """Holds at most one model and carries out commands in order."""

    def __init__(self, emit: Callable[[Message], None]) -> None:
        self._emit = emit
        self._waiting: queue.Queue[tuple[Message, Gate]] = queue.Queue(_MAX_WAITING)
        self._gates = Gates()
        self._loaded: LoadedModel | None = None
        self._verified: set[tuple[int, ...]] = set()  # Stamps of corpora that were compared with their digests.

    def read_commands(self, stream: BinaryIO) -> None:
        """Takes commands until the end of input, which means that the server is gone: then ends the process."""
        while line := stream.readline(MAX_LINE_BYTES):
            try:
                self._take(decode(line))
            except Exception as exc:  # noqa: BLE001 -- a bad command is answered; the runner goes on.
                self._emit(failure_of(exc))
        os._exit(0)

    def run(self) -> None:
        """Carries out commands as they come; never returns."""
        while True:
            self.carry_out(*self._waiting.get())  # No deadline: the wait ends with the process.

    def carry_out(self, command: Message, gate: Gate) -> None:
        """Carries out one command; every exception becomes a `failed` event."""
        set_id = command.set_id if isinstance(command, Extract) else ""
        try:
            if isinstance(command, Prepare):
                self._prepare()
            elif isinstance(command, Load):
                self._load(command)
            elif isinstance(command, Extract):
                if self._loaded is None:
                    raise errors.StateConflict("No model is loaded in this runner; send load first.")  # noqa: TRY301
                from headrace_extractor.runner.passes.extract import run_extraction  # noqa: PLC0415 -- torch

                with freed_memory_kept():
                    run_extraction(command, gate, self._loaded, self._emit, verified=self._verified)
            elif isinstance(command, Convert):
                self._convert(command)
            elif isinstance(command, Quantize):
                self._check_empty()
                with _collector_paused():
                    from headrace_extractor.runner.models.quantize import quantize  # noqa: PLC0415 -- torch

                self._emit(Quantized(fidelity=quantize(command, self._progress(Converting))))
            elif isinstance(command, Validate):
                self._check_empty()
                with _collector_paused():
                    from headrace_extractor.runner.models.validate import validate  # noqa: PLC0415 -- torch

                self._emit(validate(command, self._emit))
        except Exception as exc:  # noqa: BLE001
            self._emit(replace(failure_of(exc), set_id=set_id))
        finally:
            self._gates.close(gate)

    def _take(self, command: Message) -> None:
        """Queues a command with its gate; `grant` and `stop` act at once on the gate of an earlier `extract`."""
        if isinstance(command, Grant | Stop):
            gate = self._gates.find(command.set_id)
            if gate is None:
                return  # The extraction has ended in the meantime, and the server was told.
            if isinstance(command, Grant):
                gate.grant(command.row)
            else:
                gate.stop()
            return
        set_id = command.set_id if isinstance(command, Extract) else ""
        gate = Gate(command.grant_row if isinstance(command, Extract) else None)
        self._gates.open(set_id, gate)
        try:
            self._waiting.put_nowait((command, gate))
        except queue.Full:
            self._gates.close(gate)
            full = errors.QueueFull(f"The runner has {_MAX_WAITING} commands waiting; wait for one to finish.")
            self._emit(replace(failure_of(full), set_id=set_id))

    def _prepare(self) -> None:
        """Imports the larger part of what any command needs that makes or loads a model."""
        with _collector_paused():
            import headrace_extractor.runner.models.loading  # noqa: PLC0415 -- torch
            import headrace_extractor.runner.passes.extract  # noqa: F401, PLC0415 -- torch

        self._emit(Prepared())

    def _load(self, command: Load) -> None:
        self._check_empty()
        with _collector_paused():
            from headrace_extractor.runner.models.loading import load_model  # noqa: PLC0415 -- torch

        self._loaded = load_model(
            Path(command.files_path),
            command.device,
            command.dtype,
            command.load_options,
            self._progress(Loading),
            quantization=command.quantization or "none",
            files=command.files,
        )
        self._emit(Loaded(measured_bytes=self._loaded.measured_bytes, runtime_bytes=self._loaded.runtime_bytes))

    def _convert(self, command: Convert) -> None:
        """Converts a GGUF file, a tokenizer, or pickled weights, for which transformers is not imported."""
        source, target = Path(command.source_path), Path(command.target_path)
        if command.tokenizer:
            with _collector_paused():
                from headrace_extractor.runner.models.tokenizer_files import convert_tokenizer  # noqa: PLC0415

            convert_tokenizer(source, target)
        elif source.is_dir():
            from headrace_extractor.runner.models.pickles import convert_pickled  # noqa: PLC0415 -- torch

            convert_pickled(source, target, self._progress(Converting))
        else:
            with _collector_paused():
                from headrace_extractor.runner.models.convert import convert_gguf  # noqa: PLC0415 -- torch

            convert_gguf(source, target, self._progress(Converting))
        self._emit(Converted())

    def _check_empty(self) -> None:
        if self._loaded is not None:
            raise errors.StateConflict("This runner holds a model already; start another runner.")

    def _progress(self, kind: type[Loading | Converting]) -> Callable[[int, int], None]:
        """Returns a callback for bytes done and in all; it emits an event a few times a second, and at the end."""
        throttle = Throttle(_PROGRESS_PER_SECOND)

        def tell(done_bytes: int, total_bytes: int) -> None:
            if throttle.ready() or done_bytes >= total_bytes:
                self._emit(kind(done_bytes=done_bytes, total_bytes=total_bytes))

        return tell


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pauses the garbage collector for imports, and keeps the imported objects out of later collections.

    torch and transformers make some 370,000 objects that live as long as the process. Collections find next to nothing
    among them, and take a sixth of the processor time until a model is loaded.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def failure_of(exc: Exception) -> Failed:
    """Turns an exception into an event; an unexpected one leaves its traceback on standard error only."""
    if isinstance(exc, errors.ExtractorError):
        field = {"field": exc.field} if exc.field else {}
        return Failed(reason=exc.reason, message=exc.message, metadata={**exc.metadata, **field})
    if isinstance(exc, DiskFull):
        sizes = {"required_bytes": str(exc.required_bytes), "free_bytes": str(exc.free_bytes)}
        return Failed(reason=errors.DiskFull.reason, message=str(exc), metadata=sizes)
    if isinstance(exc, TooManyFiles):
        limit = {"max_files": str(exc.max_files)}
        return Failed(reason=errors.TooManyStreams.reason, message=str(exc), metadata=limit)
    if isinstance(exc, DigestMismatch):
        message = f"{exc}; run `headrace sets verify`, which sets it aside, then start the extraction again."
        return Failed(reason=errors.DigestMismatch.reason, message=message)
    if isinstance(exc, LogError):
        # A runner of a server that was killed may hold the lock for a moment; else the set contradicts itself.
        kinds = {LockHeld: errors.WaitTimeout, NoLocks: errors.StateConflict}
        return Failed(reason=kinds.get(type(exc), errors.DigestMismatch).reason, message=str(exc))
    traceback.print_exception(exc, file=sys.stderr)
    return Failed(reason="INTERNAL", message="Unexpected error in the runner; its standard error has the details.")
