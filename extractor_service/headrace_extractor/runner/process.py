"""The runner's frame: commands in, events out, one command carried out at a time.

A thread reads commands, so that `grant` and `stop` reach an extraction at work and the end of input ends the process at
once. torch is imported when the first command that needs it has arrived: a start that goes wrong is seen early.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
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
    Quantize,
    Quantized,
    Stop,
    Validate,
    decode,
    encode,
)
from headrace_extractor.runner.freed_memory import freed_memory_kept
from headrace_extractor.runner.gate import Gate
from headrace_extractor.runner.throttle import Throttle
from headrace_log.errors import DiskFull, LogError, TooManyFiles

if TYPE_CHECKING:
    from headrace_extractor.runner.models.loading import LoadedModel

# A server waits for one extraction before it sends the next; more than a few are its mistake.
_MAX_WAITING = 64
_PROGRESS_PER_SECOND = 20


class EventSink:
    """Writes events as lines; both threads do."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def emit(self, message: Message) -> None:
        """Writes one line; ends the process when nobody listens any more."""
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
        self._gates = _Gates()
        self._loaded: LoadedModel | None = None

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
            self.carry_out(*self._waiting.get())  # Ends with the process.

    def carry_out(self, command: Message, gate: Gate) -> None:
        """Carries out one command; whatever goes wrong becomes a `failed` event."""
        set_id = command.set_id if isinstance(command, Extract) else ""
        try:
            if isinstance(command, Load):
                self._load(command)
            elif isinstance(command, Extract):
                self._extract(command, gate)
            elif isinstance(command, Convert):
                self._convert(command)
            elif isinstance(command, Quantize):
                self._quantize(command)
            elif isinstance(command, Validate):
                self._validate(command)
        except Exception as exc:  # noqa: BLE001
            self._emit(replace(failure_of(exc), set_id=set_id))
        finally:
            self._gates.close(gate)

    def _take(self, command: Message) -> None:
        if isinstance(command, Grant | Stop):
            self._steer(command)
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

    def _steer(self, command: Grant | Stop) -> None:
        gate = self._gates.find(command.set_id)
        if gate is None:
            return  # It has ended meanwhile, and said so.
        if isinstance(command, Grant):
            gate.grant(command.row)
        else:
            gate.stop()

    def _load(self, command: Load) -> None:
        self._check_empty()
        from headrace_extractor.runner.models.loading import load_model  # noqa: PLC0415 -- torch

        self._loaded = load_model(
            Path(command.files_path),
            command.device,
            command.dtype,
            command.load_options,
            self._progress(lambda done, total: Loading(done_bytes=done, total_bytes=total)),
            quantization=command.quantization or "none",
        )
        self._emit(Loaded(measured_bytes=self._loaded.measured_bytes, runtime_bytes=self._loaded.runtime_bytes))

    def _extract(self, command: Extract, gate: Gate) -> None:
        if self._loaded is None:
            raise errors.StateConflict("No model is loaded in this runner; send load first.")
        from headrace_extractor.runner.passes.extract import run_extraction  # noqa: PLC0415 -- torch

        with freed_memory_kept():
            run_extraction(command, gate, self._loaded, self._emit)

    def _convert(self, command: Convert) -> None:
        from headrace_extractor.runner.models.convert import convert_gguf  # noqa: PLC0415 -- torch
        from headrace_extractor.runner.models.pickles import convert_pickled  # noqa: PLC0415 -- torch

        progress = self._progress(lambda done, total: Converting(done_bytes=done, total_bytes=total))
        source_path = Path(command.source_path)
        convert = convert_pickled if source_path.is_dir() else convert_gguf
        convert(source_path, Path(command.target_path), progress)
        self._emit(Converted())

    def _quantize(self, command: Quantize) -> None:
        self._check_empty()
        from headrace_extractor.runner.models.quantize import quantize  # noqa: PLC0415 -- torch

        progress = self._progress(lambda done, total: Converting(done_bytes=done, total_bytes=total))
        self._emit(Quantized(fidelity=quantize(command, progress)))

    def _validate(self, command: Validate) -> None:
        self._check_empty()
        from headrace_extractor.runner.models.validate import validate  # noqa: PLC0415 -- torch

        self._emit(validate(command, self._emit))

    def _check_empty(self) -> None:
        if self._loaded is not None:
            raise errors.StateConflict("This runner holds a model already; start another runner.")

    def _progress(self, event: Callable[[int, int], Message]) -> Callable[[int, int], None]:
        throttle = Throttle(_PROGRESS_PER_SECOND)

        def tell(done_bytes: int, total_bytes: int) -> None:
            if throttle.ready() or done_bytes >= total_bytes:
                self._emit(event(done_bytes, total_bytes))

        return tell


class _Gates:
    """Gates of the extractions that run or wait. An id may be used again while its last run is being put away."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_id: dict[str, Gate] = {}

    def open(self, set_id: str, gate: Gate) -> None:
        """Makes the gate the one that commands for this id reach."""
        with self._lock:
            self._by_id[set_id] = gate

    def find(self, set_id: str) -> Gate | None:
        """Returns the newest gate of an id."""
        with self._lock:
            return self._by_id.get(set_id)

    def close(self, gate: Gate) -> None:
        """Forgets this gate, and no newer one."""
        with self._lock:
            self._by_id = {key: kept for key, kept in self._by_id.items() if kept is not gate}


def failure_of(exc: Exception) -> Failed:
    """Turns an exception into an event; one that nobody foresaw leaves its trace on standard error only."""
    if isinstance(exc, errors.ExtractorError):
        field = {"field": exc.field} if exc.field else {}
        return Failed(reason=exc.reason, message=exc.message, metadata={**exc.metadata, **field})
    if isinstance(exc, DiskFull):
        sizes = {"required_bytes": str(exc.required_bytes), "free_bytes": str(exc.free_bytes)}
        return Failed(reason=errors.DiskFull.reason, message=str(exc), metadata=sizes)
    if isinstance(exc, TooManyFiles):
        limit = {"max_files": str(exc.max_files)}
        return Failed(reason=errors.TooManyStreams.reason, message=str(exc), metadata=limit)
    if isinstance(exc, LogError):  # The set contradicts itself.
        return Failed(reason=errors.DigestMismatch.reason, message=str(exc))
    traceback.print_exception(exc, file=sys.stderr)
    return Failed(reason="INTERNAL", message="Unexpected error in the runner; its standard error has the details.")
