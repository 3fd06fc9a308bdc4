"""The server's side of one child."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from headrace_chassis.confined.limits import Limits
from headrace_chassis.confined.ports import Refuse
from headrace_chassis.confined.wire import (
    ANSWER,
    ERROR,
    FAULT,
    ITEM,
    JOB,
    NOT_STARTED,
    OVER_MEMORY,
    OVER_OUTPUT,
    REPLY,
    STATUS,
    receive,
    send,
)
from headrace_chassis.errors import ParsersBusy, ServiceError, ShuttingDown

log = logging.getLogger(__name__)

_MIB = 1024 * 1024
# From the end of a child's channel until its status comes; a child that swaps takes a moment to die.
_END_S = 5.0


class ChildTalk:
    """A conversation with one child."""

    def __init__(
        self,
        channel: socket.socket,
        status: socket.socket,
        *,
        refuse: Refuse,
        limits: Limits,
        errors: Mapping[str, type[ServiceError]],
    ) -> None:
        self._errors = errors
        self._channel = channel
        self._status = status
        self._refuse = refuse
        self._limits = limits
        self._ended = self._begun = self._is_cut = False
        self.answer: Any = None

    def begin(self, function: str, arguments: Mapping[str, Any]) -> None:
        """Sends the job."""
        job = {"function": function, "arguments": arguments, "limits": asdict(self._limits)}
        self._send(JOB, job)

    def __iter__(self) -> Iterator[Any]:
        """Yields the items, with None as the reply to each."""
        while not self._ended:
            item = self._next()
            if self._ended:
                return
            self._begun = True
            yield item
            self._send(REPLY, None)

    def ask(self, question: Any) -> Any:
        """Sends a reply and returns the next item. The first item of the generator is skipped."""
        if not self._begun:
            self._next()
            self._begun = True
        self._send(REPLY, question)
        item = self._next()
        assert not self._ended, "the generator has ended"
        return item

    def cut(self) -> None:
        """Ends the conversation from another thread, which then raises ShuttingDown."""
        self._is_cut = True
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the child and waits until it is gone, unless it has answered and goes by itself."""
        self._channel.close()
        if not self._ended:
            with contextlib.suppress(OSError):
                self._status.shutdown(socket.SHUT_WR)  # The zygote kills the child.
                self._exit_status()
        self._status.close()

    def _send(self, kind: bytes, value: Any) -> None:
        self._channel.settimeout(self._limits.wall_s)
        try:
            send(self._channel, kind, json.dumps(value).encode())
        except TimeoutError as exc:
            raise self._too_slow() from exc
        except OSError as exc:
            raise self._end_of_child() from exc

    def _next(self) -> Any:
        """Returns the next item; None with `answer` set at the end. Raises the child's error, or a refusal."""
        # A deadline for the message as a whole is not needed: the child sends one from memory, in one go.
        self._channel.settimeout(self._limits.wall_s)
        try:
            kind, content = receive(self._channel, max_bytes=self._limits.output_bytes)
        except TimeoutError as exc:
            raise self._too_slow() from exc
        except ValueError as exc:
            raise self._refused_output() from exc
        except (EOFError, OSError) as exc:
            raise self._end_of_child() from exc
        if kind == ERROR:
            raise self._error_from(json.loads(content))
        if kind == FAULT:
            told = json.loads(content)
            log.warning("a child process failed: %s\n%s", told["what"], told["trace"])
            raise self._refuse(f"can't be read: {told['what']}")
        assert kind in (ITEM, ANSWER), kind
        value = json.loads(content)
        if kind == ANSWER:
            self._ended, self.answer = True, value
            return None
        return value

    def _too_slow(self) -> ServiceError:
        # A child that computes is ended by the limit of computing, so this one waits for a disk or a processor.
        return ParsersBusy(
            f"The process that reads the file did not answer within {self._limits.wall_s:.0f} s; try again later."
        )

    def _error_from(self, told: Mapping[str, Any]) -> ServiceError:
        """Returns the error that the child names."""
        kind = self._errors.get(told["kind"])
        if kind is None:
            return self._refuse(f"can't be read: {told['message']}")
        error = kind.__new__(kind)  # Some classes make their message of other arguments.
        ServiceError.__init__(
            error,
            told["message"],
            metadata=told["metadata"],
            field=told["field"],
            resource=tuple(told["resource"]) if told["resource"] else None,
            retry_after_s=told["retry_after_s"],
        )
        return error

    def _refused_output(self) -> ServiceError:
        return self._refuse(f"gives more than {self._limits.output_bytes // _MIB} MiB when it is read")

    def _end_of_child(self) -> ServiceError:
        """Returns the error for a child that ended without an answer."""
        if self._is_cut:
            return ShuttingDown()
        status = self._exit_status()
        if status == NOT_STARTED:
            return ParsersBusy()
        if status is None:
            return ParsersBusy("The process that reads the file was lost; try again later.")
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return ParsersBusy(
                "The system ended the process that reads the file, for want of memory; try again later, or give the"
                " machine more."
            )
        if os.WIFSIGNALED(status):
            why = self._why_killed(os.WTERMSIG(status))
        elif os.WEXITSTATUS(status) == OVER_OUTPUT:
            return self._refused_output()
        elif os.WEXITSTATUS(status) == OVER_MEMORY:
            why = f"takes more than {self._limits.memory_bytes // _MIB} MiB of memory to read"
        else:
            why = f"can't be read: the process that reads it ended with status {os.WEXITSTATUS(status)}"
        return self._refuse(why)

    def _why_killed(self, number: int) -> str:
        if number == signal.SIGXCPU:
            return f"takes longer than {self._limits.cpu_s} s to read"
        # Libraries in Rust and C++ abort if they get no memory.
        memory = f"{self._limits.memory_bytes // _MIB} MiB of memory"
        return f"takes more than {memory} to read, or breaks its parser (signal {number})"

    def _exit_status(self) -> int | None:
        """Returns the child's status as `wait` gives it, None if the zygote is gone."""
        self._status.settimeout(_END_S)
        with contextlib.suppress(OSError):
            if content := self._status.recv(STATUS.size):
                status: int = STATUS.unpack(content)[0]
                return status
        return None
