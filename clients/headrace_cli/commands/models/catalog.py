"""`headrace models catalog` and `headrace models options`, and the short names of curated models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.models.fit import form_name
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_rows
from headrace_cli.output.tables import Column
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client import HeadraceClient
    from headrace_client.values import CatalogEntry

_FORMS = ("bfloat16", "int8", "int4")  # Each has a column with the memory it takes.
_COLUMNS = (
    Column("name"),
    Column("parameters", 1),
    Column("layers", 7),
    Column("width", 8),
    Column("context", 6),
    Column("probe layers", 11),
    *(Column(form, rank) for form, rank in zip(_FORMS, (2, 4, 3), strict=True)),
    Column("batch", 9),
    Column("repo", 10),
    Column("terms", 5),
)

_OPTIONS = (
    Column("option"),
    Column("in the identity", 3),
    Column("values", 2, prose=True),
    Column("default", 4, prose=True),
    Column("effect", 1, prose=True),
)


@reported
def catalog(
    context: typer.Context,
    *,
    fits: Annotated[
        str, typer.Option(metavar="SIZE", help="List only models that fit into this much memory: 24GB, 16GiB.")
    ] = "",
    category: Annotated[
        str,
        typer.Option(help="List only this category: tiny, interpretability, coding, general or instruct."),
    ] = "",
) -> None:
    """List curated models with the memory they take."""
    settings = settings_of(context)
    fits_bytes = formats.bytes_of("--fits", fits) if fits else 0
    with settings.connect() as client:
        entries = client.models.catalog(fits_bytes=fits_bytes, category=category)
    rows = [_row(entry, fits_bytes) for entry in entries]
    print_rows(settings, entries, _COLUMNS, rows, empty="no curated model fits; try more memory or another category")


@reported
def options(context: typer.Context) -> None:
    """List the load options that `headrace models add --load-option` takes."""
    settings = settings_of(context)
    with settings.connect() as client:
        found = client.models.load_options()
    rows = [
        (option.name, "yes" if option.changes_numbers else "no", option.values, option.default, option.about)
        for option in found
    ]
    print_rows(settings, found, _OPTIONS, rows, empty="the registry takes no load options")


def repo_of(client: HeadraceClient, name: str) -> str:
    """Returns the hub repo of a short name, or `name` itself if the catalog has no such model.

    The beginning of a name is enough if only one model's name begins so; otherwise it is refused.
    """
    entries = client.models.catalog()
    exact = next((entry for entry in entries if entry.name == name.lower()), None)
    alike = [entry for entry in entries if entry.name.startswith(name.lower())]
    if exact is not None:
        return exact.repo_id
    if len(alike) > 1:
        names = ", ".join(entry.name for entry in alike)
        raise typer.BadParameter(f"{name!r} could be {names}; give one of these, or owner/name", param_hint="SOURCE")
    return alike[0].repo_id if alike else name


def _row(entry: CatalogEntry, fits_bytes: int) -> tuple[str, ...]:
    sizes = {form_name(each.quantization.value, each.dtype): formats.size(each.total_bytes) for each in entry.memory}
    # The batch of the largest memory within the size asked for; without a size, of the smallest that holds the model.
    batch = ""
    if within := [each for each in entry.batches if not fits_bytes or each.memory_bytes <= fits_bytes]:
        chosen = within[-1] if fits_bytes else within[0]
        form = form_name(chosen.quantization.value, "bfloat16")
        batch = f"{chosen.batch_size} in {chosen.memory_bytes // 10**9} GB" + (f" {form}" if form != "bfloat16" else "")
    return (
        entry.name,
        formats.short_count(entry.n_parameters),
        str(entry.n_layers),
        str(entry.d_model),
        formats.count(entry.context_window),
        ", ".join(map(str, entry.probe_layers)),
        *(sizes.get(form, "") for form in _FORMS),
        batch,
        entry.repo_id,
        "gated" if entry.gated else "",
    )
