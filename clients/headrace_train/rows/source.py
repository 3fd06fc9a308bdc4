"""The extraction to train from: found or started, checked, and streamed once for each pass."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from headrace_client import ActivationStream, HeadraceClient
from headrace_client.errors import FailedPrecondition, HookpointNotFound, InvalidArgument, ModelNotFound
from headrace_client.values import BosPolicy, Extraction, ExtractionState, Model, Progress, Window
from headrace_train.arguments import Arguments
from headrace_train.rows.blocks import POSITION

# Rows that show how documents begin: some dozens of documents, in one chunk.
_FIRST_ROWS = 4096
OnProgress = Callable[[Progress], None]
_COUNTED = (ExtractionState.RUNNING, ExtractionState.WAITING, ExtractionState.RECOVERING)


@dataclass(kw_only=True)
class Traffic:
    """Rows and bytes over all passes, and the seconds that the passes took, waiting on either side included."""

    rows: int = 0
    size_bytes: int = 0
    seconds: float = 0.0


class Source:
    """One hookpoint of one extraction whose number of rows is known. `traffic` adds up all streams."""

    def __init__(self, client: HeadraceClient, extraction: Extraction, hookpoint: str) -> None:
        self.client = client
        self.extraction = extraction
        self.hookpoint = hookpoint
        n_rows = extraction.n_rows if extraction.state is ExtractionState.DONE else extraction.n_rows_expected or 0
        n_rows = min(n_rows, extraction.max_rows) if extraction.max_rows else n_rows
        if n_rows < 2:  # One to train on, one to hold out.
            raise InvalidArgument(
                f"extraction {extraction.id} has {n_rows} rows: too few to train on", remedy="extract a larger corpus"
            )
        self.n_rows = n_rows
        self.traffic = Traffic()

    @contextmanager
    def stream(
        self,
        columns: tuple[str, ...] = (),
        *,
        batch_size: int,
        start_row: int = 0,
        end_row: int = 0,
        epochs: int | None = 1,
        on_progress: OnProgress | None = None,
    ) -> Iterator[ActivationStream]:
        """Opens a pass over rows: acts and positions, or `columns`. `end_row` 0: to the end; `epochs` None: endless."""
        with self.client.activations(
            self.extraction,
            columns=columns or (self.hookpoint, POSITION),
            batch_size=batch_size,
            dtype=torch.float32,
            start_row=start_row,
            end_row=end_row or self.n_rows,
            epochs=epochs,
            on_progress=on_progress,
        ) as stream:
            opened = time.monotonic()
            try:
                yield stream
            finally:
                progress = stream.progress()
                self.traffic.rows += progress.rows
                self.traffic.size_bytes += progress.size_bytes
                self.traffic.seconds += time.monotonic() - opened

    def model(self) -> Model | None:
        """Reads the model from the registry; None if it was deleted after the extraction."""
        try:
            return self.client.models.get(self.extraction.model_id)
        except ModelNotFound:
            return None

    def begins_with_bos(self) -> bool:
        """Returns whether documents begin with a BOS.

        By the tokenizer's own rule: if two documents or more begin in the first rows, all with the same token. One
        document proves nothing, and nor do rows without first positions: then False.
        """
        if self.extraction.recipe.bos is not BosPolicy.TOKENIZER:
            return self.extraction.recipe.bos is BosPolicy.DOCUMENT
        with self.stream(("token_id", POSITION), batch_size=_FIRST_ROWS, end_row=min(self.n_rows, _FIRST_ROWS)) as rows:
            first = torch.cat([batch["token_id"][batch[POSITION] == 0] for batch in rows]).tolist()
        return len(first) > 1 and len(set(first)) == 1

    def width(self) -> int:
        """Reads the width of a row from the header of a stream; waits until the extraction can send one."""
        with self.stream((self.hookpoint,), batch_size=1, end_row=1) as stream:
            return stream.header.columns[0].width


def locate(client: HeadraceClient, arguments: Arguments, on_extraction: Callable[[Extraction], None]) -> Source:
    """Finds or starts the extraction, and waits until its number of rows is known."""
    if arguments.extraction:
        extraction = client.extractions.get(arguments.extraction)
    else:
        extraction = client.extractions.start(
            arguments.model, arguments.corpus, arguments.hookpoint, max_rows=arguments.max_rows
        )
    if isinstance(extraction.retention, Window):
        raise FailedPrecondition(
            f"extraction {extraction.id} keeps a window of its rows; training, evaluation and analysis read them again",
            remedy="start it with retained rows",
        )
    # A new extraction has one hookpoint, under the full name that the node gave to the spelling asked for.
    hookpoint = _hookpoint(extraction, arguments.hookpoint if arguments.extraction else "")
    return Source(client, _counted(client, extraction, on_extraction), hookpoint)


def _hookpoint(extraction: Extraction, wanted: str) -> str:
    """Returns `wanted`, or the only hookpoint if it is empty. Raises if the extraction has no such hookpoint."""
    names = extraction.hookpoints
    if wanted in names:
        return wanted
    if not wanted and len(names) == 1:
        return names[0]
    if not wanted:
        raise InvalidArgument(
            f"extraction {extraction.id} has {len(names)} hookpoints ({', '.join(names)}): name one with --hookpoint",
            fields={"hookpoint": "one of " + ", ".join(names)},
        )
    nearest = ", ".join(difflib.get_close_matches(wanted, names, n=3, cutoff=0.0))
    raise HookpointNotFound(
        f"extraction {extraction.id} has no hookpoint {wanted!r}; it has {nearest}",
        metadata={"nearest": nearest},
        remedy="name a hookpoint of this extraction, or start one that captures yours",
    )


def _counted(client: HeadraceClient, extraction: Extraction, on_extraction: Callable[[Extraction], None]) -> Extraction:
    """Waits until the number of rows is certain, at the latest when it ends. Raises the extraction's failure."""
    if _is_counted(extraction):
        return extraction
    if not extraction.ended:
        for event in client.extractions.watch(extraction.id):
            extraction = event.extraction
            on_extraction(extraction)
            if _is_counted(extraction):
                return extraction
            if extraction.ended:
                break
    return client.extractions.wait(extraction.id)


def _is_counted(extraction: Extraction) -> bool:
    if extraction.state is ExtractionState.DONE:
        return True
    return extraction.state in _COUNTED and extraction.n_rows_exact and bool(extraction.n_rows_expected)
