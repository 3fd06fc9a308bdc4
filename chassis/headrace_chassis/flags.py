"""The command-line flags that both servers share."""

from __future__ import annotations

import argparse
from pathlib import Path

from headrace_chassis.auth import read_tls, read_token
from headrace_chassis.errors import TlsFileInvalid
from headrace_chassis.logs import LEVELS
from headrace_chassis.options import ServerOptions


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the common flags; `--listen` has a different default in each server and stays with it."""
    group = parser.add_argument_group("serving")
    group.add_argument("--token-file", type=Path, metavar="F", help="clients must send the token in this file")
    group.add_argument("--tls-cert", type=Path, metavar="F", help="PEM certificate chain")
    group.add_argument("--tls-key", type=Path, metavar="F", help="PEM private key of --tls-cert")
    group.add_argument("--insecure", action="store_true", help="listen beyond loopback without TLS or token")
    group.add_argument(
        "--max-rpcs", type=_limit, default=1000, metavar="N", help="calls in progress at once (default 1000)"
    )
    group.add_argument("--max-streams", type=_limit, default=256, metavar="N", help="streams among them (default 256)")
    group.add_argument("--metrics-listen", metavar="HOST:PORT", help="serve Prometheus metrics there over HTTP")
    group.add_argument(
        "--grace-s", type=_grace, default=10.0, metavar="S", help="longest time from SIGTERM to exit (default 10)"
    )
    group.add_argument("--ready-file", type=Path, metavar="F", help="write the bound address there once serving")
    group.add_argument("--log-level", choices=LEVELS, default="info", help="default info")


def options_from(args: argparse.Namespace) -> ServerOptions:
    """Makes the options from parsed flags, `args.listen` included; reads token and TLS files. Raises StartError."""
    if (args.tls_cert is None) != (args.tls_key is None):
        raise TlsFileInvalid("TLS takes both --tls-cert and --tls-key; only one is given.")
    return ServerOptions(
        listen=args.listen,
        grace_s=args.grace_s,
        token=read_token(args.token_file) if args.token_file else None,
        tls=read_tls(args.tls_cert, args.tls_key) if args.tls_cert else None,
        insecure=args.insecure,
        max_concurrent_rpcs=args.max_rpcs,
        max_streams=args.max_streams,
        metrics_listen=args.metrics_listen,
        ready_file=args.ready_file,
    )


def _limit(text: str) -> int:
    number = int(text)
    if not 2 <= number <= 100_000:
        raise argparse.ArgumentTypeError("takes 2 to 100000")
    return number


def _grace(text: str) -> float:
    seconds = float(text)
    if not 0.5 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("takes 0.5 to 3600 seconds")
    return seconds
