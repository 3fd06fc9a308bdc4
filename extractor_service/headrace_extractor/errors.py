"""All errors of the extractor; `rpc/status.py` gives each a canonical code and a reason.

ServiceError                          headrace_chassis.errors
├── NotFound
│   ├── ModelNotFound · HookpointNotFound · CorpusNotFound · SetNotFound · ExtractionNotFound
│   └── HubNotFound
├── Invalid
│   ├── FieldInvalid                  `field` names the request field
│   ├── CorpusMalformed               metadata `line`, `row`, `byte` or `document` where known, `columns`
│   └── CorpusEmpty
├── Refused
│   ├── PathNotAllowed · AlreadyExists · StateConflict · HubGated
│   ├── ModelNotReady · ModelUnsupported · ModelChanged · ModelTooLarge
│   ├── LeaseLost · EpochStale
│   ├── ExtraMissing                  an optional package is not installed here; metadata `extra`
│   └── NotImplementedYet             in the contract, not in this version
├── Exhausted
│   └── QueueFull · TooManyStreams · RowTooLarge · CapacityBusy · DiskFull · DeviceOom
├── Ended                             of an extraction or its rows
│   ├── ExtractionCancelled · ReaderStalled · NonFinite
│   ├── ExtractionFailed              a bug
│   └── RowsExpired · DigestMismatch
└── Lost
    ├── RunnerLost · LoadFailed · RegistryUnavailable · NodeLost · DatabaseUnavailable · HubUnavailable
    └── AdmissionTimeout · WaitTimeout
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from headrace_chassis.errors import ServiceError, StartError


class ExtractorError(ServiceError):
    """Base of all; `reason` is an ErrorReason without its prefix.

    `left_alone_s`: seconds for which the registry does not try again to load the model that the error is about.
    """

    reason: ClassVar[str] = "INTERNAL"
    left_alone_s: float = 0.0


class NotFound(ExtractorError):
    """Base: no resource with this name on this node or in the registry."""


class NodeIdTaken(StartError):
    """A living node on another data folder is registered under this node's id."""


class ModelNotFound(NotFound):
    """The registry has no model with this id."""

    reason = "MODEL_NOT_FOUND"


class HookpointNotFound(NotFound):
    """The model has no such hookpoint; metadata `nearest` lists close names."""

    reason = "HOOKPOINT_NOT_FOUND"


class CorpusNotFound(NotFound):
    """No corpus with this id on this node."""

    reason = "CORPUS_NOT_FOUND"


class SetNotFound(NotFound):
    """No activation set with this id on this node."""

    reason = "SET_NOT_FOUND"


class HubNotFound(NotFound):
    """The hub has no such dataset or revision, or hides it."""

    reason = "HUB_NOT_FOUND"


class ExtractionNotFound(NotFound):
    """No extraction with this id on this node."""

    reason = "EXTRACTION_NOT_FOUND"


class Invalid(ExtractorError):
    """Base: the request or its data can't be used; sending it again won't help."""


class FieldInvalid(Invalid):
    """A request field is missing, out of range or malformed."""

    reason = "FIELD_INVALID"


class CorpusMalformed(Invalid):
    """A corpus can't be parsed, or holds token ids that the model does not have."""

    reason = "CORPUS_MALFORMED"


class CorpusEmpty(Invalid):
    """A corpus holds no document, or no row survives the recipe."""

    reason = "CORPUS_EMPTY"


class Refused(ExtractorError):
    """Base: well-formed, but not allowed or not possible in the present state."""


class PathNotAllowed(Refused):
    """A path lies outside the folders the server was told to allow."""

    reason = "PATH_NOT_ALLOWED"


class HubGated(Refused):
    """The dataset is gated or private, or the token is wrong."""

    reason = "HUB_GATED"


class AlreadyExists(Refused):
    """The id is taken by a different resource."""

    reason = "ALREADY_EXISTS"


class StateConflict(Refused):
    """The resource's state does not allow this call."""

    reason = "STATE_CONFLICT"


class ModelNotReady(Refused):
    """The model's files are not ready."""

    reason = "MODEL_NOT_READY"


class ModelUnsupported(Refused):
    """The model's files can't be used."""

    reason = "MODEL_UNSUPPORTED"


class ModelChanged(Refused):
    """The model's files are not as they were when it was prepared; metadata `files` names some."""

    reason = "MODEL_CHANGED"


class ModelTooLarge(Refused):
    """The model fits on no device, ever; metadata `required_bytes`, `largest_bytes`."""

    reason = "MODEL_TOO_LARGE"


class LeaseLost(Refused):
    """The lease has expired, or its fence is stale."""

    reason = "LEASE_LOST"


class EpochStale(Refused):
    """This node's epoch is no longer the current one."""

    reason = "EPOCH_STALE"


