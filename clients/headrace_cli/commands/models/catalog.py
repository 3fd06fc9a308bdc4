"""`headrace models catalog`, and short names of curated models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.models.fit import form_name
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_rows
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client import HeadraceClient
    from headrace_client.memory import CatalogEntry

# The columns of memory.
_FORMS = ("bfloat16", "int8", "int4")


@reported
def catalog(
    context: typer.Context,
    *,
    fits: Annotated[str, typer.Option(metavar="SIZE", help="Only what fits in so much memory: 24GB, 16GiB.")] = "",
    category: Annotated[
        str, typer.Option(help="tiny, interpretability, coding, general or instruct.", show_default=False)
    ] = "",
) -> None:
    """List curated models: what they are and what they take."""
    settings = settings_of(context)
    try:
        fits_bytes = formats.parse_size(fits) if fits else 0
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--fits") from None
    with settings.connect() as client:
        entries = list(client.models.catalog(fits_bytes=fits_bytes, category=category))
    headings = ("name", "size", "layers", "width", "context", "probe", *_FORMS, "batch", "repo", "")
    print_rows(
        settings,
        entries,
        headings,
        [_row(entry, fits_bytes) for entry in entries],
        empty="no curated model fits; give more memory or another category",
    )


def repo_of(client: HeadraceClient, name: str) -> str:
    """Returns the repo of a short name, or the name itself where the catalog has none like it.

    The beginning of one name stands for it; of several, it is refused.
    """
    entries = list(client.models.catalog())
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
    return (
        entry.name,
        formats.short_count(entry.n_parameters),
        str(entry.n_layers),
        str(entry.d_model),
        formats.count(entry.context_window),
        ", ".join(map(str, entry.probe_layers)),
        *(sizes.get(form, "") for form in _FORMS),
        _batch(entry, fits_bytes),
        entry.repo_id,
        "gated" if entry.gated else "",
    )


def _batch(entry: CatalogEntry, fits_bytes: int) -> str:
    """The batch for the size asked for, or for the smallest that holds the model."""
    within = [each for each in entry.batches if not fits_bytes or each.memory_bytes <= fits_bytes]
    if not within:
        return ""
    chosen = within[-1] if fits_bytes else within[0]
    form = form_name(chosen.quantization.value, "bfloat16")
    return f"{chosen.batch_size} in {chosen.memory_bytes // 10**9} GB" + (f" {form}" if form != "bfloat16" else "")
