"""Which error leaves with which code; the reason is the error's own."""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from headrace_chassis.status import StatusTable
from headrace_extractor import errors

_BY_CODE: Mapping[grpc.StatusCode, tuple[type[errors.ExtractorError], ...]] = {
    grpc.StatusCode.NOT_FOUND: (
        errors.ModelNotFound,
        errors.HookpointNotFound,
        errors.CorpusNotFound,
        errors.SetNotFound,
        errors.ExtractionNotFound,
        errors.HubNotFound,
    ),
    grpc.StatusCode.INVALID_ARGUMENT: (
        errors.FieldInvalid,
        errors.CorpusMalformed,
        errors.CorpusEmpty,
    ),
    grpc.StatusCode.PERMISSION_DENIED: (errors.PathNotAllowed, errors.HubGated),
    grpc.StatusCode.ALREADY_EXISTS: (errors.AlreadyExists,),
    grpc.StatusCode.FAILED_PRECONDITION: (
        errors.StateConflict,
        errors.ModelNotReady,
        errors.ModelUnsupported,
        errors.ModelChanged,
        errors.LeaseLost,
        errors.EpochStale,
        errors.ReaderStalled,
        errors.NonFinite,
        errors.ModelTooLarge,
        errors.ExtraMissing,
    ),
    grpc.StatusCode.UNIMPLEMENTED: (errors.NotImplementedYet,),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        errors.QueueFull,
        errors.TooManyStreams,
        errors.RowTooLarge,
        errors.DiskFull,
        errors.DeviceOom,
        errors.CapacityBusy,
    ),
    grpc.StatusCode.CANCELLED: (errors.ExtractionCancelled,),
    grpc.StatusCode.OUT_OF_RANGE: (errors.RowsExpired,),
    grpc.StatusCode.DATA_LOSS: (errors.DigestMismatch,),
    grpc.StatusCode.UNAVAILABLE: (
        errors.RunnerLost,
        errors.RegistryUnavailable,
        errors.NodeLost,
        errors.DatabaseUnavailable,
        errors.HubUnavailable,
    ),
    grpc.StatusCode.INTERNAL: (
        errors.LoadFailed,
        errors.ExtractionFailed,
    ),
    grpc.StatusCode.DEADLINE_EXCEEDED: (
        errors.WaitTimeout,
        errors.AdmissionTimeout,
    ),
}


def status_table() -> StatusTable:
    """The table the server answers by."""
    return StatusTable({kind: (code, kind.reason) for code, kinds in _BY_CODE.items() for kind in kinds})
