"""What becomes of a module's tensor before it is a hookpoint's: the code of each `Take`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from headrace_extractor.hookpoints.places import Copied, Cut, Normalized, Scaled, Take

_EPSILON_NAMES = ("eps", "variance_epsilon", "epsilon")
_EPSILON = 1e-5  # Of norms that keep it in their code.


def function_of(take: Take, module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Returns the function of a take; None where the tensor is the hookpoint's as it is."""
    match take:
        case Cut():
            return lambda tensor: _cut(take, tensor)
        case Scaled():
            return lambda tensor: tensor * take.factor
        case Copied():
            return torch.clone
        case Normalized():
            return _normalizer(module)
        case _:
            return None


def _cut(cut: Cut, tensor: Tensor) -> Tensor:
    """A view where there is one group, as where queries, keys and values lie side by side."""
    slots = tensor.unflatten(-1, (cut.groups, cut.slots, -1))
    return slots[..., cut.first : cut.last, :].flatten(-3)


def _normalizer(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """In float32, as transformers' norms do; LayerNorm centres, RMSNorm does not."""
    found = [getattr(norm, name) for name in _EPSILON_NAMES if isinstance(getattr(norm, name, None), float)]
    epsilon = found[0] if found else _EPSILON
    centred = "rms" not in type(norm).__name__.lower()

    def normalize(tensor: Tensor) -> Tensor:
        values = tensor.float()
        values = values - values.mean(-1, keepdim=True) if centred else values
        return (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon)).to(tensor.dtype)

    return normalize
