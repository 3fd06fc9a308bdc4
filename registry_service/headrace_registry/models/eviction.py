"""Which model files have to go so that others fit: a pure decision over what the store holds.

Least recently used first, what nobody can load before what somebody can; never what is in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace_registry.errors import DiskFull


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFolder:
    """One folder of the store. `models` are those that load from it; `last_used` is in seconds of any one clock."""

    path: str
    models: tuple[str, ...] = ()
    in_use: bool = False
    reserved_bytes: int = 0
    last_used: float = 0.0


def plan_room(
    folders: Sequence[StoredFolder],
    sizes: Mapping[str, int],
    *,
    target: str,
    total_bytes: int,
    quota_bytes: int,
    free_bytes: int,
) -> list[StoredFolder]:
    """Returns the folders to remove so that `target` may grow to `total_bytes`. Raises DiskFull if that is not enough.

    `sizes` is what is on the disk, entries that no model knows included. What others have reserved and not yet written
    counts as taken.
    """
    others = [folder for folder in folders if folder.path != target]
    growth = max(0, total_bytes - sizes.get(target, 0))
    promised = sum(max(0, folder.reserved_bytes - sizes.get(folder.path, 0)) for folder in others)
    over_bytes = sum(sizes.values()) + promised + growth - quota_bytes
    lacking_bytes = promised + growth - free_bytes if growth else 0
    needed = max(over_bytes, lacking_bytes) if growth else 0
    victims, freed = [], 0
    for folder in sorted((each for each in others if not each.in_use), key=_order):
        if freed >= needed:
            break
        if sizes.get(folder.path, 0):
            victims.append(folder)
            freed += sizes[folder.path]
    if freed >= needed:
        return victims
    return _refuse(growth, growth - (needed - freed), over_quota=over_bytes >= lacking_bytes, quota_bytes=quota_bytes)


def _order(folder: StoredFolder) -> tuple[bool, float, str]:
    return bool(folder.models), folder.last_used, folder.path


def _refuse(required_bytes: int, room_bytes: int, *, over_quota: bool, quota_bytes: int) -> list[StoredFolder]:
    room_bytes = max(0, room_bytes)
    limit = f"the quota of {quota_bytes} bytes (--models-quota-bytes)" if over_quota else "what is free on the disk"
    raise DiskFull(
        f"the files need {required_bytes} more bytes, and {limit} leaves room for {room_bytes}; unload or delete "
        "models that are not needed, or make more room",
        metadata={"required_bytes": str(required_bytes), "free_bytes": str(room_bytes)},
    )
