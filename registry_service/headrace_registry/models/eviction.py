"""Which model files are evicted so that others fit: a pure decision over the folders of the store.

Folders that no model loads from go first, then the least recently used. A folder in use never goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace_registry.errors import DiskFull


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFolder:
    """One folder of the store. `models` load from it; `last_used` is in seconds of any one clock."""

    path: str
    models: tuple[str, ...] = ()
    in_use: bool = False
    reserved_bytes: int = 0
    last_used: float = 0.0


def plan_eviction(
    folders: Sequence[StoredFolder],
    sizes: Mapping[str, int],
    *,
    target: str,
    total_bytes: int,
    quota_bytes: int,
    free_bytes: int,
) -> list[StoredFolder]:
    """Returns the folders to remove so that `target` may grow to `total_bytes`. Raises DiskFull if they are too small.

    `sizes` are the bytes on the disk by path, also of folders that the registry does not know. Bytes that other folders
    have reserved and not written yet count as taken.
    """
    others = [folder for folder in folders if folder.path != target]
    growth = max(0, total_bytes - sizes.get(target, 0))
    promised = sum(max(0, folder.reserved_bytes - sizes.get(folder.path, 0)) for folder in others)
    over_bytes = sum(sizes.values()) + promised + growth - quota_bytes
    lacking_bytes = promised + growth - free_bytes if growth else 0
    # A complete folder evicts nothing, even while the store is over its quota.
    needed = max(over_bytes, lacking_bytes) if growth else 0
    victims, freed = [], 0
    idle = (folder for folder in others if not folder.in_use)
    for folder in sorted(idle, key=lambda each: (bool(each.models), each.last_used, each.path)):
        if freed >= needed:
            break
        if sizes.get(folder.path, 0):
            victims.append(folder)
            freed += sizes[folder.path]
    if freed >= needed:
        return victims
    space_bytes = max(0, growth - (needed - freed))
    over_quota = over_bytes >= lacking_bytes
    limit = f"the quota of {quota_bytes} bytes (--models-quota-bytes)" if over_quota else "what is free on the disk"
    raise DiskFull(
        f"the files need {growth} more bytes, and {limit} leaves room for {space_bytes}; unload or delete "
        "models that are not needed, or make more room",
        metadata={"required_bytes": str(growth), "free_bytes": str(space_bytes)},
    )
