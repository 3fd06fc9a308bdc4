"""The global options of one run, and the client that they describe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from headrace_client import HeadraceClient

DEFAULT_REGISTRY = "127.0.0.1:7470"


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Values of environment variables that stand in for global options."""

    registry: str | None = None
    token: str | None = None
    ca_file: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The global options of one run."""

    registry: str = DEFAULT_REGISTRY
    token: str | None = None
    token_file: Path | None = None
    ca_file: Path | None = None
    json: bool = False
    wide: bool = False
    debug: bool = False

    def connect(self, *, deadline_s: float = 30.0) -> HeadraceClient:
        """Makes a client; each of its calls has `deadline_s`. Raises InvalidArgument if a file can't be read."""
        from headrace_client import HeadraceClient  # noqa: PLC0415 - gRPC takes a sixth of a second to import.
        from headrace_client.errors import InvalidArgument  # noqa: PLC0415

        token = self.token
        if self.token_file is not None:
            try:
                token = self.token_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as exc:
                raise InvalidArgument(f"the token file can't be read: {exc}", remedy="check --token-file") from exc
        return HeadraceClient.connect(self.registry, token=token, ca_file=self.ca_file, deadline_s=deadline_s)


def settings_of(context: typer.Context) -> Settings:
    """Returns the settings of a command's run."""
    found = context.find_object(Settings)
    assert found is not None
    return found
