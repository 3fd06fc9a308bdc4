"""The callers of the registry's benchmark: `python -m bench.registry_calls REGISTRY TOUCH DATABASE_URL MODEL_ID`.

Answers a question `{what, callers, calls, size}` with the seconds of every call. Both sides use generated stubs, and so
pay for the same client.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import psycopg
from psycopg.rows import dict_row

from bench.processes import answer, questions
from bench.registry_servers import METHOD
from headrace.registry.v1 import model_service_pb2 as models_pb
from headrace.registry.v1 import model_service_pb2_grpc as models_grpc
from headrace.registry.v1 import residency_service_pb2 as residency_pb
from headrace.registry.v1 import residency_service_pb2_grpc as residency_grpc

DEADLINE_S = 60.0
_PAGE = "SELECT * FROM models WHERE id > %(after)s ORDER BY id LIMIT %(limit)s"
Call = Callable[[], Awaitable[float]]


@dataclass
class Calls:
    """The timed calls; each returns its seconds."""

    model_id: str
    residencies: residency_grpc.ResidencyServiceAsyncStub
    models: models_grpc.ModelServiceAsyncStub
    touches: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
    database: psycopg.AsyncConnection[dict[str, Any]]
    pages: dict[int, list[tuple[str, str]]] = field(default_factory=dict)

    async def lease(self) -> float:
        """Acquires a lease on the resident model; the release is not timed."""
        request = residency_pb.AcquireLeaseRequest(model_id=self.model_id, holder="bench", ttl_s=60, wait_s=30)
        began = time.perf_counter()
        events = [event async for event in self.residencies.AcquireLease(request, timeout=DEADLINE_S)]
        seconds = time.perf_counter() - began
        lease = events[-1].granted.lease
        release = residency_pb.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence)
        await self.residencies.ReleaseLease(release, timeout=DEADLINE_S)
        return seconds

    async def touch(self) -> float:
        """Makes an empty call with a transaction of two statements; and again, untimed, in place of the release."""
        began = time.perf_counter()
        await self.touches(self.model_id.encode(), timeout=DEADLINE_S)
        seconds = time.perf_counter() - began
        await self.touches(self.model_id.encode(), timeout=DEADLINE_S)
        return seconds

    async def list_models(self, size: int, page: int) -> float:
        """Lists one page through the registry."""
        token, _ = (await self._pages(size))[page]
        began = time.perf_counter()
        request = models_pb.ListModelsRequest(page_size=size, page_token=token)
        found = await self.models.ListModels(request, timeout=DEADLINE_S)
        seconds = time.perf_counter() - began
        assert len(found.models) == size
        return seconds

    async def select(self, size: int, page: int) -> float:
        """Selects the same page through psycopg."""
        _, after = (await self._pages(size))[page]
        began = time.perf_counter()
        cursor = await self.database.execute(_PAGE, {"after": after, "limit": size + 1})
        rows = await cursor.fetchall()
        seconds = time.perf_counter() - began
        assert len(rows) >= size
        return seconds

    async def _pages(self, size: int) -> list[tuple[str, str]]:
        """Returns the page token, and the last id before the page, of the first, a middle and a late page."""
        if size not in self.pages:
            found, token, after, number = [], "", "", 0
            n_pages = 20_000 // size if size < 1000 else 90
            while number <= n_pages:
                if number in (0, n_pages // 2, n_pages):
                    found.append((token, after))
                answered = await self.models.ListModels(
                    models_pb.ListModelsRequest(page_size=size, page_token=token), timeout=DEADLINE_S
                )
                token, after, number = answered.next_page_token, answered.models[-1].id, number + 1
            self.pages[size] = found
        return self.pages[size]


async def ask(calls: Calls, question: dict[str, Any]) -> list[float]:
    """Answers a question: `callers` tasks at once make `calls` calls each."""
    size = int(question.get("size", 0))
    what: dict[str, Callable[[int], Awaitable[float]]] = {
        "lease": lambda _number: calls.lease(),
        "touch": lambda _number: calls.touch(),
        "list": lambda number: calls.list_models(size, number % 3),
        "select": lambda number: calls.select(size, number % 3),
    }
    call = what[question["what"]]

    async def caller() -> list[float]:
        return [await call(number) for number in range(int(question["calls"]))]

    found = await asyncio.gather(*(caller() for _ in range(int(question["callers"]))))
    return [seconds for series in found for seconds in series]


async def run(registry: str, touch: str, database_url: str, model_id: str) -> None:
    """Answers questions until standard input ends."""
    database = await psycopg.AsyncConnection.connect(database_url, autocommit=True, row_factory=dict_row)
    async with grpc.aio.insecure_channel(registry) as channel, grpc.aio.insecure_channel(touch) as bare, database:
        calls = Calls(
            model_id=model_id,
            residencies=residency_grpc.ResidencyServiceStub(channel),
            models=models_grpc.ModelServiceStub(channel),
            touches=bare.unary_unary(METHOD),
            database=database,
        )
        for question in questions():
            answer({"seconds": await ask(calls, question)})


if __name__ == "__main__":
    asyncio.run(run(*sys.argv[1:]))
