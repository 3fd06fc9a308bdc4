"""Recorded activations for sparsify's Trainer, which takes a model to hook and a dataset of token ids.

`replay` returns both: a model without weights that calls its modules with recorded rows, and the token ids of the same
rows cut into stretches of `context_size`. For SAEs with `loss_fn="fvu"`: there are no logits, and no inputs of modules,
so that a transcoder fails instead of learning nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headrace_client.client import HeadraceClient
from headrace_client.errors import DataLoss, InvalidArgument
from headrace_client.reading.tensors import ActivationStream
from headrace_client.values import PROVENANCE_COLUMNS, Extraction

_SITES = {"hook_resid_post": "", "hook_mlp_out": ".mlp", "hook_attn_out": ".attn"}
_HOOKPOINT = re.compile(r"blocks\.(\d+)\.(\w+)")
_TOKEN_ID = PROVENANCE_COLUMNS[0]


class ReplayDataset:
    """Token ids of the rows, `context_size` of them an item."""

    def __init__(self, token_ids: NDArray[np.int32], model: ReplayModel, first: int = 0) -> None:
        self._token_ids = token_ids
        self._model = model
        self._first = first

    def __len__(self) -> int:
        return len(self._token_ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": torch.from_numpy(self._token_ids[number].astype(np.int64))}

    def select(self, numbers: range) -> ReplayDataset:
        """A dataset from a later item on, for sparsify's resume; moves the model there too."""
        if numbers.step != 1 or numbers.stop != len(self):
            raise InvalidArgument("a replay can only skip its beginning", fields={"numbers": str(numbers)})
        first = self._first + numbers.start
        self._model.seek(first)
        return ReplayDataset(self._token_ids[numbers.start :], self._model, first)


class _HookedModule(nn.Module):
    """A module without weights to hook: returns the rows that ReplayModel has put into it."""

    rows: Tensor | None = None

    def forward(self, _nothing: None) -> Tensor:
        """Returns the rows; inputs of modules are not recorded."""
        assert self.rows is not None, "put there by ReplayModel"
        return self.rows


class ReplayModel(nn.Module):
    """Calls the module of each hookpoint with its rows, in the order in which they were recorded.

    `layers.3` has `blocks.3.hook_resid_post`, `layers.3.mlp` its `hook_mlp_out`, `layers.3.attn` its `hook_attn_out`.
    """

    def __init__(
        self,
        open_at: Callable[[int, int], ActivationStream],
        hookpoints: Mapping[str, int],
        *,
        n_layers: int,
        context_size: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_HookedModule() for _ in range(n_layers))
        self.config = SimpleNamespace(num_hidden_layers=n_layers)
        self.device = device
        self._open_at = open_at
        self._widths = dict(hookpoints)
        self._context_size = context_size
        self._stream: ActivationStream | None = None
        self._item = 0
        self._modules_by_hookpoint = {name: self._module(name) for name in hookpoints}

    @property
    def base_model(self) -> Self:
        """Itself."""
        return self

    @property
    def dummy_inputs(self) -> dict[str, Any]:
        """Arguments of a call that shows the widths and reads no rows."""
        return {"input_ids": torch.zeros(1, 1, dtype=torch.int64), "widths_only": True}

    def seek(self, item: int) -> None:
        """Goes on at another item."""
        self.close()
        self._item = item

    def close(self) -> None:
        """Ends the stream; the next call opens another where this one was."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, widths_only: bool = False) -> _NoLogits:
        """Calls each module with the next rows `[batch, context_size, d]`. DataLoss if their token ids differ."""
        if labels is not None:
            raise _no_logits()
        if widths_only:
            rows = {name: torch.zeros(1, 1, width, device=self.device) for name, width in self._widths.items()}
        else:
            rows = self._next(input_ids)
        for name, module in self._modules_by_hookpoint.items():
            module.rows = rows[name]
            module(None)
            module.rows = None
        return _NoLogits()

    def _next(self, input_ids: Tensor) -> dict[str, Tensor]:
        n_rows = input_ids.numel()
        if self._stream is None:
            self._stream = self._open_at(self._item * self._context_size, n_rows)
        batch = next(self._stream, None)
        if batch is None or not np.array_equal(batch[_TOKEN_ID], input_ids.flatten().cpu()):
            raise DataLoss("the dataset and the replay are out of step: use those that one call of replay returned")
        self._item += len(input_ids)
        return {name: batch[name].view(*input_ids.shape, -1).to(self.device) for name in self._widths}

    def _module(self, hookpoint: str) -> _HookedModule:
        """The module of a hookpoint: a block, or a new module below it."""
        layer, below = _module_of(hookpoint)
        block = self.layers[layer]
        assert isinstance(block, _HookedModule)
        if not below:
            return block
        module = _HookedModule()
        block.add_module(below[1:], module)
        return module


class _NoLogits:
    """The output of a replay, where a language model has logits."""

    @property
    def logits(self) -> Tensor:
        """Raises InvalidArgument."""
        raise _no_logits()


def replay(
    client: HeadraceClient,
    extraction: Extraction | str,
    hookpoints: Sequence[str] | None = None,
    *,
    context_size: int = 256,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[ReplayModel, ReplayDataset]:
    """Returns model and dataset for `Trainer(cfg, dataset, model)`, over all rows of an extraction that has ended.

    Token ids are read at once, 4 bytes a row. Last rows that fill no `context_size` are left out. `cfg.hookpoints` are
    module names (see ReplayModel); the model's `close` ends its stream.
    """
    known = client.extractions.get(extraction) if isinstance(extraction, str) else extraction
    names = tuple(hookpoints or known.hookpoints)
    n_layers = 1 + max(_module_of(name)[0] for name in names)
    n_items = known.n_rows // context_size
    if not known.ended or not n_items:
        raise InvalidArgument(
            f"extraction {known.id} has {known.n_rows} rows and is {known.state}: wait until it is done, and take a "
            "context_size that it fills",
            fields={"context_size": str(context_size)},
        )
    end_row = n_items * context_size

    def open_at(row: int, batch_size: int) -> ActivationStream:
        return client.activations(
            known,
            columns=(_TOKEN_ID, *names),
            start_row=row,
            end_row=end_row,
            batch_size=batch_size,
            dtype=dtype,
            **options,
        )

    with client.chunks(known, columns=(_TOKEN_ID, *names), end_row=1) as stream:
        widths = {column.name: column.width for column in stream.header.columns}
    with client.chunks(known, columns=_TOKEN_ID, end_row=end_row) as stream:
        token_ids = np.concatenate([chunk.array(_TOKEN_ID) for chunk in stream])
    model = ReplayModel(
        open_at,
        {name: widths[name] for name in names},
        n_layers=n_layers,
        context_size=context_size,
        device=torch.device(device),
    )
    return model, ReplayDataset(token_ids.reshape(n_items, context_size), model)


def _module_of(hookpoint: str) -> tuple[int, str]:
    """Layer of a hookpoint, and its module's path below that."""
    match = _HOOKPOINT.fullmatch(hookpoint)
    if match is None or match[2] not in _SITES:
        raise InvalidArgument(
            f"{hookpoint} is no module's output: a replay has {', '.join(_SITES)} of blocks",
            fields={"hookpoints": hookpoint},
        )
    return int(match[1]), _SITES[match[2]]


def _no_logits() -> InvalidArgument:
    return InvalidArgument("a replay has no logits: train with loss_fn='fvu'", fields={"loss_fn": "fvu"})
