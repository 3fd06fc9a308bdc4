"""The base of every error that crosses a service boundary: plain data, no gRPC.

    ServiceError
    ├── ShuttingDown, TokenInvalid, TooManyStreams, Overloaded, ParsersBusy, MessageTooLarge, RequestMalformed,
    │   RequestMissing, MethodUnknown
    └── FieldInvalid, AlreadyExists, StateConflict, …   (headrace_registry.errors, headrace_extractor.errors)
    StartError                                          (a server that can't start; never the answer to an RPC)
    ├── AddressInvalid, ListenRefused, ListenFailed
    ├── FolderInvalid
    └── TokenFileInvalid, TlsFileInvalid, ReadyFileInvalid

A subclass names the situation; a table in the service's `rpc/status.py` gives it a canonical code and a reason. An
exception without a row in the table is a bug and leaves as INTERNAL.
"""

from __future__ import annotations

from collections.abc import Mapping


class ServiceError(Exception):
    """An expected failure.

    `message` is one sentence that names the remedy; its variable parts are in `metadata` too. `retry_after_s` tells
    after how many seconds a retry may help; `field` names the request field at fault; `resource` is (type, name).
    `waited`: the server has waited for the thing by itself, so that gRPC in the client is told not to repeat the call.
    """

    waited: bool = False

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        field: str | None = None,
        resource: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.field = field
        self.resource = resource


class ShuttingDown(ServiceError):
    """The server is going away; the caller reconnects and resumes."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down; reconnect and go on where you were.", retry_after_s=1.0)


class TokenInvalid(ServiceError):
    """The bearer token is missing or wrong."""

    def __init__(self) -> None:
        super().__init__(
            "The bearer token is missing or wrong; send the metadata `authorization: Bearer TOKEN` with the token "
            "the server was started with (--token-file).",
        )


class TooManyStreams(ServiceError):
    """As many streams are open as the server allows."""

    def __init__(self, max_streams: int, *, of: str = "streams of this server") -> None:
        super().__init__(
            f"All {max_streams} {of} are in use; close some, or try again later.",
            metadata={"max_streams": str(max_streams)},
            retry_after_s=1.0,
        )


class Overloaded(ServiceError):
    """As many calls are in progress as the server allows."""

    def __init__(self, max_concurrent_rpcs: int) -> None:
        super().__init__(
            f"All {max_concurrent_rpcs} concurrent calls of this server are in use; try again later.",
            metadata={"max_concurrent_rpcs": str(max_concurrent_rpcs)},
            retry_after_s=1.0,
        )


class ParsersBusy(ServiceError):
    """As many files are being read as the server allows, or the system gives no process, memory or time for one."""

    def __init__(self, message: str = "The server reads as many files as it can at once; try again later.") -> None:
        super().__init__(message, retry_after_s=2.0)


class MessageTooLarge(ServiceError):
    """A request message is larger than the server accepts."""

    def __init__(self, *, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"The request message has {size_bytes} bytes, the server accepts {limit_bytes}; send it in smaller pieces.",
            metadata={"size_bytes": str(size_bytes), "limit_bytes": str(limit_bytes)},
        )


class RequestMalformed(ServiceError):
    """The request bytes are not the protobuf message that the method takes."""

    def __init__(self, method: str) -> None:
        super().__init__(
            f"The request bytes are not the message that {method} takes; generate the stubs again from protos/.",
            metadata={"method": method},
        )


class RequestMissing(ServiceError):
    """A call has no message, or has sent its headers long before it."""

    def __init__(self, method: str) -> None:
        super().__init__(
            f"The message that {method} takes did not arrive; send one with each call, and send it at once.",
            metadata={"method": method},
        )


class MethodUnknown(ServiceError):
    """This server has no such method, or its servicer does not implement it."""

    def __init__(self, method: str) -> None:
        super().__init__(
            f"This server does not implement {method or 'this method'}; server reflection lists what it has.",
            metadata={"method": method},
        )


class StartError(Exception):
    """A server can't start as configured; the message names the flag to change."""


class AddressInvalid(StartError):
    """A listen address is not `HOST:PORT`, `[IPV6]:PORT` or `unix:PATH`."""


class ListenRefused(StartError):
    """The address is reachable from other machines and the server would be unprotected there."""


class ListenFailed(StartError):
    """The address can't be bound."""


class FolderInvalid(StartError):
    """A folder can't be read or written, or another server uses it."""


class TokenFileInvalid(StartError):
    """The token file can't be read or holds no usable token."""


class TlsFileInvalid(StartError):
    """The certificate or its key can't be used."""


class ReadyFileInvalid(StartError):
    """The ready file can't be written."""
