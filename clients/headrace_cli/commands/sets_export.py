"""`headrace sets export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.options import whole_id
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_value
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headrace_client import HeadraceClient
    from headrace_client.values import Extraction


class Target(StrEnum):
    """What is written."""

    SAE_LENS = "sae-lens"


class Number(StrEnum):
    """Element types that Arrow has."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


@reported
def export(
    context: typer.Context,
    *,
    set_id: Annotated[str, typer.Argument(metavar="SET", help="Id, or its beginning.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is not there yet.")],
    to: Annotated[Target, typer.Option(help="sae-lens: cached activations, for `cached_activations_path`.")],
    hookpoint: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    context_size: Annotated[int, typer.Option(min=0, help="Rows in a context; the recipe's if not given.")] = 0,
    join_documents: Annotated[bool, typer.Option(help="Let documents follow one another in a context.")] = False,
    dtype: Annotated[Number, typer.Option(help="Of the activations.")] = Number.FLOAT32,
) -> None:
    """Write a set as a folder that another program reads. Rows that fill no context are left out, and counted."""
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
    """An extraction through which the set's rows can be read; none of them is computed again."""
    from headrace_client import errors  # noqa: PLC0415
    from headrace_client.values import ExtractionState, Window  # noqa: PLC0415

    for one in client.sets.get(whole_id(client, set_id)):
        wanted = hookpoints or [name for name in one.columns[3:] if not name.endswith(".scale")]
        known = [
            each
            for each in client.extractions.list(node=one.node_id)
            if each.set_id == one.id and not isinstance(each.retention, Window)
        ]
        for each in known:
            has_all = each.n_rows >= one.n_rows and set(wanted) <= set(each.hookpoints)
            if each.state is ExtractionState.DONE and has_all:
                return each
        for each in known:
            started = client.extractions.start(
                each.model_id,
                each.corpus_id,
                list(wanted),
                recipe=each.recipe,
                max_rows=0 if one.complete else one.n_rows,
                node=one.node_id,
            )
            return client.extractions.wait(started.id)
    raise errors.ExtractionNotFound(
        f"no extraction of set {set_id} is known any more; `headrace extract` it again, which computes nothing anew"
    )
