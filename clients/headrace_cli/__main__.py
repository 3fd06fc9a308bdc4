"""Entry point of `headrace`: the only place that reads the environment."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line; HEADRACE_REGISTRY and HEADRACE_TOKEN stand in for options that are not given."""
    # gRPC's core would print lines of its own between ours, and between the JSON lines of the servers started here.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        # Inside the function: an install without the extra `cli` has neither package, but has this command.
        import rich  # noqa: F401, PLC0415
        import typer  # noqa: F401, PLC0415
    except ModuleNotFoundError as exc:
        sys.stderr.write(f"headrace: {exc.name} is not installed; run: pip install 'headrace[cli]'\n")
        sys.exit(2)

    from headrace_cli.app import app  # noqa: PLC0415
    from headrace_cli.exits import end_when_interrupted  # noqa: PLC0415
    from headrace_cli.settings import Defaults  # noqa: PLC0415

    end_when_interrupted()
    app(
        obj=Defaults(
            registry=os.environ.get("HEADRACE_REGISTRY") or None, token=os.environ.get("HEADRACE_TOKEN") or None
        ),
        prog_name="headrace",
    )


if __name__ == "__main__":
    main()
