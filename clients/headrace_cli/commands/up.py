"""`headrace up`: registry and extractor on this machine, on loopback, until Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace_cli.exits import reported
from headrace_cli.output.results import note, print_json
from headrace_cli.processes.only_one import only_one
from headrace_cli.processes.servers import server_child
from headrace_cli.processes.supervisor import StartFailed, Supervisor
from headrace_cli.settings import settings_of

DEFAULT_DATA_DIR = Path("~/.headrace")


_ModelRoots = Annotated[
    list[Path] | None, typer.Option(metavar="DIR", help="Folder from which models may be registered; may be repeated.")
]
_CorpusRoots = Annotated[
    list[Path] | None, typer.Option(metavar="DIR", help="Folder from which corpora may be registered; may be repeated.")
]
_PickleRepos = Annotated[
    list[str] | None,
    typer.Option(metavar="REPO", help="Hub repository whose pickled weights may be read; may be repeated."),
]
_CodeRepos = Annotated[
    list[str] | None,
    typer.Option(metavar="REPO", help="Hub repository whose code may run on this machine; may be repeated."),
]
_ModelsQuota = Annotated[
    int | None, typer.Option(metavar="BYTES", help="Upper limit of downloaded models.  (default: 50 GB)")
]
_SetsQuota = Annotated[
    int | None, typer.Option(metavar="BYTES", help="Upper limit of activation sets.  (default: 100 GB)")
]
_CpuBytes = Annotated[
    int | None, typer.Option(metavar="BYTES", help="Main memory for models.  (default: chosen by the extractor)")
]
_SpareRunners = Annotated[
    int | None,
    typer.Option(metavar="N", help="Processes that import torch ahead of the next load.  (default: 1; 0: none)"),
]


@reported
def up(
    context: typer.Context,
    *,
    data_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for models, corpora, activations, database and logs.")
    ] = DEFAULT_DATA_DIR,
    registry_listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address of the registry.")
    ] = "127.0.0.1:7470",
    extractor_listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address of the extractor.")
    ] = "127.0.0.1:7471",
    models_root: _ModelRoots = None,
    models_quota_bytes: _ModelsQuota = None,
    allow_pickle: _PickleRepos = None,
    trust_remote_code: _CodeRepos = None,
    corpus_root: _CorpusRoots = None,
    device: Annotated[
        str, typer.Option(help="Device of the extractor, such as cpu or cuda:0.  (default: every device it finds)")
    ] = "",
    cpu_bytes: _CpuBytes = None,
    spare_runners: _SpareRunners = None,
    sets_quota_bytes: _SetsQuota = None,
    grace_s: Annotated[
        float, typer.Option(metavar="SECONDS", help="Longest time that each server may take to stop.")
    ] = 10.0,
) -> None:
    """Start registry and extractor on this machine. A server that crashes is restarted; Ctrl-C stops both."""
    settings = settings_of(context)
    folder = data_dir.expanduser().absolute()

    def tell(name: str, text: str) -> None:
        with contextlib.suppress(OSError):  # A closed terminal or pipe must not end the servers.
            if settings.json:
                print_json({"service": name, "event": text})
            else:
                note(f"{name:<10} {text}")

    of_registry = _words(
        grace_s=grace_s,
        models_root=models_root,
        models_quota_bytes=models_quota_bytes,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    of_extractor = _words(
        grace_s=grace_s,
        corpus_root=corpus_root,
        device=device,
        cpu_bytes=cpu_bytes,
        spare_runners=spare_runners,
        sets_quota_bytes=sets_quota_bytes,
    )
    children = [
        server_child("registry", folder, registry_listen, of_registry),
        server_child("extractor", folder, extractor_listen, of_extractor),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    supervisor = Supervisor(children, grace_s=grace_s, on_event=tell)
    busy, remedy = f"`headrace up` already runs on {folder}", "use that one, stop it, or choose another --data-dir"
    # Two pairs of servers would write into the same database and sets.
    with only_one(folder / "up.lock", busy=busy, remedy=remedy):
        _supervise(supervisor, folder / "logs")


def _words(**options: Any) -> list[str]:
    """Returns a server's options as words: a list repeats its option, None and empty texts leave it out."""
    words: list[str] = []
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one not in (None, ""):
                text = one.expanduser().absolute() if isinstance(one, Path) else one
                words += [f"--{name.replace('_', '-')}", str(text)]
    return words


def _supervise(supervisor: Supervisor, logs: Path) -> None:
    from headrace_client.errors import HeadraceError  # noqa: PLC0415

    stopping: list[int] = []
    with _signals(stopping):
        try:
            supervisor.start(lambda: bool(stopping))
            if not stopping:
                note(f"up; logs in {logs}. Ctrl-C stops it.")
            supervisor.run(lambda: bool(stopping))
        except StartFailed as exc:
            remedy = "read the log; if a port is in use, choose another with --registry-listen or --extractor-listen"
            raise HeadraceError(str(exc), reason="START_FAILED", remedy=remedy) from exc
        finally:
            supervisor.stop()


@contextlib.contextmanager
def _signals(stopping: list[int]) -> Iterator[None]:
    """Appends SIGINT, SIGTERM and SIGHUP (a closed terminal) to `stopping`; they don't end the process meanwhile.

    SIGHUP stays ignored under nohup.
    """
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
