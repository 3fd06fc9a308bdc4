"""Entry point of `headrace`: the only place that reads the environment."""

from __future__ import annotations

import os

from headrace_cli.app import app
from headrace_cli.exits import end_when_interrupted
from headrace_cli.settings import Defaults


def main() -> None:
    """Runs the command line; HEADRACE_REGISTRY and HEADRACE_TOKEN stand in for options that are not given."""
    # gRPC's core would print lines of its own between ours, and between the JSON lines of the servers started here.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    end_when_interrupted()
    app(
        obj=Defaults(
            registry=os.environ.get("HEADRACE_REGISTRY") or None, token=os.environ.get("HEADRACE_TOKEN") or None
        ),
        prog_name="headrace",
    )


if __name__ == "__main__":
    main()
