"""`headrace pull`: rows of an extraction as safetensors files, resumable."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.progress import Bar
from headrace_cli.output.results import note, print_json
from headrace_cli.processes.only_one import only_one
from headrace_cli.pulling import tensor_files
from headrace_cli.pulling.column_files import ColumnFiles
from headrace_cli.pulling.tensor_files import ColumnSpec
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client import ChunkStream, HeadraceClient
    from headrace_client.order import Reading
    from headrace_client.values import Column, Extraction

_TAKE_S = 0.05  # A window that is full waits no longer than that before its rows are brought to disk.


@reported
def pull(
    context: typer.Context,
    *,
    extraction_id: Annotated[str, typer.Argument(metavar="EXTRACTION")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="FILE.safetensors for one file, or a folder of one per column.")
    ],
    columns: Annotated[
        str, typer.Option(help="Comma-separated: hookpoints, token_id, document, position.  (default: all)")
    ] = "",
    rows: Annotated[str, typer.Option(help="START:END, either may be left out; places, if rows are reordered.")] = "",
    order: Annotated[str, typer.Option(help="sequential, or shuffled in blocks.")] = "sequential",
    seed: Annotated[int, typer.Option(help="Of the shuffled order.")] = 0,
    epoch: Annotated[int, typer.Option(help="Each has a shuffled order of its own.")] = 0,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Every N-th block from block I on, counted from 0.")] = "",
    block_rows: Annotated[int, typer.Option(help="Rows in a block; 0: 1024.")] = 0,
    transport: Annotated[str, typer.Option(help="auto, inline or mapped.")] = "auto",
) -> None:
    """Write an extraction's rows to disk as they come. Interrupted, the same command goes on where it stopped."""
    settings = settings_of(context)
    start_row, end_row = parse_rows(rows)
    reading = _reading(order=order, seed=seed, epoch=epoch, shard=parse_shard(shard), block_rows=block_rows)
    with settings.connect() as client:
        extraction = client.extractions.get(extraction_id)
        wanted = _columns(extraction, columns)
        result = _Pull(client, extraction, out, wanted, start_row, end_row, reading=reading, transport=transport).run()
    if settings.json:
        print_json(result)
    else:
        note(f"{formats.count(result['n_rows'])} rows, {formats.size(result['size_bytes'])}: {result['path']}")


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
    """Reads `I/N`."""
    index, slash, count = (text or "0/1").partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise typer.BadParameter(f"{text!r} is not I/N with I less than N", param_hint="--shard")
    return int(index), int(count)


