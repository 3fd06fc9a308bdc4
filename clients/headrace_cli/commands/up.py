"""`headrace up`: registry and extractor on this machine, on loopback, until Ctrl-C or `headrace down`."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace_cli.exits import reported
from headrace_cli.output.results import note, print_done, print_json
from headrace_cli.processes.detached import NotStarted, holder_of, start_detached, stop_detached, write_note
from headrace_cli.processes.only_one import only_one
from headrace_cli.processes.servers import server_child
from headrace_cli.processes.supervisor import StartFailed, Supervisor
from headrace_cli.settings import Settings, settings_of

DEFAULT_DATA_DIR = Path("~/.headrace")
_LOCK = "up.lock"
_NOTE = "run/up.json"  # Written once both servers are ready.


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
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once both are ready, and leave them running: `headrace down`.")
    ] = False,
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
        models_root=models_root,
        models_quota_bytes=models_quota_bytes,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    of_extractor = _words(
        corpus_root=corpus_root,
        device=device,
        cpu_bytes=cpu_bytes,
        spare_runners=spare_runners,
        sets_quota_bytes=sets_quota_bytes,
    )
    of_both = _words(grace_s=grace_s)
    if detach:
        listen = _words(data_dir=folder, registry_listen=registry_listen, extractor_listen=extractor_listen)
        _detach(settings, folder, [*listen, *of_both, *of_registry, *of_extractor])
        return
    children = [
        server_child("registry", folder, registry_listen, [*of_both, *of_registry]),
        server_child("extractor", folder, extractor_listen, [*of_both, *of_extractor]),
    ]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    supervisor = Supervisor(children, grace_s=grace_s, on_event=tell)
    busy, remedy = f"`headrace up` already runs on {folder}", "use that one, stop it, or choose another --data-dir"
    # Two pairs of servers would write into the same database and sets.
    with only_one(folder / _LOCK, busy=busy, remedy=remedy):
        _supervise(supervisor, folder)


@reported
def down(
    context: typer.Context,
    *,
    data_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder that `headrace up` was given.")
    ] = DEFAULT_DATA_DIR,
    wait_s: Annotated[float, typer.Option(metavar="SECONDS", help="Longest time to wait for the end.")] = 60.0,
) -> None:
    """Stop the registry and the extractor that `headrace up` runs on this machine."""
    from headrace_client.errors import DeadlineExceeded, StateConflict  # noqa: PLC0415

    settings = settings_of(context)
    folder = data_dir.expanduser().absolute()
    holder = holder_of(folder / _LOCK)
    if holder is None:
        print_done(settings, {"stopped": False}, f"nothing runs on {folder}")
        return
    pid = holder.pid
    if not holder.is_here():  # On a file server; the process of that number here is another one.
        raise StateConflict(
            f"{folder} is held by process {pid} on {holder.host}, which is no `headrace up` of this machine",
            remedy=f"run `headrace down` on {holder.host}",
        )
    tell = (lambda: None) if settings.json else (lambda: note(f"stopping process {pid}"))
    if not stop_detached(folder / _LOCK, holder, wait_s=wait_s, tell=tell):
        remedy = f"see {folder / 'logs'}, or end it by force: kill -9 {pid}"
        raise DeadlineExceeded(f"process {pid} still runs after {wait_s:g} s", remedy=remedy)
    print_done(settings, {"stopped": True, "pid": pid}, "stopped")


def _detach(settings: Settings, folder: Path, words: list[str]) -> None:
    from headrace_client.errors import HeadraceError  # noqa: PLC0415

    logs = folder / "logs"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # The log's folder would make it with other rights.
    try:
        up_now = start_detached(words, up_file=folder / _NOTE, log=logs / "up.log")
    except NotStarted as exc:
        told = {"message": str(exc), "reason": "START_FAILED", "remedy": f"see {logs}"}
        told |= {key: text for key, text in exc.error.items() if text}
        raise HeadraceError(told["message"], reason=told["reason"], remedy=told["remedy"]) from exc
    where = "" if folder == DEFAULT_DATA_DIR.expanduser() else f" --data-dir {folder}"
    text = f"up: registry at {up_now['registry']}, logs in {logs}; `headrace down{where}` stops it"
    print_done(settings, up_now | {"logs": str(logs)}, text)


def _words(**options: Any) -> list[str]:
    """Returns a server's options as words: a list repeats its option, None and empty texts leave it out."""
    words: list[str] = []
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one not in (None, ""):
                text = one.expanduser().absolute() if isinstance(one, Path) else one
                words += [f"--{name.replace('_', '-')}", str(text)]
    return words


def _supervise(supervisor: Supervisor, folder: Path) -> None:
    from headrace_client.errors import HeadraceError  # noqa: PLC0415

    stopping: list[int] = []
    with _signals(stopping):
        try:
            supervisor.start(lambda: bool(stopping))
            if not stopping:
                write_note(folder / _NOTE, supervisor.addresses | {"pid": str(os.getpid())})
                with contextlib.suppress(OSError):
                    note(f"up; logs in {folder / 'logs'}. Ctrl-C stops it.")
            supervisor.run(lambda: bool(stopping))
        except StartFailed as exc:
            remedy = (
                "choose another address on loopback with --registry-listen or --extractor-listen; to serve other "
                f"machines, run `headrace serve registry` and `headrace serve extractor`; logs in {folder / 'logs'}"
            )
            raise HeadraceError(str(exc), reason="START_FAILED", remedy=remedy) from exc
        finally:
            (folder / _NOTE).unlink(missing_ok=True)
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
