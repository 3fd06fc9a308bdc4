"""`headrace models add`, `list`, `show`, `hookpoints`, `watch` and `rm`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.models.catalog import repo_of
from headrace_cli.commands.models.residencies import until_resident
from headrace_cli.commands.options import HubTokenFile, ModelId, parse_json_pairs, parse_pairs, read_hub_token
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.progress import Bar, show_model
from headrace_cli.output.results import note, print_done, print_json, print_rows, print_value
from headrace_cli.output.tables import Column
from headrace_cli.settings import Settings, settings_of

if TYPE_CHECKING:
    from headrace_client.values import Model

_LISTED = (
    Column("id"),
    Column("state"),
    Column("quantization", 2),
    Column("parameters", 1),
    Column("weights", 3),
    Column("source", 4),
)
_FIDELITY = (Column("layer"), Column("cosine"), Column("relative error"))
_HOOKPOINTS = (
    Column("hookpoint"),
    Column("shape", 1),
    Column("module", 3),
    Column("not available because", 2, prose=True),
)
_REPO = re.compile(r"^[\w.-]+(/[\w.-]+)?$")

_Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="Hub repository (owner/name), name in the catalog, folder, or .gguf file."),
]
_NewModelId = Annotated[
    str, typer.Option("--id", metavar="MODEL", help="Id of the model.  (default: derived from SOURCE)")
]
_Revision = Annotated[str, typer.Option(help="Branch, tag or commit of a hub repository.  (default: main)")]
_Quantization = Annotated[str, typer.Option(help="none, int8, int4 or int2; also FP16, Q8, Q4, Q2.")]
_Dtype = Annotated[
    str,
    typer.Option(help="Compute dtype: float32, bfloat16 or float16.  (default: bfloat16 on a GPU, float32 on a CPU)"),
]
_LoadOptions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Load option; VALUE is JSON or text; may be repeated. See `headrace models options`.",
    ),
]
_Labels = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Label of the model; may be repeated.")]
_Fit = Annotated[
    str,
    typer.Option(metavar="SIZE", help="Memory that the model may take: 24GB. int8 or int4 is taken if it needs more."),
]
_Load = Annotated[bool, typer.Option("--load", help="Load the model once its files are ready.")]
_Prepare = Annotated[
    bool, typer.Option("--prepare/--no-prepare", help="Fetch the files and wait until they are ready.")
]
_Verify = Annotated[
    bool, typer.Option("--verify", help="Read all files of a model that is ready, and mend those in the store.")
]
_WaitS = Annotated[float, typer.Option(metavar="SECONDS", help="Longest time to wait for the files.")]


@reported
def add(
    context: typer.Context,
    *,
    source: _Source,
    model_id: _NewModelId = "",
    revision: _Revision = "",
    quantization: _Quantization = "none",
    dtype: _Dtype = "",
    load_option: _LoadOptions = None,
    label: _Labels = None,
    fit: _Fit = "",
    load: _Load = False,
    hub_token_file: HubTokenFile = None,
    prepare: _Prepare = True,
    verify: _Verify = False,
    wait_s: _WaitS = 3600.0,
) -> None:
    """Register a model and fetch its files."""
    settings = settings_of(context)
    if load and not prepare:
        raise typer.BadParameter("needs the files: leave --no-prepare out", param_hint="--load")
    options = parse_json_pairs("--load-option", load_option)
    if dtype:
        options["dtype"] = dtype
    labels = parse_pairs("--label", label)
    named = source_of(source)
    hub_token = read_hub_token(hub_token_file)
    with settings.connect() as client:
        if "hub" in named and "/" not in source:
            named = {"hub": repo_of(client, source)}
        model = client.models.register(
            **named,
            id=model_id,
            revision=revision,
            quantization=quantization,
            load_options=options,
            labels=labels,
            hub_token=hub_token,
            fit_bytes=formats.bytes_of("--fit", fit) if fit else 0,
        )
        if fit and not settings.json:
            form = "without quantization" if model.quantization.value == "none" else f"as {model.quantization.value}"
            note(f"{model.id} fits into {fit} {form}")
        if prepare and (verify or model.state != "READY"):
            client.models.prepare(model.id, hub_token=hub_token, verify=verify)
            with Bar(model.id) as bar:
                model = client.models.wait_ready(model.id, lambda now: show_model(bar, now), deadline_s=wait_s)
        if load:
            until_resident(client, client.residencies.load(model.id), wait_s)
    _print_model(settings, model)


@reported
def list_models(
    context: typer.Context,
    *,
    filter_: Annotated[
        str, typer.Option("--filter", metavar="FILTER", help="Condition, such as `state = READY AND id : smol`.")
    ] = "",
) -> None:
    """List registered models."""
    settings = settings_of(context)
    with settings.connect() as client:
        models = client.models.list(filter_)
    rows = [
        (
            model.id,
            model.state.value,
            model.quantization.value,
            formats.short_count(model.n_parameters) if model.n_parameters else "",
            formats.size(model.weight_bytes) if model.weight_bytes else "",
            model.source.location,
        )
        for model in models
    ]
    print_rows(settings, models, _LISTED, rows, empty="no models; add one with `headrace models add`")


@reported
def show(context: typer.Context, model_id: ModelId) -> None:
    """Show a model."""
    settings = settings_of(context)
    with settings.connect() as client:
        model = client.models.get(model_id)
    _print_model(settings, model)
    if (fidelity := model.fidelity) and not settings.json:
        reference = f"the unquantized model in {fidelity.reference_dtype}"
        note(f"\nresidual stream compared with {reference}, {fidelity.n_tokens} tokens")
        rows = [(str(each.layer), f"{each.cosine:.6f}", f"{each.relative_error:.4f}") for each in fidelity.layers]
        print_rows(settings, fidelity.layers, _FIDELITY, rows, empty="no layers")


@reported
def hookpoints(context: typer.Context, model_id: ModelId) -> None:
    """List the hookpoints of a model."""
    settings = settings_of(context)
    with settings.connect() as client:
        points = client.hookpoints(model_id)
    rows = [(point.name, " x ".join(map(str, point.shape)), point.module, point.unavailable) for point in points]
    print_rows(settings, points, _HOOKPOINTS, rows, empty="no hookpoints")


@reported
def watch(
    context: typer.Context,
    *,
    model_id: ModelId,
    wait_s: Annotated[float, typer.Option(metavar="SECONDS", help="Longest time to watch.")] = 86400.0,
) -> None:
    """Watch a model until it is ready or has failed. With --json, one event a line."""
    settings = settings_of(context)
    with settings.connect() as client, Bar(model_id) as bar:

        def tell(model: Model) -> None:
            if settings.json:
                print_json(model)
            else:
                show_model(bar, model)

        client.models.wait_ready(model_id, tell, deadline_s=wait_s)


@reported
def remove(
    context: typer.Context,
    *,
    model_id: ModelId,
    force: Annotated[
        bool, typer.Option("--force", help="Unload the model first if it is resident, instead of refusing.")
    ] = False,
) -> None:
    """Delete a model."""
    settings = settings_of(context)
    with settings.connect() as client:
        client.models.delete(model_id, force=force)
    print_done(settings, {"deleted": model_id}, f"deleted {model_id}")


def source_of(text: str) -> dict[str, str]:
    """Tells a hub repo from a path on the registry's disk: a path exists here, ends in .gguf or begins like a path."""
    path = Path(text).expanduser()
    is_path = path.exists() or text.endswith(".gguf") or text.startswith((".", "/", "~"))
    if is_path:
        return {"gguf" if path.suffix == ".gguf" else "folder": str(path.absolute())}
    if not _REPO.match(text):
        raise typer.BadParameter(f"{text!r} is neither a hub repo (owner/name) nor a path", param_hint="SOURCE")
    return {"hub": text}


def _print_model(settings: Settings, model: Model) -> None:
    network, card = model.architecture, model.card
    shape = f"{network.class_name}, {network.n_layers} layers, d_model {network.d_model}" if network else ""
    facts = {
        "id": model.id,
        "state": model.state.value,
        "failure": f"{model.failure.reason}: {model.failure.message}" if model.failure else "",
        "source": f"{model.source.kind} {model.source.location}",
        "commit": model.commit_sha,
        "network": shape,
        "context": formats.count(network.context_window) if network and network.context_window else "",
        "licence": " ".join(filter(None, (card.license, card.license_link))) if card else "",
        "published as": card.dtype if card else "",
        "parameters": formats.count(model.n_parameters) if model.n_parameters else "",
        "weights": formats.size(model.weight_bytes) if model.weight_bytes else "",
        "quantization": model.quantization.value,
        "load options": json.dumps(dict(model.load_options)) if model.load_options else "",
        "labels": ", ".join(f"{key}={value}" for key, value in model.labels.items()),
        "files": model.files_path,
        "stored": formats.size(model.store_bytes) if model.store_bytes else "",
        "last used": formats.local_time(model.last_used_time),
        "registered": formats.local_time(model.create_time),
    }
    print_value(settings, model, facts)
