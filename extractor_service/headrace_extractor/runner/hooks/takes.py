"""Turns a module's tensor into a hookpoint's: the code of each `Take`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from headrace_extractor.hookpoints.places import Copied, Cut, Normalized, Scaled, Take

# transformers' norms have no common name for it.
_EPSILON_NAMES = ("eps", "variance_epsilon", "epsilon")
_EPSILON = 1e-5  # Of norms that write it in their code instead of an attribute.


def function_of(take: Take, module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Returns the function of a take; None if the module's tensor is the hookpoint's as it is."""
    match take:
        case Cut(groups=groups, slots=slots, first=first, last=last):
            # A view if there is one group, as in a projection with queries, keys and values side by side.
            return lambda tensor: tensor.unflatten(-1, (groups, slots, -1))[..., first:last, :].flatten(-3)
        case Scaled():
            return lambda tensor: tensor * take.factor
        case Copied():
            return torch.clone
        case Normalized():
            # The norm without its weight, in float32, as transformers' norms compute. RMSNorm does not centre.
            found = [getattr(module, name) for name in _EPSILON_NAMES if isinstance(getattr(module, name, None), float)]
            epsilon = found[0] if found else _EPSILON
            centred = "rms" not in type(module).__name__.lower()

            def normalize(tensor: Tensor) -> Tensor:
                values = tensor.float()
                values = values - values.mean(-1, keepdim=True) if centred else values
                return (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon)).to(tensor.dtype)

            return normalize
        case _:
            return None
