"""Errors in a model's files and load options.

ModelFilesError
├── HeaderInvalid      a safetensors file has no header, or a header that the format does not allow
├── JsonInvalid        a JSON file is too large, or holds no object
└── LoadOptionInvalid  a load option is unknown, or its value is not of the option's type
"""

from __future__ import annotations


class ModelFilesError(Exception):
    """Base of all errors of this package. Services turn them into errors of their own, which name the remedy."""


class HeaderInvalid(ModelFilesError):
    """A safetensors file has no header, or a header that the format does not allow."""


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
