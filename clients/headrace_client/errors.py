"""Every error that the client raises. Nothing here knows gRPC; `rpc.status` turns a status into one of these.

HeadraceError
├── NotFound            ModelNotFound HookpointNotFound CorpusNotFound SetNotFound ExtractionNotFound NodeNotFound
│                       LeaseNotFound AttemptNotFound HubNotFound
├── InvalidArgument     CorpusMalformed CorpusEmpty
├── AlreadyExists
├── PermissionDenied    PathNotAllowed NotAllowed HubGated ProxyRefused
├── Unauthenticated
├── FailedPrecondition  ModelTooLarge ModelInUse ModelNotReady ModelUnsupported ModelChanged LeaseLost NonFinite
│                       ReaderStalled StateConflict EpochStale ExtraMissing PackageMissing
├── Aborted             EtagMismatch
├── ResourceExhausted   CapacityBusy QueueFull TooManyStreams MessageTooLarge DeviceOutOfMemory DiskFull
├── OutOfRange          RowsExpired
├── Cancelled           ExtractionCancelled
├── DeadlineExceeded    AdmissionTimeout WaitTimeout
├── DataLoss            DigestMismatch RowsNotContiguous
├── Unavailable         ShuttingDown RunnerLost NodeLost DatabaseUnavailable RegistryUnavailable HubUnavailable
│                       StreamSilent StreamLost
├── Unimplemented
└── Internal            LoadFailed
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar


class HeadraceError(Exception):
    """Base of all errors; raised itself for an error of none of the kinds below.

    `reason` is an ErrorReason without its prefix, or the name of a gRPC code where the server gave no reason.
    `message` is the server's sentence. `metadata` holds its figures, `fields` the request fields at fault.
    `retry_after_s` says when trying again may help, `remedy` names a way out for the caller. The server's log has the
    call under `request_id`, which is empty where no server answered.
    """

    REASON: ClassVar[str] = "UNKNOWN"
    REMEDY: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        remedy: str = "",
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.REASON
        self.metadata = dict(metadata or {})
        self.fields = dict(fields or {})
        self.retry_after_s = retry_after_s
        self.remedy = remedy or self.REMEDY
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, {k: v for k, v in vars(self).items() if k != "message"})


def _rebuild(kind: type[HeadraceError], message: str, rest: dict[str, object]) -> HeadraceError:
    error = kind(message)
    vars(error).update(rest)
    return error


class NotFound(HeadraceError):
    """The named thing does not exist."""

    REASON = "NOT_FOUND"


class ModelNotFound(NotFound):
    """No model with this id."""

    REASON = "MODEL_NOT_FOUND"
    REMEDY = "list the models with `headrace models list`; register one with `headrace models add`"


class HookpointNotFound(NotFound):
    """The model has no such hookpoint."""

    REASON = "HOOKPOINT_NOT_FOUND"
    REMEDY = "list what the model has with `headrace models hookpoints MODEL`"

    @property
    def nearest(self) -> tuple[str, ...]:
        """Close names that exist."""
        return tuple(name.strip() for name in self.metadata.get("nearest", "").split(",") if name.strip())


class CorpusNotFound(NotFound):
    """No corpus with this id on that node."""

    REASON = "CORPUS_NOT_FOUND"
    REMEDY = "list the corpora with `headrace corpora list`; add one with `headrace corpora add`"


class SetNotFound(NotFound):
    """No activation set with this id."""

    REASON = "SET_NOT_FOUND"
    REMEDY = "list the sets with `headrace sets list`"


class ExtractionNotFound(NotFound):
    """No extraction with this id on any node that is alive."""

    REASON = "EXTRACTION_NOT_FOUND"
    REMEDY = (
        "list the extractions with `headrace extractions list`, or start it again with `headrace extract`: "
        "rows that exist are not computed twice"
    )


class NodeNotFound(NotFound):
    """No node with this id."""

    REASON = "NODE_NOT_FOUND"
    REMEDY = "list the nodes with `headrace devices`"


class LeaseNotFound(NotFound):
    """No lease with this id."""

    REASON = "LEASE_NOT_FOUND"


class AttemptNotFound(NotFound):
    """No attempt to load a model with this id."""

    REASON = "ATTEMPT_NOT_FOUND"
    REMEDY = "list the attempts with `headrace models attempts MODEL`"


class HubNotFound(NotFound):
    """The hub has no such repo or revision."""

    REASON = "HUB_NOT_FOUND"
    REMEDY = "check the spelling of the repo and of the revision"


class InvalidArgument(HeadraceError):
    """A request field is missing, out of range or malformed; `fields` names it."""

    REASON = "FIELD_INVALID"


class CorpusMalformed(InvalidArgument):
    """The corpus file can't be parsed."""

    REASON = "CORPUS_MALFORMED"
    REMEDY = "mend the file at the line named, or name its format and text column"

    @property
    def line(self) -> int | None:
        """Line of the file, counted from 1, where known."""
        text = self.metadata.get("line", "")
        return int(text) if text.isdigit() else None


