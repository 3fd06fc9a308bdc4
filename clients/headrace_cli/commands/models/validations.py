"""`headrace models validate` and `headrace models attempts`."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.options import ModelId, parse_json_pairs
from headrace_cli.exits import FAILED, reported
from headrace_cli.output import formats
from headrace_cli.output.results import note, print_done, print_rows
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client.values import ValidationStep

_SHOWN_VERSIONS = ("torch", "transformers")  # An attempt keeps more; these decide whether a model runs.
_MARKS = {"RUNNING": "...", "PASSED": "ok", "FAILED": "failed", "SKIPPED": "skipped"}


@reported
def validate(
    context: typer.Context,
    *,
    model_id: ModelId,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Load option to try; VALUE is JSON or text; may be repeated.  (default: the model's own options)",
        ),
    ] = None,
    node: Annotated[str, typer.Option(metavar="NODE", help="Node to run on.  (default: chosen by the registry)")] = "",
    device: Annotated[
        str, typer.Option(help="Device of the node, such as cuda:0.  (default: chosen by the registry)")
    ] = "",
    wait_s: Annotated[
        float, typer.Option(metavar="SECONDS", help="Longest time it may take. Ctrl-C stops the validation too.")
    ] = 3600.0,
) -> None:
    """Load a model, run it, and compare it with transformers. Exit code 1 if that fails."""
    settings = settings_of(context)
    options = parse_json_pairs("--option", option) if option else None

    def tell(step: ValidationStep) -> None:
        if settings.json:
            return
        seconds = f"{step.seconds:.1f} s" if step.state != "RUNNING" else ""
        parts = (f"{step.name:<12}", _MARKS.get(step.state, ""), seconds, step.message)
        note("  ".join(filter(None, parts)))
        if step.figures:
            figures = [
                f"{name} {formats.size(value) if name.endswith('_bytes') else f'{value:.6g}'}"
                for name, value in step.figures.items()
            ]
            note(f"{'':<12}  {', '.join(figures)}")

    with settings.connect() as client:
        attempt = client.models.validate(
            model_id, load_options=options, node_id=node, device_id=device, on_step=tell, deadline_s=wait_s
        )
    outcome = "passed" if attempt.passed else "failed"
    reason = f": {attempt.failure.reason}: {attempt.failure.message}" if attempt.failure else ""
    text = f"{attempt.model_id} {outcome} on {attempt.node_id}/{attempt.device_id}{reason}"
    print_done(settings, attempt, text)
    if not attempt.passed:
        raise typer.Exit(FAILED)


@reported
def attempts(
    context: typer.Context,
    *,
    model_id: ModelId,
    passed: Annotated[bool, typer.Option("--passed", help="List only validations that passed.")] = False,
    limit: Annotated[int, typer.Option(metavar="N", help="Largest number of lines.", min=1)] = 20,
) -> None:
    """List the validations of a model, the newest first."""
    settings = settings_of(context)
    with settings.connect() as client:
        found = list(islice(client.models.attempts(model_id, passed_only=passed), limit))
    rows = [
        (
            formats.local_time(attempt.create_time),
            "passed" if attempt.passed else "failed" if attempt.done else "running",
            f"{attempt.node_id}/{attempt.device_id}",
            json.dumps(dict(attempt.load_options)) if attempt.load_options else "",
            " ".join(f"{name} {attempt.versions[name]}" for name in _SHOWN_VERSIONS if name in attempt.versions),
            f"{attempt.failure.reason}: {attempt.failure.message}" if attempt.failure else "",
        )
        for attempt in found
    ]
    headings = ("when", "outcome", "where", "load options", "versions", "failure")
    empty = f"no validations; run one with `headrace models validate {model_id}`"
    print_rows(settings, found, headings, rows, empty=empty)
