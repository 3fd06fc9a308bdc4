"""Estimates and the catalog: messages to values."""

from __future__ import annotations

from headrace.registry.v1 import model_service_pb2 as pb
from headrace_client import values as v
from headrace_client.rpc.convert.enums import state_of
from headrace_client.rpc.convert.models import quantization_from_pb


def advice_from_pb(message: pb.EstimateMemoryResponse) -> v.MemoryAdvice:
    """Reads the answer of EstimateMemory."""
    estimates = tuple(_estimate_from_pb(each) for each in message.estimates)
    known = 0 <= message.recommended < len(estimates)
    return v.MemoryAdvice(estimates=estimates, recommended=estimates[message.recommended] if known else None)


def catalog_entry_from_pb(message: pb.CatalogEntry) -> v.CatalogEntry:
    """Reads an entry of the catalog."""
    return v.CatalogEntry(
        name=message.name,
        repo_id=message.repo_id,
        model_type=message.model_type,
        n_parameters=message.n_parameters,
        n_layers=message.n_layers,
        d_model=message.d_model,
        context_window=message.context_window,
        probe_layers=tuple(message.probe_layers),
        categories=tuple(message.categories),
        gated=message.gated,
        memory=tuple(
            v.CatalogMemory(
                quantization=quantization_from_pb(each.quantization), dtype=each.dtype, total_bytes=each.total_bytes
            )
            for each in message.memory
        ),
        batches=tuple(
            v.CatalogBatch(
                memory_bytes=each.memory_bytes,
                batch_size=each.batch_size,
                quantization=quantization_from_pb(each.quantization),
            )
            for each in message.batches
        ),
    )


def _estimate_from_pb(message: pb.MemoryEstimate) -> v.MemoryEstimate:
    return v.MemoryEstimate(
        quantization=quantization_from_pb(message.quantization),
        dtype=message.dtype,
        weight_bytes=message.weight_bytes,
        overhead_bytes=message.overhead_bytes,
        runtime_bytes=message.runtime_bytes,
        workload_bytes=message.workload_bytes,
        total_bytes=message.total_bytes,
        measured=message.measured,
        fits_on=tuple(message.fits_on),
        placements=tuple(
            v.Placement(
                node_id=each.node_id,
                device_id=each.device_id,
                fit=state_of(pb.Fit, "FIT_", each.fit, v.Fit),
                required_bytes=each.required_bytes,
                evicted_model_ids=tuple(each.evicted_model_ids),
                max_batch_size=each.max_batch_size,
            )
            for each in message.placements
        ),
    )
