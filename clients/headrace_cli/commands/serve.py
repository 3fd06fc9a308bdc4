"""`headrace serve`: one server in this process's place."""

from __future__ import annotations

import os
import sys

import typer

app = typer.Typer(
    help="Run one server in the foreground.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}
MODULES = {"registry": "headrace_registry", "extractor": "headrace_extractor"}


def server_command(name: str, arguments: list[str]) -> list[str]:
    """The command line of a server."""
    return [sys.executable, "-m", MODULES[name], *arguments]


@app.command(context_settings=_PASS_ON, add_help_option=False)
def registry(context: typer.Context) -> None:
    """Run the registry."""
    _become("registry", context.args)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def extractor(context: typer.Context) -> None:
    """Run an extractor."""
    _become("extractor", context.args)


def _become(name: str, arguments: list[str]) -> None:
    command = server_command(name, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)  # noqa: S606 - our own module, no shell.