class CorpusEmpty(InvalidArgument):
    """The corpus holds no document, or no row survives the recipe."""

    REASON = "CORPUS_EMPTY"
    REMEDY = "give a corpus with text, or drop fewer positions"


class AlreadyExists(HeadraceError):
    """The id is taken by something different."""

    REASON = "ALREADY_EXISTS"
    REMEDY = "choose another id, or delete what holds it"


class PermissionDenied(HeadraceError):
    """The caller may not do this."""

    REASON = "PERMISSION_DENIED"


class PathNotAllowed(PermissionDenied):
    """The path lies outside the folders the server may read."""

    REASON = "PATH_NOT_ALLOWED"
    REMEDY = "start the server with that folder as --models-root or --corpus-root, or upload the file"


class NotAllowed(PermissionDenied):
    """The server was started without permission for it: pickled weights, code from a repo."""

    REASON = "NOT_ALLOWED"
    REMEDY = "have the registry started with --allow-pickle or --trust-remote-code for that repo"


class HubGated(PermissionDenied):
    """The hub repo is gated or private, or the hub token is wrong."""

    REASON = "HUB_GATED"
    REMEDY = "accept the repo's terms on the hub, and give a token with --hub-token-file"


class ProxyRefused(PermissionDenied):
    """A proxy or web server answered in place of the server; metadata `http_status`."""

    REASON = "PROXY_REFUSED"
    REMEDY = (
        "name the server's host in no_proxy, log in at the proxy, or check the address: no Headrace server answered"
    )


class Unauthenticated(HeadraceError):
    """The bearer token is missing or wrong."""

    REASON = "TOKEN_INVALID"
    REMEDY = "give the server's token with --token-file or HEADRACE_TOKEN"


class FailedPrecondition(HeadraceError):
    """The present state does not allow the call."""

    REASON = "FAILED_PRECONDITION"


class ModelTooLarge(FailedPrecondition):
    """The model fits on no device, ever."""

    REASON = "MODEL_TOO_LARGE"
    REMEDY = "register it with a smaller quantization, or give a device more bytes"


class ModelInUse(FailedPrecondition):
    """The model can't be deleted or unloaded while it is in use."""

    REASON = "MODEL_IN_USE"
    REMEDY = "wait for its holders, or force it"


class ModelNotReady(FailedPrecondition):
    """The model's files are not ready."""

    REASON = "MODEL_NOT_READY"
    REMEDY = "prepare it first: `headrace models watch MODEL` shows how far it is"


class ModelUnsupported(FailedPrecondition):
    """The model's files can't be used."""

    REASON = "MODEL_UNSUPPORTED"


class ModelChanged(FailedPrecondition):
    """The model's files are not as they were when it was prepared; metadata `files`."""

    REASON = "MODEL_CHANGED"
    REMEDY = "prepare it again: `headrace models add` with the same source, then start the extraction again"


class ExtraMissing(FailedPrecondition):
    """An optional package is not installed where it is needed."""

    REASON = "EXTRA_MISSING"
    REMEDY = "install the extra that the message names on the node"


