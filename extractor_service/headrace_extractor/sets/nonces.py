"""Nonces by which a client proves that the folder it sees is the folder that the server means."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from headrace_log.errors import DiskFull
from headrace_log.files import write_atomically

FILE_NAME = "nonce"

logger = logging.getLogger(__name__)


class Nonces:
    """One nonce for each set and start of the server, in a file that everybody may read."""

    def __init__(self) -> None:
        self._written: dict[Path, str] = {}

    def of(self, folder: Path) -> str:
        """The folder's nonce, written if it is not there; empty if it can't be."""
        try:
            return self._known(folder) or self._write(folder)
        except (OSError, DiskFull) as exc:
            logger.warning("no nonce for %s, rows go inline: %s", folder, exc)
            return ""

    def _known(self, folder: Path) -> str:
        nonce = self._written.get(folder, "")
        try:
            there = (folder / FILE_NAME).read_text("ascii")
        except FileNotFoundError:
            there = ""
        return nonce if nonce == there else ""

    def _write(self, folder: Path) -> str:
        nonce = secrets.token_hex(16)
        write_atomically(folder / FILE_NAME, nonce.encode())
        self._written = {known: value for known, value in self._written.items() if known.exists()}
        self._written[folder] = nonce
        return nonce
