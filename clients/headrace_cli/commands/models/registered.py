"""`headrace models`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace_cli.commands.models.catalog import catalog, repo_of
from headrace_cli.commands.models.validations import attempts, validate
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.progress import Bar, show_model
from headrace_cli.output.results import note, print_json, print_rows, print_value
from headrace_cli.settings import Settings, settings_of

if TYPE_CHECKING:
    from headrace_client.fidelity import Fidelity
    from headrace_client.values import Model

app = typer.Typer(help="Registered models and their files.", no_args_is_help=True, rich_markup_mode=None)
app.command("catalog")(catalog)
app.command("validate")(validate)
app.command("attempts")(attempts)
_REPO = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@app.command()
@reported
def add(
    context: typer.Context,
    *,
    source: Annotated[str, typer.Argument(help="Hub repo, name in the catalog, folder, or .gguf file.")],
    model_id: Annotated[str, typer.Option("--id", help="Id of the model; derived from the source if not given.")] = "",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of a hub repo.")] = "",
    quantization: Annotated[str, typer.Option(help="none, int8, int4 or int2; also FP16, Q8, Q4, Q2.")] = "none",
    dtype: Annotated[str, typer.Option(help="Compute dtype: float32, bfloat16 or float16.")] = "",
    load_option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE, VALUE as JSON or text; may be repeated.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may be repeated.")] = None,
    hub_token_file: Annotated[Path | None, typer.Option(help="File with a hub token, for gated repos.")] = None,
    prepare: Annotated[bool, typer.Option("--prepare/--no-prepare", help="Fetch the files and wait for them.")] = True,
    wait_s: Annotated[float, typer.Option(help="Longest wait for the files.")] = 3600.0,
) -> None:
    """Register a model and make its files ready."""
    settings = settings_of(context)
    options: dict[str, Any] = {key: _value(text) for key, text in _pairs("--load-option", load_option or [])}
    if dtype:
        options["dtype"] = dtype
    named = source_of(source)
    hub_token = hub_token_file.read_text().strip() if hub_token_file else ""
    with settings.connect() as client:
        if "hub" in named and "/" not in source:
            named = {"hub": repo_of(client, source)}
        model = client.models.register(
            **named,
            id=model_id,
            revision=revision,
            quantization=quantization,
            load_options=options,
            labels=dict(_pairs("--label", label or [])),
            hub_token=hub_token,
        )
        if prepare and model.state != "READY":
            client.models.prepare(model.id, hub_token=hub_token)
            with Bar(model.id) as bar:
                model = client.models.wait_ready(model.id, lambda now: show_model(bar, now), deadline_s=wait_s)
    _print_model(settings, model)


@app.command("list")
@reported
def list_models(
    context: typer.Context,
    *,
    filter_: Annotated[str, typer.Option("--filter", help="Such as `state = READY AND id : smol`.")] = "",
) -> None:
    """List models."""
    settings = settings_of(context)
    with settings.connect() as client:
        models = list(client.models.list(filter_))
    rows = [
        (
            model.id,
            model.state.value,
            model.quantization.value,
            formats.count(model.n_parameters) if model.n_parameters else "",
            formats.size(model.weight_bytes) if model.weight_bytes else "",
            model.source.location,
        )
        for model in models
    ]
    headings = ("id", "state", "quantization", "parameters", "weights", "source")
    print_rows(settings, models, headings, rows, empty="no models; add one with `headrace models add`")


@app.command()
@reported
def show(context: typer.Context, model_id: Annotated[str, typer.Argument(metavar="MODEL")]) -> None:
    """Show a model."""
    settings = settings_of(context)
    with settings.connect() as client:
        model = client.models.get(model_id)
    _print_model(settings, model)
    if model.fidelity and not settings.json:
        _print_fidelity(settings, model.fidelity)


@app.command()
@reported
def hookpoints(context: typer.Context, model_id: Annotated[str, typer.Argument(metavar="MODEL")]) -> None:
    """List what can be captured in a model."""
    settings = settings_of(context)
    with settings.connect() as client:
        points = client.hookpoints(model_id)
    rows = [(point.name, " x ".join(map(str, point.shape)), point.module, point.unavailable) for point in points]
    columns = ("hookpoint", "shape", "module", "not available because")
    print_rows(settings, points, columns, rows, empty="no hookpoints")


@app.command()
@reported
def watch(
    context: typer.Context,
    *,
    model_id: Annotated[str, typer.Argument(metavar="MODEL")],
    wait_s: Annotated[float, typer.Option(help="Longest time to watch.")] = 86400.0,
) -> None:
    """Watch a model until it is ready or has failed; with --json one event a line."""
    settings = settings_of(context)
    with settings.connect() as client, Bar(model_id) as bar:

        def tell(model: Model) -> None:
            if settings.json:
                print_json(model)
            else:
                show_model(bar, model)

        client.models.wait_ready(model_id, tell, deadline_s=wait_s)


@app.command("rm")
@reported
def remove(
    context: typer.Context,
    *,
    model_id: Annotated[str, typer.Argument(metavar="MODEL")],
    force: Annotated[bool, typer.Option("--force", help="Unload it first instead of refusing.")] = False,
) -> None:
    """Delete a model."""
    settings = settings_of(context)
    with settings.connect() as client:
        client.models.delete(model_id, force=force)
    if settings.json:
        print_json({"deleted": model_id})
    else:
        note(f"deleted {model_id}")


def source_of(text: str) -> dict[str, str]:
    """Tells hub repos from paths on the registry's disk, which exist here, end in .gguf or begin like a path."""
    path = Path(text).expanduser()
    is_path = path.exists() or text.endswith(".gguf") or text.startswith((".", "/", "~"))
    if is_path:
        return {"gguf" if path.suffix == ".gguf" else "folder": str(path.absolute())}
    if not _REPO.match(text):
        raise typer.BadParameter(f"{text!r} is neither a hub repo (owner/name) nor a path", param_hint="SOURCE")
    return {"hub": text}