class PackageMissing(ExtraMissing, ImportError):
    """An optional package is not installed here; metadata `package`."""

    REASON = "PACKAGE_MISSING"
    REMEDY = "install the extra that the message names"


class LeaseLost(FailedPrecondition):
    """The lease has expired, or its fence is stale."""

    REASON = "LEASE_LOST"
    REMEDY = "acquire it again"


class NonFinite(FailedPrecondition):
    """An activation is NaN or infinite."""

    REASON = "NON_FINITE"
    REMEDY = "compute in another dtype (load option `dtype`), or allow it with --allow-non-finite"


class ReaderStalled(FailedPrecondition):
    """No reader read on in a WINDOW extraction for longer than its grace."""

    REASON = "READER_STALLED"
    REMEDY = "start it again and keep a reader attached, or retain the rows instead of a window"


class StateConflict(FailedPrecondition):
    """The resource's state does not allow this call."""

    REASON = "STATE_CONFLICT"


class EpochStale(FailedPrecondition):
    """The node's epoch is no longer the current one."""

    REASON = "EPOCH_STALE"


class Aborted(HeadraceError):
    """Another change was faster."""

    REASON = "ABORTED"
    REMEDY = "read the resource again and repeat the change"


class EtagMismatch(Aborted):
    """The resource changed since its etag was read."""

    REASON = "ETAG_MISMATCH"


class ResourceExhausted(HeadraceError):
    """A limit is reached."""

    REASON = "RESOURCE_EXHAUSTED"


class CapacityBusy(ResourceExhausted):
    """The model fits, but the memory is leased or pinned; metadata `holders`."""

    REASON = "CAPACITY_BUSY"
    REMEDY = "wait for a holder to finish, or unload a model (`headrace devices` shows them)"


class QueueFull(ResourceExhausted):
    """A bounded queue is full."""

    REASON = "QUEUE_FULL"
    REMEDY = "try again later"


class TooManyStreams(ResourceExhausted):
    """Too many open streams."""

    REASON = "TOO_MANY_STREAMS"
    REMEDY = "close a stream, or try again later"


class MessageTooLarge(ResourceExhausted):
    """A message is larger than its receiver accepts."""

    REASON = "MESSAGE_TOO_LARGE"
    REMEDY = (
        "send less at once: upload a file instead of token ids in a request, or ask for smaller chunks (chunk_bytes)"
    )


class DeviceOutOfMemory(ResourceExhausted):
    """The device ran out of memory."""

    REASON = "DEVICE_OOM"
    REMEDY = "take a smaller batch_size or context_size, or a smaller quantization"


class DiskFull(ResourceExhausted):
    """The disk is full."""

    REASON = "DISK_FULL"
    REMEDY = "free space there, or extract with --window"


class OutOfRange(HeadraceError):
    """A number lies beyond the existing rows."""

    REASON = "OUT_OF_RANGE"


class RowsExpired(OutOfRange):
    """The rows are gone already, or will never exist; metadata `first_available_row`, `n_rows`."""

    REASON = "ROWS_EXPIRED"
    REMEDY = "read rows from first_available_row on, below n_rows; to keep all rows, retain them instead of a window"


class Cancelled(HeadraceError):
    """The call, or the work it waits for, was cancelled."""

    REASON = "CANCELLED"


class ExtractionCancelled(Cancelled):
    """The extraction was cancelled before the requested rows existed."""

    REASON = "EXTRACTION_CANCELLED"
    REMEDY = "start it again: it goes on behind the rows that exist"


class DeadlineExceeded(HeadraceError):
    """The call did not end within its deadline."""

    REASON = "DEADLINE_EXCEEDED"
    REMEDY = "see whether the server is busy (`headrace doctor`), or allow more time"


class AdmissionTimeout(DeadlineExceeded):
    """Waited for capacity past the deadline."""

    REASON = "ADMISSION_TIMEOUT"
    REMEDY = "unload something (`headrace devices`), or wait longer"


class WaitTimeout(DeadlineExceeded):
    """A wait inside the service ran past its limit."""

    REASON = "WAIT_TIMEOUT"


