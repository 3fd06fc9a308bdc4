"""`headrace sets export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from headrace_cli.commands.options import SetId
from headrace_cli.commands.set_rows import extraction_of
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_value
from headrace_cli.settings import settings_of


class Target(StrEnum):
    """The program that reads the folder."""

    SAE_LENS = "sae-lens"


class Number(StrEnum):
    """Dtypes that Arrow has."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


@reported
def export(
    context: typer.Context,
    *,
    set_id: SetId,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; it must not exist yet.")],
    to: Annotated[
        Target,
        typer.Option(help="Format. sae-lens: cached activations, for SAELens' option `cached_activations_path`."),
    ],
    hookpoint: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Hookpoint to write; may be repeated.  (default: all)"),
    ] = None,
    context_size: Annotated[
        int, typer.Option(metavar="N", min=0, help="Rows in one context; 0: the recipe's context size.")
    ] = 0,
    join_documents: Annotated[bool, typer.Option(help="Let a context hold several documents.")] = False,
    dtype: Annotated[Number, typer.Option(help="Dtype of the activations.")] = Number.FLOAT32,
) -> None:
    """Write a set in the format of another program. Rows that don't fill a context are left out, and counted."""
    from headrace_client.integrations.sae_lens_export import export_cached_activations  # noqa: PLC0415

    settings = settings_of(context)
    with settings.connect() as client:
        extraction = extraction_of(client, set_id, hookpoint or [])
        done = export_cached_activations(
            client,
            extraction,
            folder,
            hookpoints=hookpoint,
            context_size=context_size,
            join_documents=join_documents,
            dtype=dtype.value,
        )
    facts = {
        "folder": done.folder,
        "format": to.value,
        "hookpoints": ", ".join(done.hookpoints),
        "contexts": f"{formats.count(done.n_contexts)} of {done.context_size} rows",
        "left out": f"{formats.count(done.n_rows_left_out)} rows that fill no context",
        "files": formats.count(done.n_files),
    }
    print_value(settings, done, facts)
