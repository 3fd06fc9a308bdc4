import asyncio
from contextlib import aclosing

import pytest

from fix_runner import documents
from headrace_extractor.errors import RegistryUnavailable
from headrace_extractor.reading import row_stream
from headrace_extractor.reading.row_stream import Pause, RowStream, StreamRequest

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_reader_hears_of_a_server_whose_changes_bring_no_row(start_extractor, monkeypatch):
    """Loading reports every half second; silence to a reader all the same."""
    monkeypatch.setattr(row_stream, "HEARTBEAT_S", 0.2)
    extractor = await start_extractor()
    extractor.add_corpus(documents(5))
    await extractor.until(extractor.node.registered.is_set)
    job = await extractor.extract()
    extractor.registry.unavailable = RegistryUnavailable("away")
    stream = RowStream(job, StreamRequest())

    async def change_often():
        while True:
            job.update()
            await asyncio.sleep(0.02)

    changing = asyncio.create_task(change_often())
    try:
        async with asyncio.timeout(20), aclosing(stream.events()) as events:
            pauses = [await anext(events) for _ in range(3)]
    finally:
        changing.cancel()
        stream.close()

    assert all(isinstance(pause, Pause) for pause in pauses)
