"""`python -m headrace_extractor.hub`: reads one dataset and writes its documents to standard output."""

from __future__ import annotations

import json
import os
import sys
import threading

from headrace_chassis.confined.limits import Limits, limit_memory
from headrace_chassis.errors import ServiceError
from headrace_extractor.errors import reason_of
from headrace_extractor.hub.job import DONE, FAILED, HubJob, frame

_BUFFER_BYTES = 256 * 1024
# `datasets` holds row groups of Parquet files, which have some hundred megabytes, a few at a time.
_MEMORY_BYTES = 8 * 1024**3


class Output:
    """Writes frames to standard output, many small frames at once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = bytearray()

    def send(self, kind: bytes, content: bytes = b"", *, now: bool = False) -> None:
        """Writes a frame; at once with `now`."""
        self._buffer += frame(kind, content)
        if now or len(self._buffer) >= _BUFFER_BYTES:
            data, self._buffer = memoryview(self._buffer), bytearray()
            while data:
                data = data[os.write(self._fd, data) :]


def main() -> None:
    """Carries out the job on standard input."""
    fd = os.dup(1)
    os.dup2(2, 1)  # Output printed by the libraries must not get between the frames.
    output = Output(fd)
    limit_memory(Limits(memory_bytes=_MEMORY_BYTES))
    job = HubJob.parse(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_input, name="input", daemon=True).start()
    try:
        from headrace_extractor.hub.reading import read_dataset  # noqa: PLC0415 -- takes a second; the input is watched meanwhile

        read_dataset(job, output.send)
        output.send(DONE, now=True)
    except ServiceError as exc:
        event = {
            "reason": reason_of(exc),
            "message": exc.message,
            "metadata": dict(exc.metadata),
            "field": exc.field,
            "retry_after_s": exc.retry_after_s,
        }
        output.send(FAILED, json.dumps(event).encode(), now=True)
    except MemoryError:
        message = f"Dataset {job.repo_id} takes more than {_MEMORY_BYTES // 2**30} GiB of memory to read; take another."
        event = {"reason": "CORPUS_MALFORMED", "message": message, "metadata": {}, "field": None, "retry_after_s": None}
        output.send(FAILED, json.dumps(event).encode(), now=True)
    except BrokenPipeError:
        pass


def _end_with_input() -> None:
    """Ends the process at the end of input: the server keeps it open as long as it wants documents."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
    os._exit(0)  # Threads of the libraries may still wait for connections.
