"""`headrace up`: registry and extractor on this machine, on loopback, until Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from headrace_cli.commands.serve import server_command
from headrace_cli.exits import reported
from headrace_cli.output.results import note, print_json
from headrace_cli.processes.only_one import only_one
from headrace_cli.processes.supervisor import Child, StartFailed, Supervisor
from headrace_cli.settings import settings_of

DEFAULT_DATA_DIR = Path("~/.headrace")


@reported
def up(
    context: typer.Context,
    *,
    data_dir: Annotated[
        Path, typer.Option(help="Where models, corpora, activations, database and logs live.")
    ] = DEFAULT_DATA_DIR,
    registry_listen: Annotated[str, typer.Option(help="Address of the registry.")] = "127.0.0.1:7470",
    extractor_listen: Annotated[str, typer.Option(help="Address of the extractor.")] = "127.0.0.1:7471",
    models_root: Annotated[
        list[Path] | None, typer.Option(help="Folder models may be registered from; repeat.")
    ] = None,
    models_quota_bytes: Annotated[
        int | None, typer.Option(help="Most bytes of downloaded models.  (default: 50 GB)")
    ] = None,
    allow_pickle: Annotated[
        list[str] | None, typer.Option(metavar="REPO", help="Hub repo whose pickled weights may be read; repeat.")
    ] = None,
    trust_remote_code: Annotated[
        list[str] | None, typer.Option(metavar="REPO", help="Hub repo whose code may run here; repeat.")
    ] = None,
    corpus_root: Annotated[
        list[Path] | None, typer.Option(help="Folder corpora may be registered from; repeat.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the extractor, such as cpu.  (default: what it finds)")] = "",
    cpu_bytes: Annotated[int | None, typer.Option(help="Main memory models may use.  (default: its choice)")] = None,
    sets_quota_bytes: Annotated[
        int | None, typer.Option(help="Most bytes of activation sets.  (default: 100 GB)")
    ] = None,
    grace_s: Annotated[float, typer.Option(help="Longest time each server may take to stop.")] = 10.0,
) -> None:
    """Start registry and extractor here; restart what crashes. Ctrl-C stops both."""
    settings = settings_of(context)
    folder = data_dir.expanduser().absolute()
    common = ["--grace-s", f"{grace_s:g}"]
    of_registry = [*common, *_repeated("--models-root", models_root)]
    of_registry += ["--models-quota-bytes", str(models_quota_bytes)] if models_quota_bytes is not None else []
    of_registry += [word for repo in allow_pickle or [] for word in ("--allow-pickle", repo)]
    of_registry += [word for repo in trust_remote_code or [] for word in ("--trust-remote-code", repo)]
    registry = _registry(folder, registry_listen, of_registry)
    options = [*common, *_repeated("--corpus-root", corpus_root)]
    options += ["--device", device] if device else []
    options += ["--cpu-bytes", str(cpu_bytes)] if cpu_bytes is not None else []
    options += ["--sets-quota-bytes", str(sets_quota_bytes)] if sets_quota_bytes is not None else []
    children = [registry, _extractor(folder, extractor_listen, options)]

    def tell(name: str, text: str) -> None:
        with contextlib.suppress(OSError):  # The services don't depend on a terminal that is still there.
            if settings.json:
                print_json({"service": name, "event": text})
            else:
                note(f"{name:<10} {text}")

    folder.mkdir(parents=True, exist_ok=True)
    busy, remedy = f"`headrace up` already runs on {folder}", "use that one, stop it, or choose another --data-dir"
    with only_one(folder / "up.lock", busy=busy, remedy=remedy):  # Two sets of services on one folder would fight.
        _supervise(Supervisor(children, grace_s=grace_s, on_event=tell), children)


def _supervise(supervisor: Supervisor, children: list[Child]) -> None:
    from headrace_client.errors import HeadraceError  # noqa: PLC0415

    stopping: list[int] = []
    with _signals(stopping):
        try:
            supervisor.start(lambda: bool(stopping))
            if not stopping:
                note(f"up; logs in {children[0].log_file.parent}. Ctrl-C stops it.")
            supervisor.run(lambda: bool(stopping))
        except StartFailed as exc:
            remedy = (
                "read the log; a port in use shows there too: choose another with --registry-listen, --extractor-listen"
            )
            raise HeadraceError(str(exc), reason="START_FAILED", remedy=remedy) from exc
        finally:
            supervisor.stop()


def _registry(folder: Path, listen: str, options: list[str]) -> Child:
    def command(addresses: Mapping[str, str]) -> list[str]:
        where = addresses.get("registry", listen)  # A port chosen at the first start stays.
        return server_command(
            "registry",
            ["--listen", where, "--data-dir", str(folder), "--ready-file", str(_ready(folder, "registry")), *options],
        )

    return _child(folder, "registry", command)


def _extractor(folder: Path, listen: str, options: list[str]) -> Child:
    def command(addresses: Mapping[str, str]) -> list[str]:
        where = addresses.get("extractor", listen)
        ready = str(_ready(folder, "extractor"))
        first = [
            "--listen",
            where,
            "--registry",
            addresses["registry"],
            "--data-dir",
            str(folder),
            "--ready-file",
            ready,
        ]
        return server_command("extractor", [*first, *options])

    return _child(folder, "extractor", command)


def _child(folder: Path, name: str, command: object) -> Child:
    return Child(
        name=name,
        command=command,  # type: ignore[arg-type]
        ready_file=_ready(folder, name),
        log_file=folder / "logs" / f"{name}.log",
    )


def _ready(folder: Path, name: str) -> Path:
    return folder / "run" / f"{name}.ready"


def _repeated(flag: str, paths: list[Path] | None) -> list[str]:
    return [word for path in paths or [] for word in (flag, str(path.expanduser().absolute()))]


@contextlib.contextmanager
def _signals(stopping: list[int]) -> Iterator[None]:
    """Notes SIGINT, SIGTERM and SIGHUP, of a closed terminal, instead of being ended by them; nohup is respected."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, lambda got, _frame: stopping.append(got))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
