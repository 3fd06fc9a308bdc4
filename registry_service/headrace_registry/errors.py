"""The errors of the registry, as plain data.

ServiceError
├── FieldInvalid                      a request field is missing, out of range or malformed
├── PathNotAllowed                    a path outside the model roots
├── NotAllowed                        needs the operator's permission, which is not given
├── NotFound                          ModelNotFound · NodeNotFound · LeaseNotFound · SetNotFound · AttemptNotFound
├── AlreadyExists                     the id names a different model
├── StateConflict                     the state does not allow the call
├── ModelNotReady · ModelUnsupported  files missing; files unusable
├── ModelInUse · EtagMismatch         delete or change while in use; stale etag
├── ModelTooLarge · CapacityBusy      fits nowhere ever; fits, but pins leave no room
├── QueueFull · AdmissionTimeout      too many wait; waited for memory past the limit
├── LeaseLost · EpochStale · NodeLost fences, epochs, silence
├── LoadFailed · DeviceOom            a node reported that a load failed
├── ModelChanged                      a node found other files than those that were prepared
├── RunnerLost                        the model's process died while it loaded
├── HubGated · HubUnavailable · HubNotFound
├── DigestMismatch · DiskFull         files
├── DatabaseUnavailable               Postgres can't be reached within the call's deadline
└── NotImplementedYet                 in the contract, not in this version
"""

from __future__ import annotations

from headrace_chassis.errors import ServiceError


class FieldInvalid(ServiceError):
    """A request field is missing, out of range or malformed."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", field=field, metadata={"field": field})


class PathNotAllowed(ServiceError):
    """A path lies outside the folders the registry may read."""


class NotAllowed(ServiceError):
    """Only the operator of the registry may allow this, by a flag."""


class NotFound(ServiceError):
    """Base of failed lookups; NOUN names the kind of resource."""

    NOUN = "resource"

    def __init__(self, name: str, hint: str) -> None:
        super().__init__(f"no {self.NOUN} {name!r}: {hint}", metadata={"name": name}, resource=(self.NOUN, name))


class ModelNotFound(NotFound):
    """No model with this id."""

    NOUN = "model"

    def __init__(self, name: str) -> None:
        super().__init__(name, "see ListModels for what is registered, or register it")


class NodeNotFound(NotFound):
    """No node, or no device of it, with this id."""

    NOUN = "node"

    def __init__(self, name: str) -> None:
        super().__init__(name, "see ListNodes for what has registered")


class LeaseNotFound(NotFound):
    """No lease with this id."""

    NOUN = "lease"

    def __init__(self, name: str) -> None:
        super().__init__(name, "acquire one with AcquireLease")


class AttemptNotFound(NotFound):
    """No attempt to load a model with this id."""

    NOUN = "attempt"

    def __init__(self, name: str) -> None:
        super().__init__(name, "see ListAttempts; of each model the latest are kept")


class SetNotFound(NotFound):
    """No activation set with this id."""

    NOUN = "activation set"

    def __init__(self, name: str) -> None:
        super().__init__(name, "see ListActivationSets for what nodes hold")


class AlreadyExists(ServiceError):
    """The id is taken by something different."""


class StateConflict(ServiceError):
    """The resource's state does not allow this call."""


class ModelNotReady(ServiceError):
    """The model's files are not ready, or it is not resident and the call asked for a resident model only."""


class ModelUnsupported(ServiceError):
    """The model's files can't be used."""


class ModelInUse(ServiceError):
    """The model can't be deleted, unloaded or changed while it is leased, pinned or on a device."""


class EtagMismatch(ServiceError):
    """The resource changed since the etag was read."""


class ModelTooLarge(ServiceError):
    """The model fits on no device, ever."""


class CapacityBusy(ServiceError):
    """The model fits, but pins leave no room for it."""


class QueueFull(ServiceError):
    """The most calls, or models, that may wait are waiting already."""


class AdmissionTimeout(ServiceError):
    """The call waited past its limit for memory or for the load."""


class LeaseLost(ServiceError):
    """The lease or assignment has ended, or its fence is stale."""


class EpochStale(ServiceError):
    """The node's epoch is no longer the current one."""


class NodeLost(ServiceError):
    """The node is silent, or no node is alive."""


class LoadFailed(ServiceError):
    """The node could not load the model."""


class ModelChanged(LoadFailed):
    """The model's files are not as they were when it was prepared."""


class DeviceOom(LoadFailed):
    """The device ran out of memory while loading."""


class RunnerLost(LoadFailed):
    """The model's process died."""


class HubGated(ServiceError):
    """The repo is gated or private, or the token is wrong."""


class HubUnavailable(ServiceError):
    """The hub can't be reached."""


class HubNotFound(ServiceError):
    """The hub has no such repo or revision."""


class DigestMismatch(ServiceError):
    """A file does not match its header or digest."""


class DiskFull(ServiceError):
    """The disk is full."""


class DatabaseUnavailable(ServiceError):
    """Postgres can't be reached within the call's deadline."""


class NotImplementedYet(ServiceError):
    """In the contract, not in this version."""
