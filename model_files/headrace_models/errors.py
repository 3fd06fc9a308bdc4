"""Errors in a model's files and load options.

ModelFilesError
├── HeaderInvalid      a safetensors file has no header, or a header that the format does not allow
├── TooManyTensors     a safetensors header is beyond the bounds of this package, not of the format
├── JsonInvalid        a JSON file is too large, or holds no object
├── ConfigInvalid      a config names a network beyond the bounds of this package
├── LoadOptionInvalid  a load option is unknown, or its value is not of the option's type
└── WeightsAbsent      a folder or repo lacks weights in the form that is loaded
"""

from __future__ import annotations

from collections.abc import Sequence


class ModelFilesError(Exception):
    """Base of all errors of this package. Services turn them into errors of their own, which name the remedy."""


class HeaderInvalid(ModelFilesError):
    """A safetensors file has no header, or a header that the format does not allow."""


class TooManyTensors(ModelFilesError):
    """A header is beyond the bounds of this package: it is well formed, and a server won't read it."""


class ConfigInvalid(ModelFilesError):
    """A config names a network beyond the bounds of this package; the message completes "config.json: "."""


class JsonInvalid(ModelFilesError):
    """A JSON file can't be used; `problem` completes a sentence that begins with the file's name."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}")
        self.problem = problem


class LoadOptionInvalid(ModelFilesError):
    """A load option is unknown, or its value is not of the option's type."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class WeightsAbsent(ModelFilesError):
    """A folder or repo lacks weights in the form that is loaded; `problem` names what.

    `others` are names of safetensors files that are there and that no load would read.
    """

    def __init__(self, problem: str, *, others: Sequence[str] = ()) -> None:
        super().__init__(problem)
        self.problem = problem
        self.others = tuple(others)
