"""Entry point of `headrace`: the only place that reads the environment."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line; HEADRACE_REGISTRY, HEADRACE_TOKEN and HEADRACE_CA_FILE stand in for options."""
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
    from headrace_cli.exits import end_when_interrupted, ends_with_its_reader  # noqa: PLC0415
    from headrace_cli.settings import Defaults  # noqa: PLC0415

    defaults = Defaults(
        registry=os.environ.get("HEADRACE_REGISTRY") or None,
        token=os.environ.get("HEADRACE_TOKEN") or None,
        ca_file=os.environ.get("HEADRACE_CA_FILE") or None,
    )
    end_when_interrupted()
    with ends_with_its_reader():
        app(obj=defaults, prog_name="headrace")


if __name__ == "__main__":
    main()
