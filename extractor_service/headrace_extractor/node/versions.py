"""The versions of the libraries that decide whether a model loads, without importing them."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "bitsandbytes", "gguf", "headrace")


@cache
def library_versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that are installed, by name; all runners have the same."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
