"""A user's script, which mypy --strict checks against the installed client; it is never run."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import headrace
from headrace_client import (
    AsyncHeadraceClient,
    Extraction,
    HeadraceClient,
    HeadraceError,
    Listing,
    Model,
    Reading,
    Recipe,
    StreamTuning,
)
from headrace_client.errors import CapacityBusy, HookpointNotFound
from headrace_client.values import ExtractionEvent, ExtractionState, Residency


def rows() -> int:
    with headrace.connect() as client:
        models: Listing[Model] = client.models.list("state = READY")
        recipe = Recipe(context_size=128, storage_dtype="bfloat16", long_documents="truncate", window=(-1, 0))
        extraction = client.extractions.start(models[0].id, "docs", ["blocks.1.hook_resid_post"], recipe=recipe)
        done: Extraction = client.extractions.wait(extraction.id, progress=True)
        with client.chunks(done, reading=Reading(order="shuffled", seed=1), tuning=StreamTuning()) as chunks:
            return sum(chunk.n_rows for chunk in chunks)


def why(client: HeadraceClient, extraction_id: str) -> str:
    try:
        found = client.extractions.get(extraction_id)
    except HookpointNotFound as exc:
        return exc.nearest[0]
    except CapacityBusy as exc:
        return exc.metadata["holders"] if exc.retry_after_s is None else exc.remedy
    except HeadraceError as exc:
        return f"{exc.reason}: {exc.message} ({exc.request_id})"
    return "" if found.state is ExtractionState.DONE else found.state.value


def events(client: HeadraceClient) -> Iterator[ExtractionEvent]:
    return client.extractions.watch("x1", after_seq=3)


async def residents(client: AsyncHeadraceClient) -> list[Residency]:
    watched: AsyncIterator[ExtractionEvent] = client.extractions.watch("x1", deadline_s=5.0)
    async for event in watched:
        assert event.seq >= 0
    model: Model = await client.models.get("tiny")
    return await client.residencies.list(model=model.id)


async def main() -> None:
    async with headrace.connect_async("127.0.0.1:7470") as client:
        print(await residents(client), rows())  # noqa: T201


asyncio.run(main())
