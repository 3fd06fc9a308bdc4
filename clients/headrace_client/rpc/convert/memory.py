"""Estimates and the catalog: messages to values."""

from __future__ import annotations

from headrace.registry.v1 import model_pb2 as model_pb
from headrace.registry.v1 import model_service_pb2 as pb
from headrace_client import values as m
from headrace_client.values import Quantization


def advice_from_pb(message: pb.EstimateMemoryResponse) -> m.MemoryAdvice:
    """Reads the answer of EstimateMemory."""
    estimates = tuple(_estimate_from_pb(each) for each in message.estimates)
    known = 0 <= message.recommended < len(estimates)
    return m.MemoryAdvice(estimates=estimates, recommended=estimates[message.recommended] if known else None)


def catalog_entry_from_pb(message: pb.CatalogEntry) -> m.CatalogEntry:
    """Reads an entry of the catalog."""
    return m.CatalogEntry(
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
            m.CatalogMemory(
                quantization=_quantization(each.quantization), dtype=each.dtype, total_bytes=each.total_bytes
            )
            for each in message.memory
        ),
        batches=tuple(
            m.CatalogBatch(
                memory_bytes=each.memory_bytes,
                batch_size=each.batch_size,
                quantization=_quantization(each.quantization),
            )
            for each in message.batches
        ),
    )


def _estimate_from_pb(message: pb.MemoryEstimate) -> m.MemoryEstimate:
    return m.MemoryEstimate(
        quantization=_quantization(message.quantization),
        dtype=message.dtype,
        weight_bytes=message.weight_bytes,
        overhead_bytes=message.overhead_bytes,
        runtime_bytes=message.runtime_bytes,
        workload_bytes=message.workload_bytes,
        total_bytes=message.total_bytes,
        measured=message.measured,
        fits_on=tuple(message.fits_on),
        placements=tuple(_placement_from_pb(each) for each in message.placements),
    )


def _placement_from_pb(message: pb.Placement) -> m.Placement:
    return m.Placement(
        node_id=message.node_id,
        device_id=message.device_id,
        fit=_fit(message.fit),
        required_bytes=message.required_bytes,
        evicted_model_ids=tuple(message.evicted_model_ids),
        max_batch_size=message.max_batch_size,
    )


def _fit(number: int) -> m.Fit:
    names = pb.Fit.DESCRIPTOR.values_by_number
    name = names[number].name.removeprefix("FIT_") if number in names else ""
    return m.Fit(name) if name in m.Fit.__members__ else m.Fit.UNKNOWN


def _quantization(number: int) -> Quantization:
    names = model_pb.Quantization.DESCRIPTOR.values_by_number
    name = names[number].name.removeprefix("QUANTIZATION_") if number in names else ""
    return Quantization[name] if name in Quantization.__members__ else Quantization.NONE
