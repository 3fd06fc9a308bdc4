"""`headrace doctor`: checks everything that a run needs, one line each, with a remedy for each problem."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.up import DEFAULT_DATA_DIR
from headrace_cli.exits import FAILED, reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_json, print_wrapped
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client import HeadraceClient, Node

_CLOCK_SKEW_S = 5.0
_HEARTBEAT_OLD_S = 60.0
_RETIRED_S = 86400.0  # A node that was lost longer ago is taken for retired, not for broken.
_FREE_BYTES = 5 * 1024**3  # One small model and its activations.
_CALL_DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the output; `remedy` is empty when all is well."""

    subject: str
    ok: bool
    text: str
    remedy: str = ""


@reported
def doctor(
    context: typer.Context,
    *,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder whose disk is checked.  (default: the folders of this machine that hold models and sets)",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check servers, database, clock, disk space and versions. Exit code 1 if something is broken."""
    settings = settings_of(context)
    with settings.connect(deadline_s=_CALL_DEADLINE_S) as client:
        findings = [*_server_findings(client, settings.registry)]
        reached = all(finding.ok for finding in findings[:2])
        folders = [data_dir] if data_dir else _data_folders(client if reached else None)
    findings += [*_disk_findings(folders), _versions()]
    if settings.json:
        print_json(findings)
    else:
        for finding in findings:
            print_wrapped(f"{'ok ' if finding.ok else 'BAD'}  {finding.subject:<11} ", finding.text)
            if finding.remedy:
                print_wrapped(f"     {'':<11} ", f"what to do: {finding.remedy}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(FAILED)


def _server_findings(client: HeadraceClient, registry: str) -> Iterator[Finding]:
    from headrace_client.rpc.addresses import addresses_of  # noqa: PLC0415

    replicas = addresses_of(registry, name="registry")
    named = f"one of {registry}" if len(replicas) > 1 else registry

    def check_registry() -> str:
        health = _health(client, None)
        began = time.monotonic()
        client.nodes()
        return f"{named} says {health}, {1000 * (time.monotonic() - began):.0f} ms a call"

    def check_database() -> str:
        models = client.models.list()
        # By path: models that share files are counted once.
        stored = {model.files_path: model.store_bytes for model in models if model.store_bytes}
        n_models, n_bytes = formats.things(len(models), "model"), formats.size(sum(stored.values()))
        return f"answers; {n_models}, {n_bytes} in the model store"

    def check_replica(address: str) -> str:
        return f"{address} says {_health(client, address)}"

    reached = _tried("registry", check_registry)
    yield reached
    if not reached.ok:
        return
    yield _tried("database", check_database)
    if len(replicas) > 1:  # Calls pass over a replica that is away.
        for address in replicas:
            yield _tried("replica", partial(check_replica, address))
    try:
        nodes = client.nodes()
    except Exception as exc:  # noqa: BLE001 - a finding, like every other failure here.
        yield _bad("extractors", exc)
        return
    if not any(node.state == "ALIVE" for node in nodes):
        remedy = "start one: `headrace serve extractor`, or `headrace up`"
        yield Finding(subject="extractors", ok=False, text=f"none is alive; {len(nodes)} known", remedy=remedy)
    for node in nodes:
        yield from _node_findings(client, node)


def _node_findings(client: HeadraceClient, node: Node) -> Iterator[Finding]:
    if node.state != "ALIVE":
        seen_s = (datetime.now(UTC) - node.heartbeat_time).total_seconds() if node.heartbeat_time else 0.0
        text = f"{node.id} at {node.address} is {node.state.value}, last heard of {formats.duration(seen_s)} ago"
        retired = seen_s > _RETIRED_S
        remedy = "" if retired else "start it again: `headrace serve extractor`, or `headrace up`; see its log"
        yield Finding(subject="extractor", ok=retired, text=text, remedy=remedy)
        return

    def check_extractor() -> str:
        devices = ", ".join(f"{device.id} {formats.size(device.free_bytes)} free" for device in node.devices)
        return f"{node.id} at {node.address} says {_health(client, node.address)}; version {node.version}; {devices}"

    yield _tried("extractor", check_extractor)
    if node.heartbeat_time is None:
        yield Finding(subject="clock", ok=True, text=f"{node.id} has not sent a heartbeat yet")
        return
    # The database's clock stamps heartbeats and ends leases.
    age_s = (datetime.now(UTC) - node.heartbeat_time).total_seconds()
    if age_s < -_CLOCK_SKEW_S:
        text = f"this machine is {-age_s:.0f} s behind the database"
    elif age_s > _HEARTBEAT_OLD_S:
        text = f"the last heartbeat of {node.id} is {age_s:.0f} s old though the node is alive: the clocks differ"
    else:
        text = f"agrees with the database; last heartbeat {max(age_s, 0):.0f} s ago"
        yield Finding(subject="clock", ok=True, text=text)
        return
    yield Finding(subject="clock", ok=False, text=text, remedy="synchronize the clocks (NTP)")


def _health(client: HeadraceClient, address: str | None) -> str:
    """Asks a server for its health; None is the registry. Raises Unavailable if it does not serve."""
    from headrace_client.errors import Unavailable, Unimplemented  # noqa: PLC0415

    try:
        answer = client.health(address)
    except Unimplemented:
        return "nothing about its health"
    if answer != "SERVING":
        remedy = "it is starting or stopping: see its log"
        raise Unavailable(f"{address or 'the registry'} is {answer}", remedy=remedy)
    return answer


def _data_folders(client: HeadraceClient | None) -> list[Path]:
    """Returns the folders of this machine that hold models and sets, one a disk; else where they would be."""
    from headrace_client.errors import HeadraceError  # noqa: PLC0415

    named = [DEFAULT_DATA_DIR.expanduser()]
    if client is not None:
        with suppress(HeadraceError):  # A server that fails only now: its own findings stand.
            # A path of another machine, or of a folder that a user registered, tells nothing about this disk.
            named += [Path(model.files_path) for model in client.models.list() if model.store_bytes]
            named += [Path(held.path).parent for held in client.sets.list() if held.path]
    by_disk: dict[int, Path] = {}
    for folder in reversed(named):
        with suppress(OSError):  # Not there, or in a folder of the user that the servers run as.
            if folder.is_dir():
                by_disk[folder.stat().st_dev] = folder
    return list(by_disk.values()) or [DEFAULT_DATA_DIR]


def _disk_findings(folders: Iterable[Path]) -> Iterator[Finding]:
    for folder in folders:
        wanted = folder.expanduser().absolute()
        try:
            found = next(path for path in (wanted, *wanted.parents) if path.exists())
        except OSError as exc:
            remedy = "run `headrace doctor` as the user that the servers run as, or choose another --data-dir"
            yield Finding(subject="disk", ok=False, text=f"{wanted} can't be looked at: {exc.strerror}", remedy=remedy)
            continue
        free_bytes = shutil.disk_usage(found).free
        text, remedy = f"{formats.size(free_bytes)} free at {wanted}", ""
        if not os.access(found, os.W_OK):
            text, remedy = f"{found} can't be written by this user", "see who owns it, or choose another --data-dir"
        elif free_bytes < _FREE_BYTES:
            remedy = "free some space, or put --data-dir elsewhere"
        yield Finding(subject="disk", ok=not remedy, text=text, remedy=remedy)


def _versions() -> Finding:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    parts = [f"python {platform.python_version()}"]
    for package in ("headrace", "grpcio", "protobuf", "numpy", "torch"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} not installed")
    return Finding(subject="versions", ok=True, text=", ".join(parts))


def _tried(subject: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(subject=subject, ok=True, text=check())
    except Exception as exc:  # noqa: BLE001 - a finding, whatever it is.
        return _bad(subject, exc)


def _bad(subject: str, exc: Exception) -> Finding:
    remedy = getattr(exc, "remedy", "") or "see the server's log"
    return Finding(subject=subject, ok=False, text=str(exc), remedy=remedy)
