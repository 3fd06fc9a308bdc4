"""The tree of commands and the global options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from headrace_cli.commands import corpora, devices, doctor, extract, serve, sets, up
from headrace_cli.commands.models import fit, pins, residencies
from headrace_cli.commands.models import registered as models
from headrace_cli.pulling import pull
from headrace_cli.settings import DEFAULT_REGISTRY, Defaults, Settings

_FLAGS = {"--json": 0, "--debug": 0, "--registry": 1, "--token-file": 1, "--ca-file": 1}


class _Root(TyperGroup):
    """Takes the global options behind the command too: `headrace models list --json`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, hoisted(args))


def hoisted(args: list[str]) -> list[str]:
    """Moves global options to the front; not what follows `serve`, whose servers have options of the same names."""
    front: list[str] = []
    rest: list[str] = []
    left = iter(args)
    for arg in left:
        name, equals, _ = arg.partition("=")
        if arg == "--" or (arg == "serve" and not rest):
            rest += [arg, *left]
        elif name in _FLAGS:
            front.append(arg)
            if _FLAGS[name] and not equals:
                front += [value for value in [next(left, None)] if value is not None]
        else:
            rest.append(arg)
    return front + rest


app = typer.Typer(
    cls=_Root,
    help="Headrace: language-model activations, computed once, streamed to any number of trainers.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 unavailable or out of time, "
    "5 refused (permission, state, capacity), 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,  # Plain help: half the time to load, and no option name is cut short.
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help"]},
)
app.add_typer(models.app, name="models")
pins.add_to(models.app)
residencies.add_to(models.app)
app.add_typer(residencies.app, name="residencies")
app.add_typer(corpora.app, name="corpora")
app.add_typer(sets.app, name="sets")
app.add_typer(serve.app, name="serve")
extract.add_to(app)
app.command("pull")(pull.pull)
app.command("up")(up.up)
app.command("devices")(devices.devices)
app.command("fit")(fit.fit)
app.command("doctor")(doctor.doctor)


@app.callback()
def root(
    context: typer.Context,
    *,
    registry: Annotated[
        str | None,
        typer.Option(
            help=f"Registry as host:port.  (env: HEADRACE_REGISTRY; default: {DEFAULT_REGISTRY})", show_default=False
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token.  (env: HEADRACE_TOKEN holds the token itself)")
    ] = None,
    ca_file: Annotated[Path | None, typer.Option(help="Root certificates (PEM); turns TLS on.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine output on stdout, everything else on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the stack of an error.")] = False,
) -> None:
    """Takes the global options."""
    defaults = context.obj if isinstance(context.obj, Defaults) else Defaults()
    context.obj = Settings(
        registry=registry or defaults.registry or DEFAULT_REGISTRY,
        token=defaults.token,
        token_file=token_file,
        ca_file=ca_file,
        json=json,
        debug=debug,
    )
