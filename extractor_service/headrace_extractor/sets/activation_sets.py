"""The activation sets of this node: where their folders are.

A RETAIN set lies in `<activations>/<set id>`. A WINDOW set belongs to one extraction and lies in
`<activations>/.windows/<extraction id>`: two extractions may ask for windows of the same set.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import WeakValueDictionary

from headrace_extractor.sets.activation_set import ActivationSet, Kind

TRASH_NAME = ".trash"
WINDOWS_NAME = ".windows"
# Folders of any other name are not the extractor's to remove.
_SET_NAME = re.compile(r"[0-9a-f]{32}")
# A digest takes a core, and streams and heartbeats need one too.
_MAX_DIGEST_THREADS = 4


class ActivationSets:
    """Finds the sets below one folder. A set's object lives as long as an extraction refers to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._in_use: WeakValueDictionary[Path, ActivationSet] = WeakValueDictionary()
        self.n_threads = max(1, min(_MAX_DIGEST_THREADS, (os.cpu_count() or 1) // 2))
        # Threads of their own: the default threads, which heartbeats need too, must not be busy for seconds.
        self._threads = ThreadPoolExecutor(self.n_threads, thread_name_prefix="digests")
        self._closing = threading.Event()

    @property
    def trash(self) -> Path:
        """Where removed sets lie until their files are gone."""
        return self.folder / TRASH_NAME

    def create_folders(self) -> None:
        """Makes the folders that sets are put in; a disk that has filled up has no space for them any more."""
        for each in (self.folder, self.trash, self.folder / WINDOWS_NAME):
            each.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """Ends the comparing of digests."""
        self._closing.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def has(self, set_id: str) -> bool:
        """True if a RETAIN set with this id is on disk; any text may be asked for."""
        return bool(_SET_NAME.fullmatch(set_id)) and self.retained(set_id).exists

    def retained(self, set_id: str) -> ActivationSet:
        """The RETAIN set with this id, whether it is on disk or not."""
        return self._at(self.folder / set_id, set_id, Kind.RETAIN)

    def window(self, set_id: str, extraction_id: str) -> ActivationSet:
        """The WINDOW set of an extraction."""
        return self._at(self.folder / WINDOWS_NAME / extraction_id, set_id, Kind.WINDOW)

    def held_folders(self) -> set[Path]:
        """Folders of the sets that extractions and readers of this server need."""
        return {each.folder for each in list(self._in_use.values()) if each.held}

    def retained_folders(self) -> Collection[Path]:
        """Folders of the RETAIN sets on disk."""
        return [path for path in self.folder.iterdir() if _SET_NAME.fullmatch(path.name) and path.is_dir()]

    def window_folders(self) -> Collection[Path]:
        """Folders of the WINDOW sets on disk."""
        windows = self.folder / WINDOWS_NAME
        return [path for path in windows.iterdir() if path.is_dir()] if windows.exists() else []

    def _at(self, folder: Path, set_id: str, kind: Kind) -> ActivationSet:
        found = self._in_use.get(folder)
        if found is None:
            found = self._in_use[folder] = ActivationSet(
                set_id, folder, kind, threads=self._threads, closing=self._closing
            )
        return found