class _Pull:
    """One run of the command. Rows are counted as `reading` counts them."""

    def __init__(
        self,
        client: HeadraceClient,
        extraction: Extraction,
        out: Path,
        columns: tuple[str, ...],
        *rows: int,
        reading: Reading,
        transport: str,
    ) -> None:
        self._client = client
        self._extraction = extraction
        self._out = out
        self._one_file = out.suffix == ".safetensors"
        self._folder = out.with_name(out.name + ".part") if self._one_file else out
        start_row, end_row = rows
        self._identity: dict[str, Any] = {
            "set_id": extraction.set_id,
            "columns": list(columns),
            "start_row": start_row,
            "end_row": end_row or extraction.max_rows,
        }
        self._order = reading.fields()
        if self._order:
            # As many blocks as its rows make are permuted or shared out.
            self._identity |= {"order": self._order, "max_rows": extraction.max_rows}
        self._options: dict[str, Any] = {
            "order": reading.order,
            "seed": reading.seed,
            "epoch": reading.epoch,
            "shard": reading.shard,
            "block_rows": reading.block_rows,
            "transport": transport,
        }
        self._reader = _reader_name()
        self._columns = columns
        self._start_row, self._end_row = start_row, end_row

    def run(self) -> dict[str, Any]:
        """Pulls what is missing. Raises AlreadyExists while another process does."""
        done = self._done_before()
        if done is None or self._is_left_over():
            with self._alone():
                done = self._done_before()  # Another one may have finished just now.
                if done is None:
                    return self._pull_and_tell()
                if self._is_left_over():
                    tensor_files.remove(self._folder)
        note("already there, nothing pulled")
        return done

    def _alone(self) -> AbstractContextManager[None]:
        """Keeps other pulls out of the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return only_one(
            self._folder / tensor_files.LOCK_FILE,
            busy=f"`headrace pull` already writes {self._out}",
            remedy="let it end, stop it, or choose another --out",
        )

    def _pull_and_tell(self) -> dict[str, Any]:
        try:
            return self._pull()
        except KeyboardInterrupt:
            if state := tensor_files.read_state(self._folder):
                n_rows = formats.count(state["next_row"] - self._start_row)
                note(f"{n_rows} rows are kept; the same command goes on behind them")
            raise

    def _pull(self) -> dict[str, Any]:
        state = tensor_files.read_state(self._folder)
        if state is None:
            state = self._save(self._start_row)
        elif state["next_row"] > self._start_row:
            note(f"goes on at row {formats.count(state['next_row'])}")
        self._reader = state.get("reader", self._reader)  # Whose rows of a WINDOW set wait for it.
        if "columns" not in state:
            state = self._stream(state["next_row"])
        return self._finish([ColumnSpec(**column) for column in state["columns"]], state["next_row"])

    def _stream(self, next_row: int) -> dict[str, Any]:
        """Brings all rows to disk; returns the state then."""
        with self._client.chunks(
            self._extraction,
            self._columns,
            start_row=next_row,
            end_row=self._end_row,
            reader=self._reader,
            **self._options,
        ) as stream:
            try:
                return self._copy(stream, [_spec(column) for column in stream.header.columns], next_row)
            except BaseException:
                stream.close(for_good=False)
                raise

    def _done_before(self) -> dict[str, Any] | None:
        """The result of an earlier run that was finished; raises if something else is in the way."""
        if self._one_file and self._out.exists():
            metadata = tensor_files.read_metadata(self._out)
            if metadata.get("pull") == self._fingerprint():
                return self._result(int(metadata["n_rows"]), self._out.stat().st_size)
            raise _in_the_way(self._out)
        state = tensor_files.read_state(self._folder)
        if state is None:
            if tensor_files.is_used(self._folder):
                raise _in_the_way(self._folder)
            return None
        if state["identity"] != self._identity:
            raise _in_the_way(self._folder)
        if not state.get("complete"):
            return None
        for column in state.get("columns", ()):  # Earlier versions kept none.
            tensor_files.check_rows(self._folder, ColumnSpec(**column), state["n_rows"])
        return self._result(state["n_rows"], state["size_bytes"])

    def _is_left_over(self) -> bool:
        """True if the folder is that of this pull into one file, at work or cut off."""
        if not self._one_file or not self._folder.exists():
            return False
        state = tensor_files.read_state(self._folder)
        return state["identity"] == self._identity if state else not tensor_files.is_used(self._folder)

    def _save(self, next_row: int, **more: Any) -> dict[str, Any]:
        state = {"identity": self._identity, "reader": self._reader, "next_row": next_row, **more}
        tensor_files.write_state(self._folder, state)
        return state

    def _copy(self, stream: ChunkStream, specs: list[ColumnSpec], next_row: int) -> dict[str, Any]:
        """Writes all rows; returns the state then. What is written when it breaks off is kept.

        With all rows, the state has the columns: from there on it can be finished without a stream, since the rows of a
        WINDOW set go when that is closed.
        """
        n_rows, sync_bytes = next_row - self._start_row, _sync_bytes(self._extraction)
        with ColumnFiles(self._folder, specs, n_rows, sync_bytes=sync_bytes) as files, Bar("pull") as bar:
            try:
                while (chunk := stream.take(_TAKE_S, keep_from=next_row)) is not None or not stream.ended:
                    if chunk is not None:
                        files.write(chunk.buffers, chunk.n_rows)
                    _show(bar, stream, self._start_row)
                    if files.sync_is_due or (files.is_behind and stream.held_up):
                        next_row = self._sync(files)["next_row"]
            except BaseException:
                self._sync(files)
                raise
            _show(bar, stream, self._start_row)
            return self._sync(files, columns=[asdict(spec) for spec in specs])

    def _sync(self, files: ColumnFiles, **more: Any) -> dict[str, Any]:
        """Brings to disk what is not there yet; returns the state then."""
        files.sync()
        return self._save(self._start_row + files.n_rows, **more)

    def _finish(self, specs: list[ColumnSpec], end_row: int) -> dict[str, Any]:
        n_rows = end_row - self._start_row
        with ColumnFiles(self._folder, specs, n_rows) as files:
            files.finish(self._metadata(end_row))
        if self._one_file:
            tensor_files.join(specs, self._folder, n_rows, self._metadata(end_row), self._out)
            tensor_files.remove(self._folder)
            return self._result(n_rows, self._out.stat().st_size)
        size_bytes = sum(spec.row_bytes for spec in specs) * n_rows
        columns = [asdict(spec) for spec in specs]
        self._save(end_row, complete=True, columns=columns, n_rows=n_rows, size_bytes=size_bytes)
        return self._result(n_rows, size_bytes)

    def _result(self, n_rows: int, size_bytes: int) -> dict[str, Any]:
        return {
            "extraction_id": self._extraction.id,
            "set_id": self._extraction.set_id,
            "columns": list(self._columns),
            "start_row": self._start_row,
            "n_rows": n_rows,
            "size_bytes": size_bytes,
            "path": str(self._out.absolute()),
        }

    def _metadata(self, end_row: int) -> Mapping[str, str]:
        return {
            "source": "headrace",
            "set_id": self._extraction.set_id,
            "model_id": self._extraction.model_id,
            "corpus_id": self._extraction.corpus_id,
            "first_row": str(self._start_row),
            "n_rows": str(end_row - self._start_row),
            **{name: str(value) for name, value in self._order.items()},
            "pull": self._fingerprint(),
        }

    def _fingerprint(self) -> str:
        """What was pulled, in little: a header has no room for the names of hundreds of columns."""
        return hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()


def _reading(**options: Any) -> Reading:
    from headrace_client.order import Reading  # noqa: PLC0415

    return Reading(**options)


def _reader_name() -> str:
    from headrace_client.extractions import reader_name  # noqa: PLC0415

    return reader_name()


def _sync_bytes(extraction: Extraction) -> float:
    """How much may be on its way to disk: of a WINDOW set little enough that its forward pass need not wait for it."""
    from headrace_client.values import Window  # noqa: PLC0415

    retention = extraction.retention
    return retention.window_bytes / 4 if isinstance(retention, Window) else math.inf


def _columns(extraction: Extraction, text: str) -> tuple[str, ...]:
    from headrace_client.extractions import all_columns, with_scales  # noqa: PLC0415

    named = tuple(name.strip() for name in text.split(",") if name.strip())
    return with_scales(extraction, named or all_columns(extraction))


def _spec(column: Column) -> ColumnSpec:
    from headrace_client.values import PROVENANCE_COLUMNS  # noqa: PLC0415

    return ColumnSpec(
        name=column.name,
        dtype=column.dtype.value,
        width=None if column.name in PROVENANCE_COLUMNS else column.width,
        row_bytes=column.row_bytes,
    )


def _show(bar: Bar, stream: ChunkStream, start_row: int) -> None:
    progress = stream.progress()
    rows = progress.next_row - start_row
    whole = progress.end_row - start_row if progress.end_row else None
    facts = [
        f"{formats.count(rows)} rows",
        f"{formats.count(progress.rows_per_s)} rows/s",
        formats.size(progress.size_bytes),
    ]
    if whole and progress.rows_per_s > 0:
        facts.append(f"{formats.duration((whole - rows) / progress.rows_per_s)} left")
    if progress.mapped:
        facts.append("mapped")
    if progress.state == "WAITING" and progress.extraction_state is not None:
        facts.append(f"the extraction is {progress.extraction_state.lower()}")
    bar.show(progress.state.lower(), rows / whole if whole else None, " · ".join(facts))


def _in_the_way(path: Path) -> Exception:
    from headrace_client.errors import AlreadyExists  # noqa: PLC0415

    return AlreadyExists(
        f"{path} holds something else than these rows of these columns",
        reason="FILE_EXISTS",
        remedy="choose another --out, or remove it",
    )
