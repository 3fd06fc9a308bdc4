"""Pins: an operator keeps a model where it is resident, with owner, reason and end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from headrace_registry.inputs import checked_id, checked_owner, checked_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """One pin for each model, node and owner. An empty `node_id` means every node; no `expire_time` means for ever."""

    model_id: str
    node_id: str = ""
    owner: str
    reason: str = ""
    expire_time: datetime | None = None
    create_time: datetime | None = None  # None before it is stored.

    def __post_init__(self) -> None:
        checked_id(self.model_id, field="pin.model_id")
        if self.node_id:
            checked_id(self.node_id, field="pin.node_id")
        checked_owner(self.owner, field="pin.owner")
        checked_text(self.reason, field="pin.reason")

    @property
    def words(self) -> str:
        """Describes the pin for the events of the residencies that it keeps."""
        return f"pinned by {self.owner}" + (f": {self.reason}" if self.reason else "")
