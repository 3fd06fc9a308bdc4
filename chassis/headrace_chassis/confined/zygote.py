"""`python -m headrace_chassis.confined.zygote FD MODULE...`: imports the modules, then forks a child for each job.

A job is one byte on the socket FD with two sockets and up to MAX_FILES files: the first socket is the child's channel
to the server, on the second the zygote tells the child's end. If the server closes its side of the second, the child is
killed; if it closes FD, or dies, all are. This process has one thread and reads nothing from outside.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
from collections.abc import Sequence

from headrace_chassis.confined import child
from headrace_chassis.confined.wire import MAX_FILES, NOT_STARTED, STATUS

# Children give way to the server's event loop, which needs little time but needs it soon.
_NICENESS = 5


def main(arguments: Sequence[str]) -> None:
    """Serves until the server is gone."""
    control = socket.socket(fileno=int(arguments[0]))
    for module in arguments[1:]:
        with contextlib.suppress(ImportError):  # The child that needs it says so.
            importlib.import_module(module)
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    gc.collect()
    gc.freeze()  # Children share the pages of everything imported here, as long as no collection writes to them.
    _Zygote(control).serve()


class _Zygote:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, socket.socket] = {}  # By process id: where to tell the child's end.
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._woken, waker = socket.socketpair()
        self._woken.setblocking(False)
        waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._waker = waker
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        """Forks and reaps until the control socket ends."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    if not self.fork_job():
                        return self.end_all()
                elif key.fileobj is self._woken:
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(4096)
                    self.reap()
                elif key.data in self._children:  # The server has given up on this child.
                    os.kill(key.data, signal.SIGKILL)
                    self._selector.unregister(key.fileobj)

    def fork_job(self) -> bool:
        """Forks a child for the next job; False at the end of the control socket."""
        message, files, _, _ = socket.recv_fds(self._control, 1, 2 + MAX_FILES)
        if not message:
            return False
        channel, status = files[0], socket.socket(fileno=files[1])
        zygote = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            pid = NOT_STARTED
        if pid == 0:
            child.live(channel, files[2:], zygote=zygote)
        for file in (channel, *files[2:]):
            os.close(file)
        if pid == NOT_STARTED:
            _tell(status, NOT_STARTED)
        else:
            self._children[pid] = status
            self._selector.register(status, selectors.EVENT_READ, data=pid)
        return True

    def reap(self) -> None:
        """Tells the server of the children that have ended."""
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            told = self._children.pop(pid)
            with contextlib.suppress(KeyError):
                self._selector.unregister(told)
            _tell(told, status)

    def end_all(self) -> None:
        """Kills all children."""
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)


def _tell(server: socket.socket, status: int) -> None:
    with contextlib.suppress(OSError):
        server.send(STATUS.pack(status))
    server.close()


if __name__ == "__main__":
    main(sys.argv[1:])
