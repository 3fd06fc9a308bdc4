"""`headrace sets export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.options import SetId, whole_set_id
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_value
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headrace_client import HeadraceClient
    from headrace_client.values import Extraction


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


def extraction_of(client: HeadraceClient, set_id: str, hookpoints: Sequence[str]) -> Extraction:
    """Finds a finished extraction of the set, or starts one that computes nothing: rows are read through extractions.

    Raises ExtractionNotFound if no node remembers an extraction of the set.
    """
    from headrace_client import errors  # noqa: PLC0415
    from headrace_client.values import ExtractionState, Window  # noqa: PLC0415

    for held in client.sets.get(whole_set_id(client, set_id)):
        # The first three columns are token_id, document and position.
        wanted = hookpoints or [name for name in held.columns[3:] if not name.endswith(".scale")]
        known = [
            extraction
            for extraction in client.extractions.list(node=held.node_id)
            if extraction.set_id == held.id and not isinstance(extraction.retention, Window)
        ]
        for extraction in known:
            has_all = extraction.n_rows >= held.n_rows and set(wanted) <= set(extraction.hookpoints)
            if extraction.state is ExtractionState.DONE and has_all:
                return extraction
        if known:
            job = known[0]  # The recipe is the same in all of them: it is part of the set's identity.
            started = client.extractions.start(
                job.model_id,
                job.corpus_id,
                list(wanted),
                recipe=job.recipe,
                max_rows=0 if held.complete else held.n_rows,
                node=held.node_id,
            )
            return client.extractions.wait(started.id)
    raise errors.ExtractionNotFound(
        f"no extraction of set {set_id} is known any more; `headrace extract` it again, which computes nothing anew"
    )
