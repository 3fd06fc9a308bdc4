import asyncio

import pytest

from fix_runner import documents
from headrace_extractor.extractions.values import ExtractionState

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_lease_of_what_had_died_is_given_back_at_once(start_extractor):
    """A registry that was away grants a residency as RESIDENT, and only then gets the report of its failure."""
    extractor = await start_extractor()
    extractor.add_corpus(documents(50))
    await extractor.read(await extractor.extract())
    registry, (stale,) = extractor.registry, extractor.registry.assigned.values()
    await extractor.runners[-1].kill()
    await extractor.until(lambda: not registry.assigned)
    granted = asyncio.Event()
    acquire = registry.acquire_lease

    async def acquire_stale_once(model_id, *, holder, wait_s):
        if not granted.is_set():
            registry.assigned[stale.residency_id] = stale
        async for event in acquire(model_id, holder=holder, wait_s=wait_s):
            if not granted.is_set():
                granted.set()
                del registry.assigned[stale.residency_id]
                asyncio.get_running_loop().call_later(0.3, registry._notify)
            yield event

    registry.acquire_lease = acquire_stale_once
    extractor.add_corpus(documents(50, seed=1))
    job = await extractor.extract()

    async with asyncio.timeout(50):  # Less than RUNNER_WAIT_S: the job must not wait for that deadline.
        await extractor.until(lambda: job.value.state.ended, deadline_s=50)

    assert granted.is_set()
    assert job.value.state == ExtractionState.DONE
