"""Everything the extractor refuses or fails with; `rpc/status.py` gives each a canonical code and a reason.

ServiceError                          chassis.errors
├── NotFound
│   ├── ModelNotFound · HookpointNotFound · CorpusNotFound · SetNotFound · ExtractionNotFound
├── Invalid
│   ├── FieldInvalid                  `field` names the request field
│   ├── CorpusMalformed               metadata `line`, `row`, `byte` or `document` where known, `columns`
│   └── CorpusEmpty
├── Refused
│   ├── PathNotAllowed · AlreadyExists · StateConflict
│   ├── ModelNotReady · ModelUnsupported
│   ├── LeaseLost · EpochStale
│   └── NotImplementedYet             in the contract, not in this version
├── Exhausted
│   ├── QueueFull · TooManyStreams · DiskFull · DeviceOom
├── Ended                             of an extraction or its rows
│   ├── ExtractionCancelled · ReaderStalled · NonFinite
│   ├── ExtractionFailed              `reason` is an ErrorReason without prefix
│   └── RowsExpired · DigestMismatch
└── Lost
    ├── RunnerLost · LoadFailed · RegistryUnavailable · WaitTimeout
"""

from __future__ import annotations

from collections.abc import Mapping

from chassis.errors import ServiceError


class NotFound(ServiceError):
    """Base: a name that stands for nothing here."""


class ModelNotFound(NotFound):
    """The registry has no model with this id."""


class HookpointNotFound(NotFound):
    """The model has no such hookpoint; metadata `nearest` lists close names."""


class CorpusNotFound(NotFound):
    """No corpus with this id on this node."""


class SetNotFound(NotFound):
    """No activation set with this id on this node."""


class ExtractionNotFound(NotFound):
    """No extraction with this id on this node."""


class Invalid(ServiceError):
    """Base: what was sent can't be used; sending it again won't help."""


class FieldInvalid(Invalid):
    """A request field is missing, out of range or malformed."""


class CorpusMalformed(Invalid):
    """A corpus can't be parsed, or holds token ids that the model does not have."""


class CorpusEmpty(Invalid):
    """A corpus holds no document, or no row survives the recipe."""


class Refused(ServiceError):
    """Base: well-formed, but not allowed or not possible in the present state."""


class PathNotAllowed(Refused):
    """A path lies outside the folders the server was told to allow."""


class AlreadyExists(Refused):
    """The id is taken by a different resource."""


class StateConflict(Refused):
    """The resource's state does not allow this call."""


class ModelNotReady(Refused):
    """The model's files are not ready."""


class ModelUnsupported(Refused):
    """The model's files can't be used."""


class LeaseLost(Refused):
    """The lease has expired, or its fence is stale."""


class EpochStale(Refused):
    """This node's epoch is no longer the current one."""


class NotImplementedYet(Refused):
    """In the contract, not in this version."""


class Exhausted(ServiceError):
    """Base: a bounded resource is used up."""


class QueueFull(Exhausted):
    """A bounded queue is full."""


class TooManyStreams(Exhausted):
    """Too many open streams."""


class DiskFull(Exhausted):
    """The disk or a quota on it is full; metadata `required_bytes`, `free_bytes`."""


class DeviceOom(Exhausted):
    """The device ran out of memory; metadata `estimated_bytes`, `measured_bytes`."""


class Ended(ServiceError):
    """Base: the extraction is over, or its rows can't be had."""


class ExtractionCancelled(Ended):
    """Cancelled before the requested rows existed."""


class ReaderStalled(Ended):
    """No reader advanced a WINDOW extraction for its idle limit."""


class NonFinite(Ended):
    """An activation is NaN or infinite; metadata `document`, `position`, `hookpoint`."""


class ExtractionFailed(Ended):
    """Ended with a failure; `reason` says which, as an ErrorReason without prefix."""

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        resource: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(message, metadata=metadata, retry_after_s=retry_after_s, resource=resource)
        self.reason = reason


class RowsExpired(Ended):
    """The row window is gone, or never will exist; metadata `first_available_row`, `n_rows`."""


class DigestMismatch(Ended):
    """A file is not what its digest says."""


class Lost(ServiceError):
    """Base: something this server depends on is not there, or not in time."""


class RunnerLost(Lost):
    """The model's process died."""


class LoadFailed(Lost):
    """The model could not be loaded; the message tells why."""


class RegistryUnavailable(Lost):
    """The registry can't be reached."""


class WaitTimeout(Lost):
    """A wait inside the service ran past its limit."""
