"""`headrace doctor`: looks at everything a run needs, a line each, with what to do about what is bad."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.up import DEFAULT_DATA_DIR
from headrace_cli.exits import FAILED, reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_json
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client import HeadraceClient, Node

_CLOCK_SKEW_S = 5.0
_HEARTBEAT_OLD_S = 60.0
_FREE_BYTES = 5 * 1024**3  # One small model and its activations.
_CALL_DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line: `remedy` is empty when all is well."""

    subject: str
    ok: bool
    text: str
    remedy: str = ""


@reported
def doctor(
    context: typer.Context,
    *,
    data_dir: Annotated[Path, typer.Option(help="Where to look at the disk space.")] = DEFAULT_DATA_DIR,
) -> None:
    """Check servers, database, clock, disk space and versions."""
    settings = settings_of(context)
    with settings.connect(deadline_s=_CALL_DEADLINE_S) as client:
        findings = [*_server_findings(client, settings.registry), _disk(data_dir), _versions()]
    if settings.json:
        print_json(findings)
    else:
        for finding in findings:
            typer.echo(f"{'ok ' if finding.ok else 'BAD'}  {finding.subject:<11} {finding.text}")
            if finding.remedy:
                typer.echo(f"     {'':<11} what to do: {finding.remedy}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(FAILED)


def _server_findings(client: HeadraceClient, registry: str) -> Iterator[Finding]:
    reached = _tried("registry", lambda: f"{registry} says {_health(client, None)}, {_latency(client)}")
    yield reached
    if not reached.ok:
        return
    yield _tried("database", lambda: f"answers; {_models(client)}")
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
        remedy = "start it again, or ignore it if it is gone for good"
        yield Finding(
            subject="extractor", ok=True, text=f"{node.id} at {node.address} is {node.state.value}", remedy=remedy
        )
        return
    devices = ", ".join(f"{device.id} {formats.size(device.free_bytes)} free" for device in node.devices)

    def look() -> str:
        return f"{node.id} at {node.address} says {_health(client, node.address)}; version {node.version}; {devices}"

    yield _tried("extractor", look)
    yield _clock(node)


def _health(client: HeadraceClient, address: str | None) -> str:
    from headrace_client.errors import Unavailable, Unimplemented  # noqa: PLC0415

    try:
        answer = client.health(address)
    except Unimplemented:
        return "nothing of its health"
    if answer != "SERVING":
        raise Unavailable(f"{address or 'the registry'} is {answer}", remedy="it starts or stops just now: see its log")
    return answer


def _latency(client: HeadraceClient) -> str:
    began = time.monotonic()
    client.nodes()
    return f"{1000 * (time.monotonic() - began):.0f} ms a call"


def _models(client: HeadraceClient) -> str:
    """Counts models and the bytes of their files; models that share files count them once."""
    models = list(client.models.list())
    stored = {model.files_path: model.store_bytes for model in models if model.store_bytes}
    return f"{formats.things(len(models), 'model')}, {formats.size(sum(stored.values()))} in the model store"


def _clock(node: Node) -> Finding:
    """Compares this machine's clock with the database's, by which heartbeats are stamped and leases expire."""
    if node.heartbeat_time is None:
        return Finding(subject="clock", ok=True, text=f"{node.id} has not told a heartbeat yet")
    age_s = (datetime.now(UTC) - node.heartbeat_time).total_seconds()
    if age_s < -_CLOCK_SKEW_S:
        text = f"this machine is {-age_s:.0f} s behind the database"
    elif age_s > _HEARTBEAT_OLD_S:
        text = f"the last heartbeat of {node.id} is {age_s:.0f} s old though it is alive: clocks differ"
    else:
        return Finding(
            subject="clock", ok=True, text=f"agrees with the database; last heartbeat {max(age_s, 0):.0f} s ago"
        )
    return Finding(subject="clock", ok=False, text=text, remedy="synchronize the clocks (NTP)")


def _disk(data_dir: Path) -> Finding:
    folder = next(path for path in (data_dir, *data_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    text = f"{formats.size(free)} free at {data_dir}"
    if free >= _FREE_BYTES:
        return Finding(subject="disk", ok=True, text=text)
    return Finding(subject="disk", ok=False, text=text, remedy="free some space, or put --data-dir elsewhere")


def _versions() -> Finding:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    parts = [f"python {platform.python_version()}"]
    for package in ("headrace", "grpcio", "protobuf", "numpy", "torch"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} not installed")
    return Finding(subject="versions", ok=True, text=", ".join(parts))


def _tried(subject: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(subject=subject, ok=True, text=look())
    except Exception as exc:  # noqa: BLE001 - a finding, whatever it is.
        return _bad(subject, exc)


def _bad(subject: str, exc: Exception) -> Finding:
    remedy = getattr(exc, "remedy", "") or "see the server's log"
    return Finding(subject=subject, ok=False, text=str(exc), remedy=remedy)
