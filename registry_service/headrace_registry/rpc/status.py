"""The table of errors: for each its canonical code and its reason in `error_reason.proto`."""

from __future__ import annotations

import grpc

from headrace_chassis.errors import ServiceError
from headrace_chassis.status import StatusTable
from headrace_registry import errors

_CODE = grpc.StatusCode

STATUSES = StatusTable(
    {
        errors.FieldInvalid: (_CODE.INVALID_ARGUMENT, "FIELD_INVALID"),
        errors.PathNotAllowed: (_CODE.PERMISSION_DENIED, "PATH_NOT_ALLOWED"),
        errors.NotAllowed: (_CODE.PERMISSION_DENIED, "NOT_ALLOWED"),
        errors.ModelNotFound: (_CODE.NOT_FOUND, "MODEL_NOT_FOUND"),
        errors.NodeNotFound: (_CODE.NOT_FOUND, "NODE_NOT_FOUND"),
        errors.LeaseNotFound: (_CODE.NOT_FOUND, "LEASE_NOT_FOUND"),
        errors.AttemptNotFound: (_CODE.NOT_FOUND, "ATTEMPT_NOT_FOUND"),
        errors.SetNotFound: (_CODE.NOT_FOUND, "SET_NOT_FOUND"),
        errors.AlreadyExists: (_CODE.ALREADY_EXISTS, "ALREADY_EXISTS"),
        errors.StateConflict: (_CODE.FAILED_PRECONDITION, "STATE_CONFLICT"),
        errors.ModelNotReady: (_CODE.FAILED_PRECONDITION, "MODEL_NOT_READY"),
        errors.ModelUnsupported: (_CODE.FAILED_PRECONDITION, "MODEL_UNSUPPORTED"),
        errors.ModelInUse: (_CODE.FAILED_PRECONDITION, "MODEL_IN_USE"),
        errors.EtagMismatch: (_CODE.ABORTED, "ETAG_MISMATCH"),
        errors.ModelTooLarge: (_CODE.FAILED_PRECONDITION, "MODEL_TOO_LARGE"),
        errors.CapacityBusy: (_CODE.RESOURCE_EXHAUSTED, "CAPACITY_BUSY"),
        errors.QueueFull: (_CODE.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
        errors.AdmissionTimeout: (_CODE.DEADLINE_EXCEEDED, "ADMISSION_TIMEOUT"),
        errors.LeaseLost: (_CODE.FAILED_PRECONDITION, "LEASE_LOST"),
        errors.EpochStale: (_CODE.FAILED_PRECONDITION, "EPOCH_STALE"),
        errors.NodeLost: (_CODE.UNAVAILABLE, "NODE_LOST"),
        errors.LoadFailed: (_CODE.INTERNAL, "LOAD_FAILED"),
        errors.ModelChanged: (_CODE.FAILED_PRECONDITION, "MODEL_CHANGED"),
        errors.DeviceOom: (_CODE.RESOURCE_EXHAUSTED, "DEVICE_OOM"),
        errors.RunnerLost: (_CODE.UNAVAILABLE, "RUNNER_LOST"),
        errors.HubGated: (_CODE.PERMISSION_DENIED, "HUB_GATED"),
        errors.HubUnavailable: (_CODE.UNAVAILABLE, "HUB_UNAVAILABLE"),
        errors.HubNotFound: (_CODE.NOT_FOUND, "HUB_NOT_FOUND"),
        errors.DigestMismatch: (_CODE.DATA_LOSS, "DIGEST_MISMATCH"),
        errors.DiskFull: (_CODE.RESOURCE_EXHAUSTED, "DISK_FULL"),
        errors.DatabaseUnavailable: (_CODE.UNAVAILABLE, "DATABASE_UNAVAILABLE"),
        errors.NotImplementedYet: (_CODE.UNIMPLEMENTED, "NOT_IMPLEMENTED"),
    }
)


def reason_of(exc: ServiceError) -> str:
    """The reason to store when `exc` ends long work."""
    row = STATUSES.row(exc)
    return row[1] if row is not None else "INTERNAL"
