"""The two servers as processes: their command lines, and the children that `headrace up` keeps running."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from headrace_cli.processes.supervisor import Child

_MODULES = {"registry": "headrace_registry", "extractor": "headrace_extractor"}


def server_command(name: str, arguments: Sequence[str]) -> list[str]:
    """Returns the command line of a server: `registry` or `extractor`."""
    return [sys.executable, "-m", _MODULES[name], *arguments]


def server_child(name: str, folder: Path, listen: str, options: Sequence[str]) -> Child:
    """Makes the child that runs a server on the data directory `folder`. An extractor gets the registry's address."""
    ready_file = folder / "run" / f"{name}.ready"

    def command(addresses: Mapping[str, str]) -> list[str]:
        # After a crash the same port again: clients know it, also where the system chose it at the first start.
        arguments = ["--listen", addresses.get(name, listen), "--data-dir", str(folder)]
        arguments += ["--ready-file", str(ready_file)]
        if name == "extractor":
            arguments += ["--registry", addresses["registry"]]
        return server_command(name, [*arguments, *options])

    return Child(name=name, command=command, ready_file=ready_file, log_file=folder / "logs" / f"{name}.log")
