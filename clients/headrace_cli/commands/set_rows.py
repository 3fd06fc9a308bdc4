"""The rows of a set: they are read through an extraction of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headrace_cli.commands.options import whole_set_id

if TYPE_CHECKING:
    from headrace_client import HeadraceClient
    from headrace_client.values import Extraction


def extraction_of(client: HeadraceClient, set_id: str, hookpoints: Sequence[str]) -> Extraction:
    """Finds a finished extraction of the set, or starts one that computes nothing.

    Raises ExtractionNotFound if no node remembers one, ModelChanged if a new one would make another set.
    """
    from headrace_client import errors  # noqa: PLC0415
    from headrace_client.values import ExtractionState, Window  # noqa: PLC0415

    lost: errors.NodeNotFound | None = None
    for held in client.sets.get(whole_set_id(client, set_id)):
        # The first three columns are token_id, document and position.
        wanted = hookpoints or [name for name in held.columns[3:] if not name.endswith(".scale")]
        try:
            listed = client.extractions.list(node=held.node_id)
        except errors.NodeNotFound as exc:  # It is not alive; another node may hold the set too.
            lost = exc
            continue
        known = [
            extraction
            for extraction in listed
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
                # Rows that are not finite were allowed then, or the set would not have them.
                allow_non_finite=any(extraction.n_non_finite for extraction in known),
                node=held.node_id,
            )
            if started.set_id != held.id:
                if started.id not in {extraction.id for extraction in listed}:  # Else others wait for its rows.
                    client.extractions.cancel(started.id)
                raise errors.ModelChanged(
                    f"set {held.id[:16]} can't be read through a new extraction: model {job.model_id} or corpus "
                    f"{job.corpus_id} has changed, and they make the set {started.set_id[:16]} now",
                    remedy="name an extraction of the set that is done, or `headrace extract` the new set",
                )
            return client.extractions.wait(started.id)
    if lost is not None:
        raise lost
    raise errors.ExtractionNotFound(
        f"no extraction of set {set_id} is known any more; `headrace extract` it again, which computes nothing anew"
    )


def extraction_or_set(client: HeadraceClient, named: str, columns: Sequence[str]) -> Extraction:
    """Returns the extraction of this id, or one of the set whose id begins so. Raises ExtractionNotFound."""
    from headrace_client.errors import ExtractionNotFound, SetNotFound  # noqa: PLC0415
    from headrace_client.values import PROVENANCE_COLUMNS  # noqa: PLC0415

    try:
        return client.extractions.get(named)
    except ExtractionNotFound as exc:
        hookpoints = [name for name in columns if name not in PROVENANCE_COLUMNS and not name.endswith(".scale")]
        try:
            return extraction_of(client, named, hookpoints)
        except SetNotFound:
            raise exc from None
