"""`headrace pull`: the options. `pulling/` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headrace_cli.commands.set_rows import extraction_or_set
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_done
from headrace_cli.pulling.pull import Pull
from headrace_cli.settings import settings_of


@reported
def pull(
    context: typer.Context,
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="EXTRACTION|SET", help="Id of an extraction, or of a set that is kept (its beginning is enough)."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="PATH", help="FILE.safetensors, or a folder for one safetensors file per column."
        ),
    ],
    columns: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Columns, separated by commas: hookpoints, token_id, document, position.  (default: all)",
        ),
    ] = "",
    rows: Annotated[
        str,
        typer.Option(
            metavar="START:END",
            help="Range of rows; either end may be left out. With an order or a shard, counted in that order.",
        ),
    ] = "",
    order: Annotated[str, typer.Option(help="sequential, or shuffled (block by block).")] = "sequential",
    seed: Annotated[int, typer.Option(help="Seed of the shuffled order.")] = 0,
    epoch: Annotated[int, typer.Option(help="Epoch; each has its own shuffled order.")] = 0,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Only every N-th block, from block I on; I counts from 0.")
    ] = "",
    block_rows: Annotated[int, typer.Option(metavar="N", help="Rows in a block; 0: 1024.")] = 0,
    transport: Annotated[
        str, typer.Option(help="mapped (from the set's files on this machine), inline (from the server), or auto.")
    ] = "auto",
) -> None:
    """Write the rows of an extraction or a set to files. The same command resumes an interrupted pull.

    Rows that are still being computed follow as they come.
    """
    from headrace_client import StreamTuning  # noqa: PLC0415
    from headrace_client.reading.columns import all_columns, with_scales  # noqa: PLC0415
    from headrace_client.values import Reading  # noqa: PLC0415

    settings = settings_of(context)
    start_row, end_row = parse_rows(rows)
    words: dict[str, Any] = {"order": order}  # Reading checks it.
    how: dict[str, Any] = {"transport": transport}  # StreamTuning checks it.
    reading = Reading(seed=seed, epoch=epoch, shard=parse_shard(shard), block_rows=block_rows, **words)
    with settings.connect() as client:
        named = tuple(name.strip() for name in columns.split(",") if name.strip())
        extraction = extraction_or_set(client, source, named)
        result = Pull(
            client,
            extraction,
            out,
            with_scales(extraction, named or all_columns(extraction)),
            start_row=start_row,
            end_row=end_row,
            reading=reading,
            tuning=StreamTuning(**how),
        ).run()
    text = f"{formats.count(result['n_rows'])} rows, {formats.size(result['size_bytes'])}: {result['path']}"
    print_done(settings, result, text)


def parse_rows(text: str) -> tuple[int, int]:
    """Reads `START:END`; 0 stands for an end that is left out."""
    if not text:
        return 0, 0
    start, colon, end = text.partition(":")
    try:
        found = int(start or 0), int(end or 0)
    except ValueError:
        found = -1, 0
    if not colon or found[0] < 0 or (end and found[1] <= found[0]):
        raise typer.BadParameter(f"{text!r} is not START:END", param_hint="--rows")
    return found


def parse_shard(text: str) -> tuple[int, int]:
    """Reads `I/N`; empty is 0/1, all rows."""
    index, slash, count = (text or "0/1").partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise typer.BadParameter(f"{text!r} is not I/N with I less than N", param_hint="--shard")
    return int(index), int(count)
