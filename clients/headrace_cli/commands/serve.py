"""`headrace serve`: replaces this process by one server."""

from __future__ import annotations

import os
import sys

import typer

from headrace_cli.processes.servers import server_command

PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}  # The server reads its own options, --help too.


def registry(context: typer.Context) -> None:
    """Run the registry."""
    _become("registry", context.args)


def extractor(context: typer.Context) -> None:
    """Run an extractor."""
    _become("extractor", context.args)


def _become(name: str, arguments: list[str]) -> None:
    command = server_command(name, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)  # noqa: S606 - our own module, no shell.
