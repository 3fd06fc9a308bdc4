"""One run of `headrace pull`: rows of an extraction into safetensors files, resumable at any point."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace_cli.output import formats
from headrace_cli.output.progress import Bar
from headrace_cli.output.results import note
from headrace_cli.processes.only_one import only_one
from headrace_cli.pulling import tensor_files
from headrace_cli.pulling.column_files import ColumnFiles
from headrace_cli.pulling.tensor_files import ColumnSpec

if TYPE_CHECKING:
    from headrace_client import ChunkStream, HeadraceClient, StreamTuning
    from headrace_client.values import Extraction, Reading

# A WINDOW set's forward pass may wait for rows to be released, which happens once they are on disk: look this often.
_TAKE_S = 0.05


class Pull:
    """One run of the command. Rows are counted in the order of `reading`."""

    def __init__(
        self,
        client: HeadraceClient,
        extraction: Extraction,
        out: Path,
        columns: tuple[str, ...],
        *,
        start_row: int,
        end_row: int,
        reading: Reading,
        tuning: StreamTuning,
    ) -> None:
        self._client = client
        self._extraction = extraction
        self._out = out
        self._one_file = out.suffix == ".safetensors"
        self._folder = out.with_name(out.name + ".part") if self._one_file else out
        self._columns = columns
        self._start_row, self._end_row = start_row, end_row
        self._reading = reading
        self._tuning = tuning
        self._identity: dict[str, Any] = {
            "set_id": extraction.set_id,
            "columns": list(columns),
            "start_row": start_row,
            "end_row": end_row or extraction.max_rows,
        }
        if order := reading.fields():
            # The number of blocks that are permuted or shared out follows from `max_rows`.
            self._identity |= {"order": order, "max_rows": extraction.max_rows}

    def run(self) -> dict[str, Any]:
        """Pulls the missing rows; returns the result. Raises AlreadyExists while another process pulls them."""
        done = self._done_before()
        if done is None or self._is_left_over():
            self._folder.mkdir(parents=True, exist_ok=True)
            with only_one(
                self._folder / tensor_files.LOCK_FILE,
                busy=f"`headrace pull` already writes {self._out}",
                remedy="let it end, stop it, or choose another --out",
            ):
                done = self._done_before()  # Another process may have finished before this one had the lock.
                if done is None:
                    return self._pull()
                if self._is_left_over():
                    tensor_files.remove(self._folder)
        note("already there, nothing pulled")
        return done

    def _done_before(self) -> dict[str, Any] | None:
        """Returns the result of a finished earlier run, or None. Raises AlreadyExists if other files are in the way."""
        if self._one_file and self._out.exists():
            metadata = tensor_files.read_metadata(self._out)
            if metadata.get("pull") == self._fingerprint():
                tensor_files.check_whole(self._out)
                return self._result(int(metadata["n_rows"]), self._out.stat().st_size)
            raise _in_the_way(self._out)
        state = tensor_files.read_state(self._folder)
        if state is None:
            if tensor_files.is_used(self._folder):
                raise _in_the_way(self._folder)
            return None
        if state["identity"] != self._identity:
            if not tensor_files.has_rows(self._folder, state):
                return None
            raise _in_the_way(self._folder)
        if not state.get("complete"):
            return None
        for column in state.get("columns", ()):  # Earlier versions did not save the columns.
            tensor_files.check_rows(self._folder, ColumnSpec(**column), state["n_rows"])
        return self._result(state["n_rows"], state["size_bytes"])

    def _is_left_over(self) -> bool:
        """True if the `.part` folder of this pull into one file exists: a run is at work, or was cut off."""
        if not self._one_file or not self._folder.exists():
            return False
        state = tensor_files.read_state(self._folder)
        return state["identity"] == self._identity if state else not tensor_files.is_used(self._folder)

    def _pull(self) -> dict[str, Any]:
        from headrace_client.reading.source import reader_name  # noqa: PLC0415

        try:
            state = tensor_files.read_state(self._folder)
            if state is None or state["identity"] != self._identity:
                state = self._save(reader_name(), self._start_row)
            elif state["next_row"] > self._start_row:
                note(f"goes on at row {formats.count(state['next_row'])}")
            # The reader name of the first run again: a WINDOW set keeps rows for the readers it knows.
            reader = state.setdefault("reader", reader_name())
            if "columns" not in state:
                with self._client.chunks(
                    self._extraction,
                    self._columns,
                    start_row=state["next_row"],
                    end_row=self._end_row,
                    reader=reader,
                    reading=self._reading,
                    tuning=self._tuning,
                ) as stream:
                    try:
                        state = self._copy(stream, state)
                    except BaseException:
                        stream.close(for_good=False)  # The reader comes back.
                        raise
            return self._finish(state)
        except KeyboardInterrupt:
            if state := tensor_files.read_state(self._folder):
                n_rows = formats.count(state["next_row"] - self._start_row)
                note(f"{n_rows} rows are kept; the same command goes on after them")
            raise

    def _copy(self, stream: ChunkStream, state: dict[str, Any]) -> dict[str, Any]:
        """Writes all rows; returns the state then. Rows written before an error are kept.

        The state with all rows has the columns too: from there on no stream is needed to finish. The rows of a WINDOW
        set are gone once the stream is closed.
        """
        from headrace_client.values import PROVENANCE_COLUMNS, Window  # noqa: PLC0415

        specs = [
            ColumnSpec(
                name=column.name,
                dtype=column.dtype.value,
                width=None if column.name in PROVENANCE_COLUMNS else column.width,
                row_bytes=column.row_bytes,
            )
            for column in stream.header.columns
        ]
        # Rows of a WINDOW set are released once they are on disk: a quarter of the window, so that it never fills up.
        retention = self._extraction.retention
        sync_bytes = retention.window_bytes / 4 if isinstance(retention, Window) else math.inf
        next_row, reader = state["next_row"], state["reader"]
        n_rows = next_row - self._start_row
        with ColumnFiles(self._folder, specs, n_rows, sync_bytes=sync_bytes) as files, Bar("pull") as bar:
            try:
                while (chunk := stream.take(_TAKE_S, keep_from=next_row)) is not None or not stream.ended:
                    if chunk is not None:
                        files.write(chunk.buffers, chunk.n_rows)
                    self._show(bar, stream)
                    if files.sync_is_due or (files.is_behind and stream.held_up):
                        files.sync()
                        next_row = self._start_row + files.n_rows
                        self._save(reader, next_row)
            except BaseException:
                files.sync()
                self._save(reader, self._start_row + files.n_rows)
                raise
            self._show(bar, stream)
            files.sync()
            return self._save(reader, self._start_row + files.n_rows, columns=[asdict(spec) for spec in specs])

    def _finish(self, state: dict[str, Any]) -> dict[str, Any]:
        """Writes the headers, and joins the columns of a single file; returns the result."""
        specs = [ColumnSpec(**column) for column in state["columns"]]
        n_rows = state["next_row"] - self._start_row
        metadata = self._metadata(n_rows)
        with ColumnFiles(self._folder, specs, n_rows) as files:
            files.finish(metadata)
        if self._one_file:
            tensor_files.join(specs, self._folder, n_rows, metadata, self._out)
            tensor_files.remove(self._folder)
            return self._result(n_rows, self._out.stat().st_size)
        size_bytes = sum(spec.row_bytes for spec in specs) * n_rows
        tensor_files.write_state(self._folder, {**state, "complete": True, "n_rows": n_rows, "size_bytes": size_bytes})
        return self._result(n_rows, size_bytes)

    def _save(self, reader: str, next_row: int, **more: Any) -> dict[str, Any]:
        state = {"identity": self._identity, "reader": reader, "next_row": next_row, **more}
        tensor_files.write_state(self._folder, state)
        return state

    def _show(self, bar: Bar, stream: ChunkStream) -> None:
        progress = stream.progress()
        rows = progress.next_row - self._start_row
        whole = progress.end_row - self._start_row if progress.end_row else None
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

    def _metadata(self, n_rows: int) -> Mapping[str, str]:
        return {
            "source": "headrace",
            "set_id": self._extraction.set_id,
            "model_id": self._extraction.model_id,
            "corpus_id": self._extraction.corpus_id,
            "first_row": str(self._start_row),
            "n_rows": str(n_rows),
            **{name: str(value) for name, value in self._reading.fields().items()},
            "pull": self._fingerprint(),
        }

    def _fingerprint(self) -> str:
        """A digest of the identity: a header has no room for the names of hundreds of columns."""
        return hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()


def _in_the_way(path: Path) -> Exception:
    from headrace_client.errors import AlreadyExists  # noqa: PLC0415

    return AlreadyExists(
        f"{path} holds something else than these rows of these columns",
        reason="FILE_EXISTS",
        remedy="choose another --out, or remove it",
    )
