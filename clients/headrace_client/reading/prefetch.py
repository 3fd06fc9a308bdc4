"""The thread that keeps a stream going: reads ahead, reconnects, and checks that no row is missing or comes twice."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from headrace_client.errors import DataLoss, HeadraceError, RowsNotContiguous, Unavailable, Unimplemented
from headrace_client.reading.chunk import ActivationChunk
from headrace_client.reading.chunk_queue import ChunkQueue
from headrace_client.reading.mapped import MappedRows, Unmappable
from headrace_client.reading.outage import Outage
from headrace_client.reading.source import StreamRequest
from headrace_client.reading.waits import Waited
from headrace_client.rpc.convert.extractions import extraction_state_from_pb
from headrace_client.rpc.convert.streams import header_from_pb, stream_event_from_pb
from headrace_client.values import Column, ExtractionState, StreamHeader, StreamState
from headrace_log import frames

JOIN_DEADLINE_S = 6.0  # Longer than the lookup of an address, which a reconnecting thread may be in.
_LARGEST_CHUNK_BYTES = 16 * 1024 * 1024
_LOG = logging.getLogger("headrace_client")


class Messages(Protocol):
    """The serialized messages of one connection."""

    def __iter__(self) -> Iterator[memoryview]:
        """Raises HeadraceError when the connection breaks."""

    def tend(self) -> None:
        """Keeps the connection alive while no message is asked for."""

    def close(self) -> None:
        """Cancels the connection, from any thread."""


class Source(Protocol):
    """The server's side of a stream."""

    def open(self, start_row: int, *, again: bool) -> AbstractContextManager[Messages]:
        """Connects; `again` after a failure, when the server may have moved."""

    def greeted(self, header: StreamHeader) -> None:
        """Takes the header of each connection. Raises Unmappable where the caller wants rows from files only."""

    def stop_mapping(self, why: Unmappable) -> None:
        """Asks for rows in messages from now on. Raises where the caller wants rows from files only."""

    def release(self, row: int) -> None:
        """Tells the server that rows before `row` may go."""


