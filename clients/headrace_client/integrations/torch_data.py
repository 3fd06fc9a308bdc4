"""Activations for `torch.utils.data`: any number of DataLoader workers and of `torch.distributed` ranks.

Each worker of each rank reads a shard of its own over a connection of its own; all shards have the same number of
batches. The order of batches follows from the options, the rank and the number of workers alone, so the number of
batches taken is the whole state.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from headrace_client.client import HeadraceClient
from headrace_client.errors import InvalidArgument
from headrace_client.reading.tensors import ActivationStream
from headrace_client.values import PLAIN, Reading

# With the rank and the workers, these and `reading` decide which rows make which batch.
_DECISIVE = ("batch_size", "start_row", "end_row")
_DEFAULTS = signature(HeadraceClient.activations).parameters


class ActivationDataset(IterableDataset[Any]):
    """Batches of an extraction's rows; give it to a DataLoader with `batch_size=None`.

    `connect` are arguments of `HeadraceClient.connect`, `options` of `HeadraceClient.activations`; `reading` has no
    shard, and batches are always whole. Pickled and forked copies connect by themselves. Rank and world come from
    `torch.distributed` by default, where it is initialized.
    """

    def __init__(
        self,
        extraction: str,
        *,
        connect: Mapping[str, Any] | None = None,
        rank: int | None = None,
        world: int | None = None,
        reading: Reading = PLAIN,
        **options: Any,
    ) -> None:
        super().__init__()
        taken = sorted({"drop_last", "on_progress"} & set(options)) + ["shard"] * (reading.shard != PLAIN.shard)
        if taken:
            raise InvalidArgument(f"{taken[0]} is the dataset's own affair", fields={taken[0]: "leave it out"})
        if unknown := sorted(set(options) - set(_DEFAULTS)):
            raise InvalidArgument(
                f"{unknown[0]} is no option of `activations`",
                fields={
                    unknown[0]: "orders go into reading=Reading(...), sizes and transport into tuning=StreamTuning(...)"
                },
            )
        if (rank is None) != (world is None):
            raise InvalidArgument("rank and world are given together, or neither", fields={"rank": str(rank)})
        self._extraction = extraction
        self._connect = dict(connect or {})
        self._ranks = None if rank is None or world is None else (rank, world)
        self._reading = reading
        self._options = options
        self._n_taken = 0

    @property
    def ranks(self) -> tuple[int, int]:
        """This process's rank, and the number of ranks."""
        if self._ranks is not None:
            return self._ranks
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1

    @property
    def identity(self) -> dict[str, Any]:
        """As JSON, for a loader's state: datasets with the same identity make the same batches."""
        rank, world = self.ranks
        options = {name: self._options.get(name, _DEFAULTS[name].default) for name in _DECISIVE}
        # Not the epoch: a loop sets it anew for each epoch, maybe after a state was loaded.
        order = {name: getattr(self._reading, name) for name in ("order", "seed", "block_rows", "mix_blocks")}
        # A plain string: torch.load takes no enum by default.
        order["order"] = str(self._reading.order)
        return {"extraction": self._extraction, "rank": rank, "world": world, **options, **order}

    def set_epoch(self, epoch: int) -> None:
        """Begins the next iteration with this epoch's order; for loops that make an iterator for each epoch."""
        self._reading = replace(self._reading, epoch=epoch)

    def resume_after(self, n_batches: int) -> None:
        """Begins the next iteration behind so many batches, which as many workers have brought before."""
        self._n_taken = n_batches

    def __iter__(self) -> ActivationStream:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        rank, world = self.ranks
        # A loader asks its workers in turn, beginning with the first, so the first takes the shard that is due.
        turn = (index + self._n_taken) % count
        client = HeadraceClient.connect(**self._connect)
        try:
            reading = replace(self._reading, shard=(rank * count + turn, world * count))
            stream = client.activations(self._extraction, drop_last=True, reading=reading, **self._options)
            # Batches that this worker has brought of the `n_taken` of all workers.
            if n_batches := (self._n_taken - turn + count - 1) // count:
                stream.skip_batches(n_batches)
        except BaseException:
            client.close()
            raise
        weakref.finalize(stream, client.close)  # A loader drops the stream, and knows no client.
        return stream

    def __getstate__(self) -> dict[str, Any]:
        # A worker that was spawned knows nothing of torch.distributed.
        return {**self.__dict__, "_ranks": self.ranks}


class ActivationLoader:
    """A DataLoader over an ActivationDataset that counts its batches, to resume; `options` are DataLoader's."""

    def __init__(self, dataset: ActivationDataset, *, num_workers: int = 0, **options: Any) -> None:
        self._dataset = dataset
        self._n_workers = num_workers
        self._options = options
        self._n_taken = 0

    def state_dict(self) -> dict[str, Any]:
        """Where to resume, as JSON."""
        return {"n_batches": self._n_taken, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begins the next iteration behind the batch after which `state` was taken.

        Raises InvalidArgument if the state is of other workers, or of another rank, extraction, order or batch size:
        batches would have other rows.
        """
        for name, ours in self._identity.items():
            theirs = state.get(name, ours)  # Older versions left some names out.
            if theirs != ours:
                raise InvalidArgument(f"the state is of {name} {theirs}, now it is {ours}", fields={name: str(ours)})
        self._n_taken = int(state["n_batches"])

    @property
    def _identity(self) -> dict[str, Any]:
        return {"n_workers": self._n_workers, **self._dataset.identity}

    def __iter__(self) -> Iterator[Any]:
        self._dataset.resume_after(self._n_taken)
        loader = DataLoader(self._dataset, batch_size=None, num_workers=self._n_workers, **self._options)
        for batch in loader:
            self._n_taken += 1
            yield batch
        self._n_taken = 0
