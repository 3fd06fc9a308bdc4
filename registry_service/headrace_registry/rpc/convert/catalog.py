"""ListCatalog and ListLoadOptions: what this version of the registry knows by itself, as messages."""

from __future__ import annotations

from headrace.registry.v1 import model_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace_models.load_options import OPTIONS
from headrace_registry.errors import FieldInvalid
from headrace_registry.paging import page_from
from headrace_registry.sizing.catalog import CATALOG, Entry

_DEFAULT_PAGE = 50


def list_catalog(request: pb.ListCatalogRequest) -> pb.ListCatalogResponse:
    """Answers ListCatalog, without I/O."""
    if request.fits_bytes < 0:
        raise FieldInvalid("fits_bytes", "must not be negative; 0 means all")
    page = page_from(
        size=request.page_size,
        token=request.page_token,
        bound_to=("catalog", str(request.fits_bytes), request.category),
        default=_DEFAULT_PAGE,
        key_length=1,
    )
    entries, token = CATALOG.page(fits_bytes=request.fits_bytes, category=request.category, page=page)
    return pb.ListCatalogResponse(
        entries=[entry_to_pb(entry) for entry in entries],
        next_page_token=token,
        total_size=len(CATALOG.matching(fits_bytes=request.fits_bytes, category=request.category)),
    )


def list_load_options() -> pb.ListLoadOptionsResponse:
    """Answers ListLoadOptions, without I/O."""
    return pb.ListLoadOptionsResponse(
        options=[
            pb.LoadOption(
                name=name,
                values=option.values,
                default_value=option.default,
                about=option.about,
                changes_numbers=option.changes_numbers,
            )
            for name, option in sorted(OPTIONS.items(), key=lambda item: not item[1].changes_numbers)
        ]
    )


def entry_to_pb(entry: Entry) -> pb.CatalogEntry:
    """Total."""
    return pb.CatalogEntry(
        name=entry.name,
        repo_id=entry.repo_id,
        n_parameters=entry.n_parameters,
        context_window=entry.network.context_window,
        n_layers=entry.network.n_layers,
        probe_layers=entry.probe_layers,
        categories=entry.categories,
        model_type=entry.network.model_type,
        d_model=entry.network.d_model,
        memory=[
            pb.CatalogMemory(
                quantization=model_pb2.Quantization.Value(f"QUANTIZATION_{each.form.quantization}"),
                dtype=each.form.dtype,
                total_bytes=each.total_bytes,
            )
            for each in entry.memory
        ],
        batches=[
            pb.CatalogBatch(
                memory_bytes=each.memory_bytes,
                batch_size=each.batch_size,
                quantization=model_pb2.Quantization.Value(f"QUANTIZATION_{each.quantization}"),
            )
            for each in entry.batches
        ],
        gated=entry.gated,
    )