class Prefetcher:
    """Reads a stream into a bounded queue, from a thread. Errors are raised where chunks are taken from the queue."""

    def __init__(self, source: Source, request: StreamRequest) -> None:
        self.queue = ChunkQueue(request.tuning.queue_bytes)
        self.state = StreamState.CONNECTING
        self.extraction_state: ExtractionState | None = None
        self.n_rows_committed = 0
        self.n_reconnects = 0
        self.waited = Waited(since=time.monotonic())
        self.header: StreamHeader | None = None
        self.header_ready = threading.Event()
        self._source = source
        self._request = request
        self._next_row = request.start_row
        self._mapping: MappedRows | None = None
        self._stopping = threading.Event()
        self._messages: Messages | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="headrace-prefetch", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        # Mapped, never touched, freed at once: has glibc keep the memory of chunks for the next ones. It gives back
        # idle memory beyond twice the largest mapped block that was ever freed, and takes it anew page by page, which
        # costs a sixth of a fast reader's time. A process that trains has freed larger blocks anyway.
        bytes(_LARGEST_CHUNK_BYTES)
        self._thread.start()

    @property
    def mapped(self) -> bool:
        """True if the latest connection announces rows in files, or did so until it ended."""
        return self.header is not None and self.header.mapped

    @property
    def held_up(self) -> bool:
        """True if the forward pass waited for readers when the server last spoke."""
        return self.state is StreamState.WAITING and self.extraction_state is ExtractionState.WAITING

    def stop(self) -> None:
        """Cancels the connection and waits for the thread, up to a deadline."""
        self._stopping.set()
        self.queue.close()
        with self._lock:
            messages = self._messages
        if messages is not None:
            messages.close()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(JOIN_DEADLINE_S)

    def _run(self) -> None:
        try:
            self._pump()
        except Exception as exc:  # noqa: BLE001 - whatever it is, the consumer must see it.
            if not self._stopping.is_set():
                self.queue.fail(exc)
        finally:
            self.state = StreamState.ENDED
            self.waited = self.waited.over(time.monotonic())

    def _pump(self) -> None:
        """Opens connections one after another until the stream has ended, was stopped or can't go on."""
        tuning = self._request.tuning
        outage = Outage(deadline_s=tuning.reconnect_deadline_s, backoff=tuning.backoff)
        again = False
        while not self._stopping.is_set():
            try:
                ended = self._connection(outage, again=again)
            except Unmappable as exc:
                self._source.stop_mapping(exc)
                _LOG.info("stream at row %d: %s; rows come in messages instead", self._next_row, exc)
                continue
            except HeadraceError as exc:
                if self._stopping.is_set():
                    return
                pause_s = outage.pause_s(exc, self._next_row)
                _LOG.info("stream at row %d: %s; reconnecting in %.1f s", self._next_row, exc, pause_s)
            else:
                if ended:
                    self.queue.finish()
                return
            finally:
                if self._mapping is not None:
                    self._mapping.close()
                    self._mapping = None
                now = time.monotonic()
                self.waited = self.waited.over(now).begun(now)  # For a new connection, if there is one.
            self.state = StreamState.RECONNECTING
            self.n_reconnects += 1
            again = True
            self._stopping.wait(pause_s)

    def _connection(self, outage: Outage, *, again: bool) -> bool:
        """Reads one connection; True at the stream's end, False when stopped."""
        with self._source.open(self._next_row, again=again) as messages:
            # Either `stop` finds this connection and cancels it, or this thread finds that it has to stop.
            with self._lock:
                self._messages = messages
            if self._stopping.is_set():
                return False
            greeted = False
            for message in messages:
                chunk = _decode(message)
                if chunk is None:
                    if self._event(message, outage):
                        return True
                    greeted = True
                elif not greeted:
                    raise DataLoss("rows came before the stream's header")
                elif not self._rows(chunk, messages, outage):
                    return False
        raise Unavailable("the stream ended without its end message")

    def _rows(self, chunk: frames.Chunk, messages: Messages, outage: Outage) -> bool:
        """Checks and queues a chunk; False when stopped."""
        assert self.header is not None
        place = chunk.position if self.header.block_rows else chunk.first_row
        if place != self._next_row or chunk.n_rows < 1:
            raise RowsNotContiguous(
                f"rows {place} to {place + chunk.n_rows} came where row {self._next_row} was due",
                metadata={"next_row": str(self._next_row), "first_row": str(place)},
            )
        outage.row()
        self.waited = self.waited.over(outage.alive_at)
        self.state = StreamState.STREAMING
        if self._mapping is None or chunk.column_offsets:
            parts = iter((_cut(chunk, place, self.header.columns),))
        else:  # Rows without a payload: the server only announces them, and they lie in the set's files.
            parts = self._mapping.chunks(chunk, place)
        going_on = True
        for part in parts:
            going_on = self.queue.put(part, while_full=messages.tend)
            if not going_on:
                break
            self._next_row = part.end_place
        self.n_rows_committed = max(self.n_rows_committed, chunk.end_row)
        outage.alive()  # The wait for room in the queue was no silence.
        self.waited = self.waited.begun(outage.alive_at)
        return going_on

    def _event(self, message: memoryview, outage: Outage) -> bool:
        """Takes a header, a progress or an end; True for the end."""
        event = stream_event_from_pb(bytes(message))
        match event.WhichOneof("event"):
            case "header":
                self._greet(header_from_pb(event.header))
            case "progress":
                outage.alive()
                self.waited = self.waited.over(outage.alive_at, no_rows=True).begun(outage.alive_at)
                self.state = StreamState.WAITING
                self.n_rows_committed = event.progress.n_rows
                self.extraction_state = extraction_state_from_pb(event.progress.state)
            case "end":
                if event.end.next_row != self._next_row:
                    raise RowsNotContiguous(
                        f"the stream ended at row {event.end.next_row}, received were those before {self._next_row}"
                    )
                self.n_rows_committed = event.end.n_rows
                return True
            case _:
                pass  # A kind of message that this client does not know yet.
        return False

    def _greet(self, header: StreamHeader) -> None:
        """Checks that a connection brings the rows asked for, and the same set as the connection before."""
        first = self.header
        if header.first_row != self._next_row:
            raise RowsNotContiguous(f"the stream begins at row {header.first_row}, asked for was {self._next_row}")
        if first is not None and (header.set_id, header.columns) != (first.set_id, first.columns):
            raise RowsNotContiguous(
                f"the stream went on with other data: set {header.set_id}, before {first.set_id}",
                metadata={"next_row": str(self._next_row)},
            )
        if bool(header.block_rows) == self._request.reading.plain:
            raise Unimplemented("this server does not know reading orders and shards: update it")
        self._source.greeted(header)
        self._mapping = MappedRows(header) if header.mapped else None
        self.header = header
        self.header_ready.set()


def _decode(message: memoryview) -> frames.Chunk | None:
    """The chunk in a message; None for a message of another kind."""
    try:
        chunk = frames.decode_chunk(message)
    except frames.FrameError as exc:
        raise DataLoss(f"a message of the stream is damaged: {exc}") from exc
    if chunk is not None:
        return chunk
    event = stream_event_from_pb(bytes(message))
    if event.WhichOneof("event") != "chunk":
        return None
    pb = event.chunk  # Framed by another library, with its fields in another order.
    return frames.Chunk(pb.first_row, pb.n_rows, tuple(pb.column_offsets), memoryview(pb.payload), pb.position)


def _cut(chunk: frames.Chunk, place: int, columns: tuple[Column, ...]) -> ActivationChunk:
    """Views of each column's part of a chunk's payload."""
    if len(chunk.column_offsets) != len(columns):
        raise DataLoss(f"a chunk has {len(chunk.column_offsets)} columns, the stream's header {len(columns)}")
    try:
        buffers = tuple(chunk.column(at, column.row_bytes) for at, column in enumerate(columns))
    except frames.FrameError as exc:
        raise DataLoss(f"a chunk is damaged: {exc}") from exc
    return ActivationChunk(
        first_row=chunk.first_row,
        n_rows=chunk.n_rows,
        place=place,
        columns=columns,
        buffers=buffers,
        size_bytes=len(chunk.payload),
    )
