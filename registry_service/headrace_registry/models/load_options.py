"""Load options: a JSON object per model, every option known and of its type.

A misspelt option would silently change nothing, and a few would run foreign code; both are refused here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from headrace_registry.errors import FieldInvalid

LOAD_DTYPES = ("float32", "bfloat16", "float16")
TRUST_REMOTE_CODE = "trust_remote_code"

_ATTENTION = ("eager", "sdpa", "flash_attention_2")
_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_DEVICE = re.compile(r"cpu|mps|cuda(:\d{1,3})?")
_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_SIZE = re.compile(r"\d{1,12}(\.\d{1,6})?\s?([KMGT]i?B|B)?")
_MAX_ENTRIES = 4096
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


def checked_load_options(options: Mapping[str, Any], *, field: str = "load_options") -> dict[str, Any]:
    """Returns the options with whole numbers as ints. Raises FieldInvalid, naming option and remedy."""
    checked = {}
    for name, value in options.items():
        check = _CHECKS.get(name)
        if check is None:
            raise FieldInvalid(field, f"unknown option {name[:80]!r}; known: {', '.join(_CHECKS)}")
        try:
            checked[name] = check(value)
        except ValueError as exc:
            raise FieldInvalid(field, f"{name} is {_shown(value)}; it must be {exc}") from None
    return checked


def trusts_remote_code(options: Mapping[str, Any]) -> bool:
    """True if the options let code from the repo run."""
    return options.get(TRUST_REMOTE_CODE) is True


def _one_of(*allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")  # noqa: TRY004 - all checks say what is wrong in the same way.
    return value


def _window(value: Any) -> int | None:
    if value is None:
        return None
    whole = _whole(value)
    if whole is None or not 1 <= whole <= _MAX_WINDOW:
        raise ValueError("a positive whole number of tokens, or null for none")
    return whole


def _device_map(value: Any) -> str | dict[str, str | int]:
    remedy = f"one of {', '.join(_MAPS)}, a device (cpu, cuda:0), or an object of module names and devices"
    if isinstance(value, str) and (value in _MAPS or _DEVICE.fullmatch(value)):
        return value
    if not isinstance(value, Mapping) or not 0 < len(value) <= _MAX_ENTRIES:
        raise ValueError(remedy)
    return {_module(name, remedy): _device(device, remedy) for name, device in value.items()}


def _module(name: str, remedy: str) -> str:
    if name and not _MODULE.fullmatch(name):
        raise ValueError(remedy)
    return name


def _device(device: Any, remedy: str) -> str | int:
    whole = _whole(device)
    if whole is not None and 0 <= whole < 1000:
        return whole
    if isinstance(device, str) and _DEVICE.fullmatch(device):
        return device
    raise ValueError(remedy)


def _max_memory(value: Any) -> dict[str, str | int]:
    remedy = "an object of devices (`cpu`, or a GPU's number) and sizes, in bytes or such as `10GiB`"
    if not isinstance(value, Mapping) or not 0 < len(value) <= _MAX_ENTRIES:
        raise ValueError(remedy)
    return {_memory_device(device, remedy): _size(size, remedy) for device, size in value.items()}


def _memory_device(device: str, remedy: str) -> str:
    if not re.fullmatch(r"cpu|mps|\d{1,3}", device):
        raise ValueError(remedy)
    return device


def _size(size: Any, remedy: str) -> str | int:
    whole = _whole(size)
    if whole is not None and 0 <= whole < 2**63:
        return whole
    if isinstance(size, str) and _SIZE.fullmatch(size):
        return size
    raise ValueError(remedy)


def _rope_scaling(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError("an object with `rope_type`, or null for none")  # noqa: TRY004
    kind = value.get("rope_type", value.get("type"))
    if kind not in _ROPE_TYPES:
        raise ValueError(f"an object whose `rope_type` is one of {', '.join(_ROPE_TYPES)}")
    return {name: _rope_entry(name, entry) for name, entry in value.items()}


def _rope_entry(name: str, entry: Any) -> Any:
    if name in ("rope_type", "type"):
        return _one_of(*_ROPE_TYPES)(entry)
    if name == "truncate":
        return _flag(entry)
    if name in _ROPE_NUMBERS and _is_positive(entry):
        return _tidy(entry)
    if name in _ROPE_LISTS and isinstance(entry, list) and len(entry) <= _MAX_ENTRIES and all(map(_is_positive, entry)):
        return [_tidy(number) for number in entry]
    known = ", ".join(sorted(_ROPE_NUMBERS | _ROPE_LISTS))
    raise ValueError(f"an object of `rope_type`, `truncate` and positive numbers ({known})")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _whole(value: Any) -> int | None:
    """JSON in protobuf knows doubles only."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if value == int(value) else None


def _tidy(value: float) -> float:
    whole = _whole(value)
    return value if whole is None or abs(value) >= 2**53 else whole


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "dtype": _one_of(*LOAD_DTYPES),
    "device_map": _device_map,
    "max_memory": _max_memory,
    "attn_implementation": _one_of(*_ATTENTION),
    "rope_scaling": _rope_scaling,
    "low_cpu_mem_usage": _flag,
    "use_fast": _flag,
    "sliding_window": _window,
    TRUST_REMOTE_CODE: _flag,
}
