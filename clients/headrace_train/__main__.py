"""Entry point of `headrace-train`: the only place that reads the environment."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from headrace_client.errors import InvalidArgument
from headrace_train import exits
from headrace_train.arguments import DEFAULT_REGISTRY, Arguments, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one training; returns the exit code.

    HEADRACE_REGISTRY, HEADRACE_TOKEN and HEADRACE_CA_FILE stand in for options.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's core would print into the progress.
    arguments = parse(argv, registry=os.environ.get("HEADRACE_REGISTRY") or DEFAULT_REGISTRY)
    try:
        return _run(arguments, os.environ.get("HEADRACE_TOKEN") or None)
    except KeyboardInterrupt:
        exits.say(sys.stderr, "interrupted")
        return exits.INTERRUPTED
    except BrokenPipeError:
        exits.end_by_sigpipe()
    except ModuleNotFoundError as exc:
        if arguments.debug or (exc.name or "").startswith("headrace"):  # A bug of ours, or the stack is wanted.
            return exits.report(exc, sys.stderr, as_json=arguments.json, debug=arguments.debug)
        remedy = "pip install 'headrace[train]'"
        if arguments.json:
            error = InvalidArgument(f"{exc.name or exc} is not installed", remedy=remedy)
            return exits.report(error, sys.stderr, as_json=True, debug=False)
        exits.say(sys.stderr, f"headrace-train: {exc.name or exc} is not installed; run: {remedy}")
        return exits.USAGE
    except Exception as exc:  # noqa: BLE001 - every error ends as a message and an exit code.
        return exits.report(exc, sys.stderr, as_json=arguments.json, debug=arguments.debug)


def _run(arguments: Arguments, token: str | None) -> int:
    from headrace_client import HeadraceClient  # noqa: PLC0415 - not for --help.
    from headrace_train.reporting.reporters import new_reporter  # noqa: PLC0415
    from headrace_train.results.folder import check_free  # noqa: PLC0415

    check_free(arguments.out, overwrite=arguments.overwrite)  # Before anything that takes time; checked again later.
    if arguments.token_file is not None:
        try:
            token = arguments.token_file.read_text().strip() or token
        except (OSError, UnicodeDecodeError) as exc:
            raise InvalidArgument(f"the token file can't be read: {exc}", remedy="check --token-file") from exc
    with (
        HeadraceClient.connect(
            arguments.registry, token=token, ca_file=arguments.ca_file or os.environ.get("HEADRACE_CA_FILE")
        ) as client,
        new_reporter(sys.stdout, as_json=arguments.json) as reporter,
    ):
        client.nodes()  # A registry that does not answer is an error before SAELens is loaded, which takes seconds.
        reporter.note("loading SAELens")
        # SAELens' own bar would be drawn over ours; tqdm reads the variable when it is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        from headrace_train.job import run  # noqa: PLC0415 - SAELens and torch.

        return exits.DONE if run(client, arguments, reporter) else exits.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
