"""Activations for `torch.utils.data`: any number of DataLoader workers and of `torch.distributed` ranks.

Each worker of each rank reads a shard of its own over a connection of its own; all shards have the same number of
batches. Which batch comes when follows from the options, the rank and the number of workers alone, so all there is to
remember is how many were taken.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from headrace_client.client import HeadraceClient
from headrace_client.errors import InvalidArgument
from headrace_client.tensors import ActivationStream


class ActivationDataset(IterableDataset[Any]):
    """Batches of an extraction's rows; give it to a DataLoader with `batch_size=None`.

    `connect` are arguments of `HeadraceClient.connect`, `options` those of `HeadraceClient.activations`, less `shard`;
    batches are always whole. Pickled and forked copies connect by themselves. Rank and world are those of
    `torch.distributed` where it is initialized and they are not given.
    """

    def __init__(
        self,
        extraction: str,
        *,
        connect: Mapping[str, Any] | None = None,
        rank: int | None = None,
        world: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if taken := sorted({"shard", "drop_last", "on_progress"} & set(options)):
            raise InvalidArgument(f"{taken[0]} is the dataset's own affair", fields={taken[0]: "leave it out"})
        if (rank is None) != (world is None):
            raise InvalidArgument("rank and world are given together, or neither", fields={"rank": str(rank)})
        self._extraction = extraction
        self._connect = dict(connect or {})
        self._ranks = None if rank is None or world is None else (rank, world)
        self._options = options
        self._n_taken = 0

    @property
    def ranks(self) -> tuple[int, int]:
        """This process's rank, and how many there are."""
        if self._ranks is not None:
            return self._ranks
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1

    def set_epoch(self, epoch: int) -> None:
        """The next iteration begins with this epoch's order; for loops that make an iterator for each epoch."""
        self._options["first_epoch"] = epoch

    def resume_after(self, n_batches: int) -> None:
        """The next iteration goes on behind so many batches, as the loop got them from as many workers as before."""
        self._n_taken = n_batches

    def __iter__(self) -> ActivationStream:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        rank, world = self.ranks
        # A loader asks its workers in turn, beginning with the first: that one takes the shard whose turn it is.
        turn = (index + self._n_taken) % count
        client = HeadraceClient.connect(**self._connect)
        try:
            stream = client.activations(
                self._extraction, shard=(rank * count + turn, world * count), drop_last=True, **self._options
            )
            if n_batches := (self._n_taken - turn + count - 1) // count:
                stream.skip_batches(n_batches)
        except BaseException:
            client.close()
            raise
        weakref.finalize(stream, client.close)
        return stream

    def __getstate__(self) -> dict[str, Any]:
        # A worker that was spawned knows nothing of torch.distributed.
        return {**self.__dict__, "_ranks": self.ranks}


class ActivationLoader:
    """A DataLoader over an ActivationDataset that knows how far it is; `options` are DataLoader's."""

    def __init__(self, dataset: ActivationDataset, *, num_workers: int = 0, **options: Any) -> None:
        self._dataset = dataset
        self._n_workers = num_workers
        self._options = options
        self._n_taken = 0

    def state_dict(self) -> dict[str, int]:
        """Where to resume, as JSON."""
        rank, world = self._dataset.ranks
        return {"n_batches": self._n_taken, "n_workers": self._n_workers, "rank": rank, "world": world}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The next iteration goes on behind the batch after which `state` was taken.

        InvalidArgument if that was with other workers or another rank: they would have other shards.
        """
        for name, ours in self.state_dict().items():
            if name != "n_batches" and state[name] != ours:
                raise InvalidArgument(
                    f"the state is of {name} {state[name]}, now it is {ours}", fields={name: str(ours)}
                )
        self._n_taken = state["n_batches"]

    def __iter__(self) -> Iterator[Any]:
        self._dataset.resume_after(self._n_taken)
        loader = DataLoader(self._dataset, batch_size=None, num_workers=self._n_workers, **self._options)
        for batch in loader:
            self._n_taken += 1
            yield batch
        self._n_taken = 0
