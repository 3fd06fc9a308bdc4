"""The options that a model is loaded with: a JSON object in which every option is known and of its type.

A misspelt option would silently change nothing, so unknown options are refused. The registry checks the options at
registration, the runner once more before it applies them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace_models.errors import LoadOptionInvalid

# How accelerate may spread a model over devices.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

_DTYPES = ("float32", "bfloat16", "float16")
_ATTENTION = ("eager", "sdpa", "flash_attention_2")
_DEVICE = re.compile(r"cpu|mps|cuda(:\d{1,3})?")
_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s?(?:([KMGT])(i?)B|B)?")
_MAX_ENTRIES = 4096  # The largest models have some thousand modules that a device map could name.
_MAX_WINDOW = 2**31 - 1
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "su", "mrope")
_ROPE_NUMBERS = {
    "factor",
    "original_max_position_embeddings",
    "rope_theta",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "mscale",
    "mscale_all_dim",
    "partial_rotary_factor",
}
_ROPE_LISTS = {"short_factor", "long_factor", "mrope_section"}


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options with whole numbers as ints. Raises LoadOptionInvalid, naming option and remedy."""
    checked = {}
    for name, value in options.items():
        option = OPTIONS.get(name)
        if option is None:
            raise LoadOptionInvalid(name, f"unknown option {name[:80]!r}; known: {', '.join(OPTIONS)}")
        try:
            checked[name] = option.check(value)
        except ValueError as exc:
            text = repr(value)
            shown = text if len(text) <= 80 else f"{text[:80]}…"
            raise LoadOptionInvalid(name, f"{name} is {shown}; it must be {exc}") from None
    return checked


def options_changing_numbers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that change the numbers a model computes; an unknown option may, so it stays."""
    return {name: value for name, value in options.items() if name not in OPTIONS or OPTIONS[name].changes_numbers}


def trusts_remote_code(options: Mapping[str, Any]) -> bool:
    """True if the options let code from the model's repo run."""
    return options.get("trust_remote_code") is True


def size_bytes(size: str | float) -> int:
    """Returns the bytes of a size in `max_memory`: a number, or text such as `10GiB`. Raises ValueError."""
    if not isinstance(size, str):
        return int(size)
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ValueError(f"{size!r} is no size; write bytes, or such as '10GiB'")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOption:
    """One known option.

    `check` returns the value, whole numbers as ints, or raises ValueError with the words that complete "it must be".
    `changes_numbers` tells whether the values of activations depend on the option. `values`, `default` and `about` are
    for people.
    """

    check: Callable[[Any], Any]
    changes_numbers: bool
    values: str
    default: str
    about: str