class DataLoss(HeadraceError):
    """Data are corrupt or missing."""

    REASON = "DATA_LOSS"


class DigestMismatch(DataLoss):
    """A digest does not match its file."""

    REASON = "DIGEST_MISMATCH"
    REMEDY = "delete the set and extract again: the rows come out the same"


class RowsNotContiguous(DataLoss):
    """The server sent rows with a gap or an overlap, or went on with another set: a bug of the server."""

    REASON = "ROWS_NOT_CONTIGUOUS"
    REMEDY = "report it; the rows delivered so far are right"


class Unavailable(HeadraceError):
    """The server can't be reached, or is going away."""

    REASON = "UNAVAILABLE"
    REMEDY = "see what runs with `headrace doctor`; start the services with `headrace up`"


class ShuttingDown(Unavailable):
    """The server is going away."""

    REASON = "SHUTTING_DOWN"


class RunnerLost(Unavailable):
    """The model's process died."""

    REASON = "RUNNER_LOST"


class NodeLost(Unavailable):
    """The node is away, or no node is alive."""

    REASON = "NODE_LOST"
    REMEDY = "start an extractor: `headrace serve extractor`, or `headrace up`"


class DatabaseUnavailable(Unavailable):
    """The registry can't reach its database."""

    REASON = "DATABASE_UNAVAILABLE"
    REMEDY = "see the registry's log; it reconnects by itself once the database is back"


class RegistryUnavailable(Unavailable):
    """The registry can't be reached."""

    REASON = "REGISTRY_UNAVAILABLE"
    REMEDY = "start the registry: `headrace serve registry`, or `headrace up`"


class HubUnavailable(Unavailable):
    """The hub can't be reached."""

    REASON = "HUB_UNAVAILABLE"
    REMEDY = "try again later, or register a local folder"


class StreamSilent(Unavailable):
    """A stream was open and no message came, not even a heartbeat."""

    REASON = "STREAM_SILENT"


class StreamLost(Unavailable):
    """A stream broke and no row came within the reconnect deadline; metadata `next_row`, `last_reason`."""

    REASON = "STREAM_LOST"
    REMEDY = "see what runs with `headrace doctor`, then open the stream again with start_row = next_row"


class Unimplemented(HeadraceError):
    """The contract has it, this version of the server does not."""

    REASON = "NOT_IMPLEMENTED"
    REMEDY = "update the server"


class Internal(HeadraceError):
    """A bug of the server; the message carries the request id, the server's log the stack."""

    REASON = "INTERNAL"
    REMEDY = "look the request id up in the server's log, and report it"


class LoadFailed(Internal):
    """The model could not be loaded; the message tells why."""

    REASON = "LOAD_FAILED"
    REMEDY = "read the message; `headrace doctor` and the extractor's log tell more"


# gRPC's own codes, for statuses without a reason, or with one that this client does not know yet.
BY_CODE: Mapping[str, type[HeadraceError]] = {
    "NOT_FOUND": NotFound,
    "INVALID_ARGUMENT": InvalidArgument,
    "ALREADY_EXISTS": AlreadyExists,
    "PERMISSION_DENIED": PermissionDenied,
    "UNAUTHENTICATED": Unauthenticated,
    "FAILED_PRECONDITION": FailedPrecondition,
    "ABORTED": Aborted,
    "RESOURCE_EXHAUSTED": ResourceExhausted,
    "OUT_OF_RANGE": OutOfRange,
    "CANCELLED": Cancelled,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "DATA_LOSS": DataLoss,
    "UNAVAILABLE": Unavailable,
    "UNIMPLEMENTED": Unimplemented,
    "INTERNAL": Internal,
}


def _walk(kind: type[HeadraceError]) -> Iterator[type[HeadraceError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _walk(child)


BY_REASON: Mapping[str, type[HeadraceError]] = {kind.REASON: kind for kind in _walk(HeadraceError)}


def error_class(code: str, reason: str) -> type[HeadraceError]:
    """Returns the class for a reason, or for its code where the reason is unknown."""
    return BY_REASON.get(reason) or BY_CODE.get(code, HeadraceError)
