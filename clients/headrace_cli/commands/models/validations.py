"""`headrace models validate` and `headrace models attempts`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import note, print_json, print_rows
from headrace_cli.settings import Settings, settings_of

if TYPE_CHECKING:
    from headrace_client.validation import ValidationAttempt, ValidationStep

# Of the versions that are kept.
_SHOWN = ("torch", "transformers")
_MARKS = {"RUNNING": "...", "PASSED": "ok", "FAILED": "failed", "SKIPPED": "skipped"}


@reported
def validate(
    context: typer.Context,
    *,
    model_id: Annotated[str, typer.Argument(metavar="MODEL")],
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Load option to try, KEY=VALUE, VALUE as JSON or text; may be repeated. None: the model's own."
        ),
    ] = None,
    node: Annotated[str, typer.Option(help="Node; chosen if not given.")] = "",
    device: Annotated[str, typer.Option(help="Device of that node, such as cuda:0; chosen if not given.")] = "",
    wait_s: Annotated[float, typer.Option(help="Longest time it may take; ending the command stops it too.")] = 3600.0,
) -> None:
    """Try a model: load it with these options, run it, compare it with plain transformers; ends with 1 if it fails."""
    settings = settings_of(context)
    options = parse_options(option) if option else None
    with settings.connect() as client:
        attempt = client.models.validate(
            model_id,
            load_options=options,
            node_id=node,
            device_id=device,
            on_step=lambda step: _tell(settings, step),
            deadline_s=wait_s,
        )
    if settings.json:
        print_json(attempt)
    else:
        note(_summary(attempt))
    if not attempt.passed:
        raise typer.Exit(1)


@reported
def attempts(
    context: typer.Context,
    *,
    model_id: Annotated[str, typer.Argument(metavar="MODEL")],
    passed: Annotated[bool, typer.Option("--passed", help="Only those that passed.")] = False,
    limit: Annotated[int, typer.Option(help="Most attempts to show.", min=1)] = 20,
) -> None:
    """List attempts to validate a model, the newest first."""
    settings = settings_of(context)
    with settings.connect() as client:
        found = list(islice(client.models.attempts(model_id, passed_only=passed), limit))
    rows = [
        (
            formats.time_of_day(attempt.create_time),
            "passed" if attempt.passed else "failed" if attempt.done else "running",
            f"{attempt.node_id}/{attempt.device_id}",
            json.dumps(dict(attempt.load_options)) if attempt.load_options else "",
            " ".join(
                f"{name} {attempt.versions[name]}" for name in ("torch", "transformers") if name in attempt.versions
            ),
            f"{attempt.failure.reason}: {attempt.failure.message}" if attempt.failure else "",
        )
        for attempt in found
    ]
    headings = ("when", "outcome", "where", "load options", "versions", "failure")
    empty = f"no attempts; make one with `headrace models validate {model_id}`"
    print_rows(settings, found, headings, rows, empty=empty)


def parse_options(texts: list[str]) -> dict[str, Any]:
    """Reads KEY=VALUE pairs."""
    options = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--option")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def _tell(settings: Settings, step: ValidationStep) -> None:
    if settings.json:
        return
    seconds = f"{step.seconds:.1f} s" if step.state != "RUNNING" else ""
    note("  ".join(part for part in (f"{step.name:<12}", _MARKS.get(step.state, ""), seconds, step.message) if part))
    if step.figures:
        note(f"{'':<12}  {_figures(step.figures)}")


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_figure(name, value)}" for name, value in figures.items())


def _figure(name: str, value: float) -> str:
    return formats.size(value) if name.endswith("_bytes") else f"{value:.6g}"


def _summary(attempt: ValidationAttempt) -> str:
    outcome = "passed" if attempt.passed else "failed"
    reason = f": {attempt.failure.reason}: {attempt.failure.message}" if attempt.failure else ""
    return f"{attempt.model_id} {outcome} on {attempt.node_id}/{attempt.device_id}{reason}"
