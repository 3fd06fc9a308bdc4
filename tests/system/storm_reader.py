"""A reader that may be killed: `storm_reader.py EXTRACTOR EXTRACTION FOLDER TRANSPORT PAUSE_S`.

Writes every column to its own file, each chunk at its place, and then the next row to read, which is where the next run
begins. Prints the next row after each chunk.
"""

# ruff: noqa: T201 -- the storm reads the rows from standard output

import os
import sys
import time
from pathlib import Path

from headrace_client import HeadraceClient, StreamTuning, errors
from headrace_client.values import PROVENANCE_COLUMNS, Extraction

PLACE = "next_row"
PATIENCE_S = 90.0


def main() -> None:
    address, extraction_id, place, transport, pause_s = sys.argv[1:]
    folder = Path(place)
    folder.mkdir(exist_ok=True)
    next_row = int((folder / PLACE).read_text()) if (folder / PLACE).exists() else 0
    with HeadraceClient.connect(extractor=address) as client:
        extraction = _found(client, extraction_id)
        columns = (*PROVENANCE_COLUMNS, *extraction.hookpoints)
        tuning = StreamTuning(chunk_bytes=8192, transport=transport)
        with client.chunks(extraction, columns, start_row=next_row, reader=folder.name, tuning=tuning) as stream:
            for chunk in stream:
                assert chunk.first_row == next_row
                for column, values in chunk.arrays.items():
                    _write(folder / column, values.tobytes(), next_row * values[0].nbytes)
                next_row = chunk.end_row
                draft = folder / f"{PLACE}.{os.getpid()}"
                draft.write_text(str(next_row))
                draft.replace(folder / PLACE)
                print(next_row, flush=True)
                time.sleep(float(pause_s))


def _found(client: HeadraceClient, extraction_id: str) -> Extraction:
    """Gets the extraction; tries again while the server is down."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return client.extractions.get(extraction_id)
        except errors.Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _write(path: Path, content: bytes, offset: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.pwrite(descriptor, content, offset)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
