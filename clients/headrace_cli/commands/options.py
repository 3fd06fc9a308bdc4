"""Arguments and options that several commands share, and the reading of their text."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace_cli.output import formats

if TYPE_CHECKING:
    from headrace_client import HeadraceClient

ModelId = Annotated[str, typer.Argument(metavar="MODEL", help="Id of a registered model; see `headrace models list`.")]
CorpusId = Annotated[str, typer.Argument(metavar="CORPUS", help="Id of a corpus; see `headrace corpora list`.")]
NewCorpusId = Annotated[str, typer.Argument(metavar="CORPUS", help="Id of the new corpus.")]
ExtractionId = Annotated[
    str, typer.Argument(metavar="EXTRACTION", help="Id of an extraction, as `headrace extract` prints it.")
]
SetId = Annotated[str, typer.Argument(metavar="SET", help="Id of an activation set, or the beginning of its id.")]
OnlyModel = Annotated[str, typer.Option("--model", metavar="MODEL", help="List only entries of this model.")]
OnlyNode = Annotated[str, typer.Option("--node", metavar="NODE", help="List only entries of this node.")]
HubTokenFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File with a token of the Hugging Face hub, for gated repositories.")
]
PinOwner = Annotated[str, typer.Option("--owner", metavar="NAME", help="Owner of the pin.  (default: your user name)")]
PinReason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Reason for the pin, shown to other users.")]
PinFor = Annotated[
    str, typer.Option("--for", metavar="DURATION", help="Lifetime of the pin: 90m, 8h, 7d.  (default: for ever)")
]


def expire_time(for_: str) -> dt.datetime | None:
    """Reads a `PinFor` option: now plus the duration; None, which means for ever, if it is empty."""
    if not for_:
        return None
    try:
        return dt.datetime.now(dt.UTC) + dt.timedelta(seconds=formats.parse_duration(for_))
    except (ValueError, OverflowError) as exc:
        raise typer.BadParameter(str(exc), param_hint="--for") from exc


def parse_pairs(option: str, texts: Iterable[str] | None) -> dict[str, str]:
    """Reads the KEY=VALUE texts of an option that may be repeated."""
    pairs = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=option)
        pairs[key] = value
    return pairs


def parse_json_pairs(option: str, texts: Iterable[str] | None) -> dict[str, Any]:
    """Reads KEY=VALUE texts of which the values are JSON; a value that is not JSON stays a text."""
    pairs: dict[str, Any] = dict(parse_pairs(option, texts))
    for key, value in pairs.items():
        try:
            pairs[key] = json.loads(value)
        except ValueError:
            pairs[key] = value
    return pairs


def read_hub_token(path: Path | None) -> str:
    """Reads a `HubTokenFile` option; empty without a file."""
    return path.read_text().strip() if path else ""


def whole_set_id(client: HeadraceClient, beginning: str) -> str:
    """Returns the only set id that begins with `beginning`; else `beginning`, for the registry to accept or refuse."""
    found = {held.id for held in client.sets.list() if held.id.startswith(beginning)}
    return found.pop() if len(found) == 1 else beginning
