"""The tree of commands and the global options."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from headrace_cli.commands import corpora, devices, doctor, extract, extractions, pull, serve, sets, sets_export, up
from headrace_cli.commands.models import catalog, fit, pins, registered, residencies, validations
from headrace_cli.settings import DEFAULT_REGISTRY, Defaults, Settings

# The number of values that each global option takes.
_GLOBAL_OPTIONS = {"--json": 0, "--wide": 0, "--debug": 0, "--registry": 1, "--token-file": 1, "--ca-file": 1}


class _Root(TyperGroup):
    """Takes the global options after the command too: `headrace models list --json`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, hoisted(args))


def hoisted(args: list[str]) -> list[str]:
    """Moves global options to the front, except after `serve`: the servers have options of the same names."""
    front: list[str] = []
    rest: list[str] = []
    left = iter(args)
    for arg in left:
        name, equals, _ = arg.partition("=")
        if arg == "--" or (arg == "serve" and not rest):
            rest += [arg, *left]
        elif name in _GLOBAL_OPTIONS:
            front.append(arg)
            if _GLOBAL_OPTIONS[name] and not equals:
                front += [value for value in [next(left, None)] if value is not None]
        else:
            rest.append(arg)
    return front + rest


app = typer.Typer(
    cls=_Root,
    help="Headrace computes activations of language models once and streams them to any number of trainers.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 unavailable or out of time, "
    "5 refused (permission, state, capacity), 130 interrupted. Completion of commands and options in your shell: "
    "headrace --install-completion.",
    no_args_is_help=True,
    rich_markup_mode=None,  # Plain help: half the time to load, and no option name is cut short.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help"]},
)


def _group(name: str, help_: str) -> typer.Typer:
    group = typer.Typer(help=help_, no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name=name)
    return group


app.command("up")(up.up)
app.command("down")(up.down)
app.command("devices")(devices.devices)
app.command("doctor")(doctor.doctor)
app.command("fit")(fit.fit)
app.command("extract")(extract.extract)
app.command("watch")(extractions.watch)
app.command("cancel")(extractions.cancel)
app.command("pull")(pull.pull)

_models = _group("models", "Register, load, pin and validate models.")
_models.command("catalog")(catalog.catalog)
_models.command("options")(catalog.options)
_models.command("add")(registered.add)
_models.command("list")(registered.list_models)
_models.command("show")(registered.show)
_models.command("hookpoints")(registered.hookpoints)
_models.command("watch")(registered.watch)
_models.command("rm")(registered.remove)
_models.command("load")(residencies.load)
_models.command("unload")(residencies.unload)
_models.command("evict")(residencies.evict)
_models.command("pin")(pins.pin)
_models.command("unpin")(pins.unpin)
_models.command("pins")(pins.list_pins)
_models.command("validate")(validations.validate)
_models.command("attempts")(validations.attempts)
_models.command("attempt")(validations.attempt)
_models.command("note")(validations.note_attempt)
_models.command("adopt")(validations.adopt)

_residencies = _group("residencies", "List or watch the models in memory (residencies).")
_residencies.command("list")(residencies.list_residencies)
_residencies.command("watch")(residencies.watch)

_corpora = _group("corpora", "Add, list and remove corpora (sources of documents).")
_corpora.command("add")(corpora.add)
_corpora.command("add-hub")(corpora.add_hub)
_corpora.command("add-mix")(corpora.add_mix)
_corpora.command("list")(corpora.list_corpora)
_corpora.command("rm")(corpora.remove)

_extractions = _group("extractions", "List, show, watch and cancel extractions.")
_extractions.command("list")(extractions.list_extractions)
_extractions.command("show")(extractions.show)
_extractions.command("watch")(extractions.watch)
_extractions.command("cancel")(extractions.cancel)

_sets = _group("sets", "List, pin, verify, export and delete activation sets.")
_sets.command("list")(sets.list_sets)
_sets.command("show")(sets.show)
_sets.command("pin")(sets.pin)
_sets.command("unpin")(sets.unpin)
_sets.command("verify")(sets.verify)
_sets.command("export")(sets_export.export)
_sets.command("delete")(sets.delete)

_serve = _group("serve", "Run one server, registry or extractor, in the foreground.")
_serve.command("registry", context_settings=serve.PASS_ON, add_help_option=False)(serve.registry)
_serve.command("extractor", context_settings=serve.PASS_ON, add_help_option=False)(serve.extractor)


def _print_version(*, wanted: bool) -> None:
    if wanted:
        typer.echo(f"headrace {version_of('headrace')}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    *,
    registry: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT[,...]",
            help="Address of the registry, or of its replicas, or unix:PATH.  "
            f"(env: HEADRACE_REGISTRY; default: {DEFAULT_REGISTRY})",
            show_default=False,
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with the bearer token.  (env: HEADRACE_TOKEN holds the token itself)"),
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Root certificates (PEM), or `system` for this machine's; turns TLS on.  (env: HEADRACE_CA_FILE)",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print results as JSON on standard output, errors as JSON on standard error.")
    ] = False,
    wide: Annotated[
        bool, typer.Option("--wide", help="Show all columns of a table, in lines as long as they need.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print each call with its request id, and the stack trace of an error.")
    ] = False,
    version: Annotated[  # noqa: ARG001 - its callback ends the command.
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Takes the global options."""
    if debug:
        # The client's lines alone: libraries below it write about themselves.
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
        logging.getLogger("headrace_client").setLevel(logging.DEBUG)
    defaults = context.obj if isinstance(context.obj, Defaults) else Defaults()
    context.obj = Settings(
        registry=registry or defaults.registry or DEFAULT_REGISTRY,
        token=defaults.token,
        token_file=token_file,
        ca_file=ca_file or (Path(defaults.ca_file) if defaults.ca_file else None),
        json=json,
        wide=wide,
        debug=debug,
    )
