"""Accounts for every weight: a weight that the files lack, or that no part of the network takes, is an error.

transformers loads such files all the same: it fills an absent weight with random numbers and drops one without a place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, modeling_utils

from headrace_extractor.errors import LoadFailed

# Parts of the network that a load of its text alone leaves out: other senses, and the prediction of further tokens.
_OTHER_PARTS = re.compile(r"vis|image|audio|speech|multi_modal|projector|connector|aligner|talker|token2wav|mtp")
_POOLER = "pooler"
_HEAD = "lm_head"
_SHOWN = 3


def check_weights(model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Raises LoadFailed, naming weights, unless files and network hold the same weights in the same shapes.

    `report` is the loading info of from_pretrained, called with `ignore_mismatched_sizes`: it leaves out weights that
    the family declares as tied, computed or unused. A head is no part of a base model, and may be in the files.
    """
    missing = report["missing_keys"]
    # Names with a prefix too many, as torch.compile leaves them, look like those of another part.
    misnamed = tuple(f".{key}" for key in missing)
    wrong = {
        "are missing in the files": missing,
        "have another shape in the files": [key for key, *_ in report["mismatched_keys"]],
        "of the files have no place in the network": [
            key for key in report["unexpected_keys"] if key.endswith(misnamed) or not _is_left_out(model, key)
        ],
    }
    if found := [f"{named(keys)} {what}" for what, keys in wrong.items() if keys]:
        raise LoadFailed(
            f"Files and config.json do not describe one model: {'; '.join(found)}. Put the right files in place, then "
            "prepare the model again."
        )


@contextmanager
def conversions_named() -> Iterator[None]:
    """Raises LoadFailed with their names for weights that transformers can't make of the files' tensors.

    Weights of experts are made of many tensors. transformers tells their names in a log alone, which is quiet here.
    """
    report = modeling_utils.log_state_dict_report

    def checked(*args: Any, loading_info: Any, **options: Any) -> None:
        if loading_info.conversion_errors:
            what = named(loading_info.conversion_errors)
            raise LoadFailed(
                f"Files and config.json do not describe one model: the tensors for {what} do not fit together. Put the "
                "right files in place, then prepare the model again."
            )
        report(*args, loading_info=loading_info, **options)

    modeling_utils.log_state_dict_report = checked
    try:
        yield
    finally:
        modeling_utils.log_state_dict_report = report


def named(keys: Iterable[str]) -> str:
    """Returns a count of weights with the names of the first few."""
    keys = sorted(keys)
    names = ", ".join(keys[:_SHOWN])
    return f"{len(keys)} weight{'s' if len(keys) > 1 else ''} ({names}{', …' if len(keys) > _SHOWN else ''})"


def _is_left_out(model: PreTrainedModel, key: str) -> bool:
    """True for a weight of a head, or of another part that this load leaves out on purpose."""
    prefix = f"{model.base_model_prefix}."
    inside = key.removeprefix(prefix)
    part = inside.partition(".")[0]
    if part == _POOLER:
        return not hasattr(model, _POOLER) or getattr(model, _POOLER) is None
    if part in dict(model.named_children()):
        # LLaVA's files have the head inside their text half.
        return _HEAD in inside.split(".")
    return not key.startswith(prefix) or bool(_OTHER_PARTS.search(part))