def _pairs(option: str, texts: list[str]) -> list[tuple[str, str]]:
    for text in texts:
        if "=" not in text:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=option)
    return [(key, value) for key, _, value in (text.partition("=") for text in texts)]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _print_fidelity(settings: Settings, fidelity: Fidelity) -> None:
    note(f"\nresidual stream against the unquantized model in {fidelity.reference_dtype}, {fidelity.n_tokens} tokens")
    rows = [(str(each.layer), f"{each.cosine:.6f}", f"{each.relative_error:.4f}") for each in fidelity.layers]
    print_rows(settings, fidelity.layers, ("layer", "cosine", "relative error"), rows, empty="no layers")


def _print_model(settings: Settings, model: Model) -> None:
    network = model.architecture
    shape = f"{network.class_name}, {network.n_layers} layers, d_model {network.d_model}" if network else ""
    facts = {
        "id": model.id,
        "state": model.state.value,
        "failure": f"{model.failure.reason}: {model.failure.message}" if model.failure else "",
        "source": f"{model.source.kind} {model.source.location}",
        "commit": model.commit_sha,
        "network": shape,
        "parameters": formats.count(model.n_parameters) if model.n_parameters else "",
        "weights": formats.size(model.weight_bytes) if model.weight_bytes else "",
        "quantization": model.quantization.value,
        "load options": json.dumps(dict(model.load_options)) if model.load_options else "",
        "labels": ", ".join(f"{key}={value}" for key, value in model.labels.items()),
        "files": model.files_path,
        "in the store": formats.size(model.store_bytes) if model.store_bytes else "",
        "last used": formats.time_of_day(model.last_used_time),
        "registered": formats.time_of_day(model.create_time),
    }
    print_value(settings, model, facts)