def _one_of(*allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")  # noqa: TRY004 - all checks report by the same error.
    return value


def _window(value: Any) -> int | None:
    whole = _whole(value)
    if value is not None and (whole is None or not 1 <= whole <= _MAX_WINDOW):
        raise ValueError("a positive whole number of tokens, or null for none")
    return whole


def _device_map(value: Any) -> str | dict[str, str | int]:
    remedy = ValueError(
        f"one of {', '.join(DEVICE_MAPS)}, a device (cpu, cuda:0), or an object of module names and devices"
    )
    if isinstance(value, str) and (value in DEVICE_MAPS or _DEVICE.fullmatch(value)):
        return value
    if not isinstance(value, Mapping) or not 0 < len(value) <= _MAX_ENTRIES:
        raise remedy
    checked: dict[str, str | int] = {}
    for module, device in value.items():
        number = _whole(device)
        if module and not _MODULE.fullmatch(module):
            raise remedy
        if number is not None and 0 <= number < 1000:
            checked[module] = number
        elif isinstance(device, str) and _DEVICE.fullmatch(device):
            checked[module] = device
        else:
            raise remedy
    return checked


def _max_memory(value: Any) -> dict[str, str | int]:
    remedy = ValueError("an object of devices (`cpu`, or a GPU's number) and sizes, in bytes or such as `10GiB`")
    if not isinstance(value, Mapping) or not 0 < len(value) <= _MAX_ENTRIES:
        raise remedy
    checked: dict[str, str | int] = {}
    for device, size in value.items():
        number = _whole(size)
        if not re.fullmatch(r"cpu|mps|\d{1,3}", device):
            raise remedy
        if number is not None and 0 <= number < 2**63:
            checked[device] = number
        elif isinstance(size, str) and _SIZE.fullmatch(size):
            checked[device] = size
        else:
            raise remedy
    return checked


def _rope_scaling(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError("an object with `rope_type`, or null for none")  # noqa: TRY004
    if value.get("rope_type", value.get("type")) not in _ROPE_TYPES:
        raise ValueError(f"an object whose `rope_type` is one of {', '.join(_ROPE_TYPES)}")
    checked: dict[str, Any] = {}
    for name, entry in value.items():
        if name in ("rope_type", "type"):
            checked[name] = _one_of(*_ROPE_TYPES)(entry)
        elif name == "truncate":
            checked[name] = _flag(entry)
        elif name in _ROPE_NUMBERS and _is_positive(entry):
            checked[name] = _tidy(entry)
        elif (
            name in _ROPE_LISTS
            and isinstance(entry, list)
            and len(entry) <= _MAX_ENTRIES
            and all(map(_is_positive, entry))
        ):
            checked[name] = [_tidy(number) for number in entry]
        else:
            known = ", ".join(sorted(_ROPE_NUMBERS | _ROPE_LISTS))
            raise ValueError(f"an object of `rope_type`, `truncate` and positive numbers ({known})")
    return checked


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _whole(value: Any) -> int | None:
    """Returns a whole number as an int, and None for any other value: options come as doubles, as protobuf has them."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _tidy(value: float) -> float:
    """Returns a whole number as an int while a double holds it exactly."""
    whole = _whole(value)
    return value if whole is None or abs(value) >= 2**53 else whole


OPTIONS: Mapping[str, LoadOption] = {
    "dtype": LoadOption(
        check=_one_of(*_DTYPES),
        changes_numbers=True,
        values=" | ".join(_DTYPES),
        default="bfloat16 on a GPU, float32 on a CPU",
        about="Dtype of weights and computation.",
    ),
    # A residency is on one device: these two change where a model is loaded, not the numbers it computes.
    "device_map": LoadOption(
        check=_device_map,
        changes_numbers=False,
        values="auto | balanced | balanced_low_0 | sequential | a device | object of modules and devices",
        default="auto",
        about="Kept for configurations from elsewhere. A model is loaded on one device, so it may name no other.",
    ),
    "max_memory": LoadOption(
        check=_max_memory,
        changes_numbers=False,
        values='object, such as {"0": "10GiB"} or {"cpu": 8000000000}',
        default="no limit",
        about="Most bytes that the load may take on its device; a larger model is refused with DEVICE_OOM.",
    ),
    "attn_implementation": LoadOption(
        check=_one_of(*_ATTENTION),
        changes_numbers=True,
        values="sdpa | eager",
        default="sdpa, or eager for architectures without it",
        about="Attention of transformers. flash_attention_2 is refused at load: it does not isolate packed documents.",
    ),
    "rope_scaling": LoadOption(
        check=_rope_scaling,
        changes_numbers=True,
        values='object, such as {"rope_type": "linear", "factor": 4}; or null',
        default="the model's config",
        about="Scaling of rotary positions, for sequences longer than the model was trained on.",
    ),
    "low_cpu_mem_usage": LoadOption(
        check=_flag,
        changes_numbers=False,
        values="true",
        default="true",
        about="Weights are never held twice; false is refused at load.",
    ),
    "use_fast": LoadOption(
        check=_flag,
        changes_numbers=False,
        values="true",
        default="true",
        about="Token ids always come from tokenizer.json; false is refused at load.",
    ),
    "sliding_window": LoadOption(
        check=_window,
        changes_numbers=True,
        values="tokens, or null",
        default="the model's config",
        about="Width of the attention window in layers that have one; null turns windows off.",
    ),
    "trust_remote_code": LoadOption(
        check=_flag,
        changes_numbers=True,
        values="true | false",
        default="false",
        about="Runs code of the repo. The registry must allow it: --trust-remote-code REPO.",
    ),
}
