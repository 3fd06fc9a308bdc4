"""The reader of the reading benchmark: `python -m bench.reading_client ADDRESS SET`.

Answers each question with rows, seconds from opening the stream to its last batch, and the sum of one byte of each row.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench.processes import answer, questions
from bench.replay import EXTRACTION_ID, HOOKPOINT, runs
from headrace_client import HeadraceClient, Reading, StreamTuning
from headrace_log.manifest import Manifest

BATCH_SIZE = 4096


def streamed(client: HeadraceClient, side: str) -> Iterator[torch.Tensor]:
    """Yields batches as a trainer gets them."""
    transport, _, how = side.partition(" ")
    reading = Reading(order="shuffled", seed=1) if how == "shuffled" else Reading()
    tuning = StreamTuning(transport=transport)
    with client.activations(
        EXTRACTION_ID, columns=HOOKPOINT, batch_size=BATCH_SIZE, reading=reading, tuning=tuning
    ) as stream:
        yield from stream
        assert stream.header.mapped == (transport == "mapped")


def copied(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields fresh batches, copied by the same call from memory that this process holds already."""
    raw = rows.view(torch.uint8).numpy()
    for at in range(0, len(rows), BATCH_SIZE):
        batch = torch.empty((min(BATCH_SIZE, len(rows) - at), rows.shape[1]), dtype=rows.dtype)
        np.copyto(batch.view(torch.uint8).numpy(), raw[at : at + BATCH_SIZE])
        yield batch


def resident(folder: Path) -> torch.Tensor:
    """Returns the whole column in anonymous memory."""
    manifest = Manifest.load(folder)
    n_rows, width = manifest.total_rows, manifest.column(HOOKPOINT).width
    assert n_rows is not None, "the set is sealed"
    rows = torch.empty((n_rows, width), dtype=torch.bfloat16)
    raw = rows.view(torch.uint8).numpy().reshape(n_rows, -1)
    for run in runs(folder, n_rows):
        raw[run.first_row : run.end_row] = np.frombuffer(run.columns[0], np.uint8).reshape(run.n_rows, -1)
    return rows


def main() -> None:
    """Answers questions until standard input ends."""
    address, folder = sys.argv[1:]
    rows = resident(Path(folder))
    with HeadraceClient.connect(extractor=address) as client:
        for question in questions():
            side = question["side"]
            began, n_rows, checksum = time.perf_counter(), 0, 0
            for batch in copied(rows) if side == "copy" else streamed(client, side):
                n_rows += len(batch)
                checksum += int(batch.view(torch.uint8).numpy()[:, 0].sum(dtype=np.int64))
            answer({"n_rows": n_rows, "seconds": time.perf_counter() - began, "checksum": checksum})


if __name__ == "__main__":
    main()