class ExtraMissing(Refused):
    """An optional package is not installed where it is needed; metadata `extra`."""

    reason = "EXTRA_MISSING"


class NotImplementedYet(Refused):
    """In the contract, not in this version."""

    reason = "NOT_IMPLEMENTED"


class Exhausted(ExtractorError):
    """Base: a bounded resource is used up."""


class QueueFull(Exhausted):
    """A bounded queue is full."""

    reason = "QUEUE_FULL"


class TooManyStreams(Exhausted):
    """Too many open streams."""

    reason = "TOO_MANY_STREAMS"


class RowTooLarge(Exhausted):
    """One row of the columns asked for is larger than a message; metadata `row_bytes`, `limit_bytes`."""

    reason = "MESSAGE_TOO_LARGE"


class CapacityBusy(Exhausted):
    """The model fits, but everything is leased or pinned; metadata `holders`."""

    reason = "CAPACITY_BUSY"


class DiskFull(Exhausted):
    """The disk or a quota on it is full; metadata `required_bytes`, `free_bytes`."""

    reason = "DISK_FULL"


class DeviceOom(Exhausted):
    """The device ran out of memory; metadata `estimated_bytes`, `measured_bytes`."""

    reason = "DEVICE_OOM"


class Ended(ExtractorError):
    """Base: the extraction is over, or its rows are not available."""


class ExtractionCancelled(Ended):
    """Cancelled before the requested rows existed."""

    reason = "EXTRACTION_CANCELLED"


class ReaderStalled(Ended):
    """No reader advanced a WINDOW extraction for its idle limit."""

    reason = "READER_STALLED"


class NonFinite(Ended):
    """An activation is NaN or infinite; metadata `document`, `position`, `hookpoint`."""

    reason = "NON_FINITE"


class ExtractionFailed(Ended):
    """Ended with a bug, here or in the runner; the node's log has the details."""

    reason = "INTERNAL"


class RowsExpired(Ended):
    """The rows are dropped, or will never exist; metadata `first_available_row`, `n_rows`."""

    reason = "ROWS_EXPIRED"


class DigestMismatch(Ended):
    """A file does not match its digest."""

    reason = "DIGEST_MISMATCH"


class Lost(ExtractorError):
    """Base: a process or service that this server depends on is lost or too slow."""


# Key of the metadata of a RunnerLost: `true` if the process was ended from outside, which is no fault of the model.
INTERRUPTED = "interrupted"


class RunnerLost(Lost):
    """The model's process died."""

    reason = "RUNNER_LOST"


class LoadFailed(Lost):
    """The model could not be loaded; the message tells why."""

    reason = "LOAD_FAILED"


class RegistryUnavailable(Lost):
    """The registry can't be reached."""

    reason = "REGISTRY_UNAVAILABLE"
    waited = True


class HubUnavailable(Lost):
    """The hub can't be reached."""

    reason = "HUB_UNAVAILABLE"


class WaitTimeout(Lost):
    """A wait inside the service ran past its limit."""

    reason = "WAIT_TIMEOUT"


class AdmissionTimeout(Lost):
    """Waited for capacity past the deadline."""

    reason = "ADMISSION_TIMEOUT"


class NodeLost(Lost):
    """The registry does not hear from the node."""

    reason = "NODE_LOST"


class DatabaseUnavailable(Lost):
    """The registry can't reach its database."""

    reason = "DATABASE_UNAVAILABLE"


def error_for(
    reason: str,
    message: str,
    *,
    metadata: Mapping[str, str] | None = None,
    retry_after_s: float | None = None,
    resource: tuple[str, str] | None = None,
    left_alone_s: float = 0.0,
) -> ExtractorError:
    """Returns the error for a reason that a runner, the registry or a record names."""
    kind = _BY_REASON.get(reason, ExtractionFailed)
    error = kind(message, metadata=metadata, retry_after_s=retry_after_s, resource=resource)
    error.left_alone_s = left_alone_s
    return error


def reason_of(exc: ServiceError) -> str:
    """Returns an error's reason, without prefix; INTERNAL for errors that have none."""
    return exc.reason if isinstance(exc, ExtractorError) else ExtractorError.reason


def _leaves(root: type[ExtractorError]) -> Iterator[type[ExtractorError]]:
    for kind in root.__subclasses__():
        yield from _leaves(kind) if kind.__subclasses__() else (kind,)


_BY_REASON = {kind.reason: kind for kind in _leaves(ExtractorError)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The reason why a piece of work failed; `reason` is an ErrorReason without prefix."""

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def interrupted(self) -> bool:
        """True if a process was ended from outside: the work did not fail by itself, and is soon tried again."""
        return self.metadata.get(INTERRUPTED) == "true"

    def to_json(self) -> dict[str, Any]:
        """Inverse of the constructor."""
        return {"reason": self.reason, "message": self.message, "metadata": dict(self.metadata)}
