"""`headrace models validate`, `attempts`, `attempt`, `note` and `adopt`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.options import ModelId, parse_json_pairs
from headrace_cli.exits import FAILED, reported
from headrace_cli.output import formats
from headrace_cli.output.results import note, print_done, print_rows, print_value
from headrace_cli.output.tables import Column
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client import HeadraceClient
    from headrace_client.values import ValidationAttempt, ValidationStep

_SHOWN_VERSIONS = ("torch", "transformers")  # An attempt keeps more; these decide whether a model runs.
_AttemptId = Annotated[str, typer.Argument(metavar="ATTEMPT", help="Id of an attempt, or the beginning of its id.")]
_COLUMNS = (
    Column("attempt"),
    Column("when", 2),
    Column("kind", 4),
    Column("outcome"),
    Column("time", 3),
    Column("where", 6),
    Column("load options", 5, prose=True),
    Column("versions", 8),
    Column("failure", 1, prose=True),
    Column("notes", 7, prose=True),
)
_ID_LENGTH = 8  # Of 32 digits: enough to tell a model's attempts apart.
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
            figures = []
            for name, value in step.figures.items():
                number = formats.count(value) if value.is_integer() else f"{value:.6g}"
                figures.append(f"{name} {formats.size(value) if name.endswith('_bytes') else number}")
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
    passed: Annotated[bool, typer.Option("--passed", help="List only attempts that passed.")] = False,
    limit: Annotated[int, typer.Option(metavar="N", help="Largest number of lines.", min=1)] = 20,
) -> None:
    """List the loads and validations of a model, the newest first."""
    settings = settings_of(context)
    with settings.connect() as client:
        found = client.models.attempts(model_id, passed_only=passed, limit=limit)
    rows = [
        (
            attempt.id[:_ID_LENGTH],
            formats.local_time(attempt.create_time),
            attempt.kind.lower(),
            "passed" if attempt.passed else "failed" if attempt.done else "running",
            formats.seconds(sum(step.seconds for step in attempt.steps)),
            f"{attempt.node_id}/{attempt.device_id}",
            json.dumps(dict(attempt.load_options)) if attempt.load_options else "",
            " ".join(f"{name} {attempt.versions[name]}" for name in _SHOWN_VERSIONS if name in attempt.versions),
            f"{attempt.failure.reason}: {attempt.failure.message}" if attempt.failure else "",
            attempt.notes,
        )
        for attempt in found
    ]
    empty = f"no attempts; load it, or run `headrace models validate {model_id}`"
    print_rows(settings, found, _COLUMNS, rows, empty=empty)


@reported
def attempt(context: typer.Context, *, model_id: ModelId, attempt_id: _AttemptId) -> None:
    """Show one attempt to load a model, with its steps and the end of its log."""
    settings = settings_of(context)
    with settings.connect() as client:
        found = _attempt_of(client, model_id, attempt_id)
    failure = f"{found.failure.reason}: {found.failure.message}" if found.failure else ""
    facts = {
        "attempt": found.id,
        "kind": found.kind.lower(),
        "outcome": "passed" if found.passed else "failed" if found.done else "running",
        "where": f"{found.node_id}/{found.device_id}",
        "when": formats.local_time(found.create_time),
        "quantization": found.quantization.value,
        "load options": json.dumps(dict(found.load_options)) if found.load_options else "",
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        "failure": failure,
        "notes": found.notes,
        **{f"step {step.name}": f"{_MARKS.get(step.state, '')} {step.seconds:.1f} s" for step in found.steps},
    }
    print_value(settings, found, facts)
    if found.log_tail and not settings.json:
        typer.echo(f"\n{found.log_tail.rstrip()}")


@reported
def note_attempt(
    context: typer.Context,
    *,
    model_id: ModelId,
    attempt_id: _AttemptId,
    notes: Annotated[str, typer.Argument(metavar="TEXT", help="The notes; they replace earlier ones.")],
) -> None:
    """Write notes to an attempt."""
    settings = settings_of(context)
    with settings.connect() as client:
        noted = client.models.note_attempt(_attempt_of(client, model_id, attempt_id).id, notes)
    print_done(settings, noted, f"noted on {noted.id[:_ID_LENGTH]}")


@reported
def adopt(context: typer.Context, *, model_id: ModelId, attempt_id: _AttemptId) -> None:
    """Make the load options of an attempt that passed those of the model."""
    settings = settings_of(context)
    with settings.connect() as client:
        model = client.models.adopt_attempt(_attempt_of(client, model_id, attempt_id).id)
    options = json.dumps(dict(model.load_options)) if model.load_options else "none"
    print_done(settings, model, f"{model.id} is loaded with these options from now on: {options}")


def _attempt_of(client: HeadraceClient, model_id: str, beginning: str) -> ValidationAttempt:
    """Returns the only attempt of the model whose id begins so. Raises AttemptNotFound."""
    from headrace_client.errors import AttemptNotFound  # noqa: PLC0415

    found = [each for each in client.models.attempts(model_id) if each.id.startswith(beginning)]
    if len(found) != 1:
        raise AttemptNotFound(f"{len(found) or 'no'} attempts of {model_id} have ids that begin with {beginning!r}")
    return found[0]
