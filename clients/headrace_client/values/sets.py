"""Activation sets, as nodes hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar

from headrace_client.values.listing import Shown


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPin:
    """An owner's wish that a set is kept, until `expire_time` or for ever."""

    owner: str
    reason: str = ""
    expire_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ActivationSet(Shown):
    """One node's copy of a set; `holders` read or extend it now.

    `identity` is everything that its rows depend on, `identity["recipe"]` among it; empty in lists.
    """

    SHOWN: ClassVar[tuple[str, ...]] = ("id", "node_id", "model_id", "corpus_id", "n_rows", "size_bytes")

    id: str
    node_id: str
    model_id: str
    corpus_id: str
    columns: tuple[str, ...]
    n_rows: int
    size_bytes: int
    complete: bool
    retention: str
    path: str
    create_time: datetime | None = None
    update_time: datetime | None = None
    last_used_time: datetime | None = None
    pins: tuple[SetPin, ...] = ()
    holders: tuple[str, ...] = ()
    deleting: bool = False
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedRows:
    """A file of a set that is not as it was sealed; no column, and no `end_row`, for the set's index."""

    file: str
    column: str
    first_row: int
    end_row: int | None
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetVerification:
    """How far a node's comparison of a set with its digests is; the first thousand `damages` come when it is `done`."""

    set_id: str
    node_id: str
    n_files: int
    n_files_total: int
    size_bytes: int
    total_bytes: int
    n_damaged: int
    damages: tuple[DamagedRows, ...] = ()
    done: bool = False
