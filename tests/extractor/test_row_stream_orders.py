"""Rows in the order asked for: shuffled, in shards, resumed anywhere; and ranges of them for clients that map."""

import asyncio
from contextlib import aclosing
from itertools import pairwise

import pytest
import pytest_asyncio

from fix_runner import documents
from headrace_extractor.errors import (
    DigestMismatch,
    ExtractionCancelled,
    FieldInvalid,
    RowsExpired,
    RowTooLarge,
    TooManyStreams,
)
from headrace_extractor.extractions.values import ExtractionState
from headrace_extractor.reading import row_stream
from headrace_extractor.reading.reading_order import OrderRequest, ReadOrder
from headrace_extractor.reading.row_stream import End, Pause, RowStream, StreamRequest
from headrace_extractor.sets import activation_set
from headrace_extractor.sets.activation_sets import ActivationSets
from headrace_extractor.sets.spec import Retention
from headrace_log import reader, retention
from headrace_log.errors import DiskFull, SetCorrupt, TooManyFiles
from headrace_log.index import SegmentIndex
from headrace_log.layout import segment_path
from headrace_log.order import Shard, Shuffled
from headrace_log.reader import SetReader

pytestmark = pytest.mark.asyncio(loop_scope="module")

SHUFFLED = ReadOrder.SHUFFLED
WINDOW = Retention(kind="window", window_bytes=1024 * 1024, reader_grace_s=30.0)
BLOCK = 64


async def read(job, *, order=None, **request):
    """Rows as (document, position) in the order they came, places of the runs, and the end."""
    stream = RowStream(job, StreamRequest(columns=("document", "position"), order=order or OrderRequest(), **request))
    rows, places = [], []
    mapped = SetReader(job.folder, ("document", "position"))
    try:
        async with asyncio.timeout(30), aclosing(stream.events()) as events:
            async for event in events:
                if isinstance(event, End):
                    return rows, places, event
                if isinstance(event, Pause):
                    continue
                places.append(stream.next_row)
                run = event if event.columns else mapped.read(event.first_row, event.n_rows, end_row=event.end_row)
                assert run.n_rows == event.n_rows
                rows += zip(*(view.cast("B").cast("i") for view in run.columns), strict=True)
    finally:
        mapped.close()
        stream.close()


@pytest.fixture(scope="module")
def asked():
    def ask(**changes):
        return OrderRequest(**({"order": SHUFFLED, "seed": 5, "block_rows": BLOCK} | changes))

    return ask


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def done(extractor):
    """A finished extraction, and its rows in sequence."""
    extractor.add_corpus(documents(300, seed=71))
    job = await extractor.extract()
    rows, _, end = await read(job)
    assert len(rows) == len(set(rows)) == end.n_rows
    assert end.n_rows % BLOCK
    return job, rows


@pytest.mark.parametrize("chunk_bytes", [100, 0])
async def test_shuffled_rows_are_those_of_the_order(done, asked, chunk_bytes):
    job, rows = done
    order = Shuffled(n_rows=len(rows), block_rows=BLOCK, seed=5, epoch=2, shard=Shard(0, 1))

    got, places, end = await read(job, order=asked(epoch=2), chunk_bytes=chunk_bytes)

    assert got == [rows[order.stretch(place).row] for place in range(len(rows))]
    assert sorted(got) == sorted(rows)
    assert end.next_row == len(rows)
    assert places == sorted(set(places))


async def test_blocks_come_in_even_chunks(done, asked, monkeypatch):
    job, rows = done
    monkeypatch.setattr(row_stream, "DEFAULT_CHUNK_BYTES", 8 * 20)  # Document and position of 20 rows.
    order = asked()
    _, places, _ = await read(job, order=order)
    _, places_as_asked, _ = await read(job, order=order, chunk_bytes=8 * 20)

    n_whole = len(rows) // BLOCK * BLOCK
    sizes, sizes_as_asked = ([b - a for a, b in pairwise(found)] for found in (places, places_as_asked))
    assert set(sizes) - {(len(rows) - n_whole) % 22} <= {22, 20}
    assert max(sizes_as_asked) == 20


async def test_shuffled_goes_on_at_any_place(done, asked):
    job, _ = done
    whole, _, _ = await read(job, order=asked())

    for start, stop in ((0, 1), (BLOCK - 1, 3 * BLOCK + 5), (len(whole) - 70, 0), (len(whole), 0)):
        got, _, end = await read(job, order=asked(), start_row=start, end_row=stop)
        assert got == whole[start : stop or None]
        assert end.next_row == (stop or len(whole))
    # Not "gone": it was never there.
    with pytest.raises(RowsExpired, match=f"no row {len(whole) + 1}: the last one is {len(whole) - 1}"):
        await read(job, order=asked(), start_row=len(whole) + 1)


@pytest.mark.parametrize("order", list(ReadOrder))
async def test_shards_share_the_whole_blocks_equally(done, asked, order):
    job, rows = done
    count = 3

    got = [(await read(job, order=asked(order=order, shard_index=i, shard_count=count)))[0] for i in range(count)]

    each = len(rows) // BLOCK // count * BLOCK
    assert [len(shard) for shard in got] == [each] * count
    assert len({row for shard in got for row in shard}) == each * count
    if order is ReadOrder.SEQUENTIAL:
        assert got[1][:BLOCK] == rows[BLOCK : 2 * BLOCK]
        assert got[0][BLOCK : 2 * BLOCK] == rows[count * BLOCK : (count + 1) * BLOCK]


async def test_shards_of_a_running_extraction_are_those_of_a_finished_one(extractor, asked):
    extractor.add_corpus(documents(300, seed=72))
    job = await extractor.extract()
    asked = [asked(order=ReadOrder.SEQUENTIAL, shard_index=i, shard_count=2) for i in range(2)]

    live = await asyncio.gather(*(read(job, order=one, chunk_bytes=2000) for one in asked))

    assert job.value.state == ExtractionState.DONE
    after = [await read(job, order=one) for one in asked]
    assert [rows for rows, _, _ in live] == [rows for rows, _, _ in after]


async def test_shuffled_waits_for_all_rows_and_says_so(extractor, asked):
    extractor.add_corpus(documents(300, seed=73))
    job = await extractor.extract()
    stream = RowStream(job, StreamRequest(order=asked()))
    seen = []
    try:
        async with asyncio.timeout(30), aclosing(stream.events()) as events:
            seen += [(type(event), job.value.state) async for event in events]
    finally:
        stream.close()

    assert seen[0][0] is Pause
    assert {state for kind, state in seen if kind is not Pause} == {ExtractionState.DONE}


async def test_a_reader_that_caught_up_is_told_at_once(extractor):
    extractor.add_corpus(documents(40, seed=74))
    job = await extractor.extract()
    stream = RowStream(job, StreamRequest(start_row=1_000_000))
    try:
        async with asyncio.timeout(5), aclosing(stream.events()) as events:
            assert isinstance(await anext(events), Pause)
    finally:
        stream.close()


async def test_too_few_rows_for_all_shards_is_refused(done, asked):
    job, rows = done

    with pytest.raises(FieldInvalid, match="smaller blocks") as caught:
        await read(job, order=asked(block_rows=len(rows), shard_count=2))

    assert caught.value.field == "block_rows"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"order": SHUFFLED}, "order"),
        ({"order": ReadOrder.SEQUENTIAL, "epoch": 1}, "epoch"),
        ({"order": ReadOrder.SEQUENTIAL, "shard_count": 50, "block_rows": 1000}, "block_rows"),
    ],
)
async def test_a_window_is_read_once_and_in_sequence(extractor, asked, changes, field):
    extractor.add_corpus(documents(300, seed=75))
    job = await extractor.extract(retention=WINDOW)

    with pytest.raises(FieldInvalid) as caught:
        await read(job, order=asked(**changes))

    assert caught.value.field == field
    assert ("RETAIN" in str(caught.value)) == (field != "block_rows")
    await job.cancel()


async def test_shards_of_a_window_let_it_move(extractor, asked):
    extractor.add_corpus(documents(200, seed=76))
    hookpoints = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(4))
    whole = await extractor.extract(hookpoints=hookpoints)
    rows, _, _ = await read(whole)
    extractor.add_corpus([*documents(200, seed=76), []])  # Another digest, the same rows: nothing of it is cached.
    job = await extractor.extract(hookpoints=hookpoints, retention=WINDOW)
    shards = [asked(order=ReadOrder.SEQUENTIAL, shard_index=i, shard_count=2) for i in range(2)]

    got = await asyncio.gather(*(read(job, order=one, chunk_bytes=20_000) for one in shards))

    n_rounds = len(rows) // (2 * BLOCK)
    assert len(rows) * 524 > 2 * WINDOW.window_bytes, "the window must have moved"
    for index, (mine, _, _) in enumerate(got):
        blocks = [rows[(r * 2 + index) * BLOCK : (r * 2 + index + 1) * BLOCK] for r in range(n_rounds)]
        assert mine == [row for block in blocks for row in block]


@pytest.mark.parametrize(
    ("field", "value"),
    [("shard_index", 2), ("shard_count", -1), ("block_rows", -1), ("epoch", -1), ("shard_index", -1)],
)
async def test_orders_out_of_range_are_refused(field, value):
    with pytest.raises(FieldInvalid) as caught:
        OrderRequest(**({"shard_count": 2} | {field: value}))

    assert caught.value.field == field


async def test_ranges_of_sealed_rows_have_no_columns_and_the_same_rows(done, asked):
    job, rows = done

    plain, places, _ = await read(job, mapped=True)
    shuffled, _, _ = await read(job, mapped=True, order=asked())

    assert plain == rows
    assert places == [0], "one range is one message"
    assert shuffled == (await read(job, order=asked()))[0]


async def test_rows_of_the_open_segment_come_inline_to_a_client_that_maps(extractor):
    extractor.add_corpus(documents(300, seed=77))
    job = await extractor.extract()
    stream = RowStream(job, StreamRequest(mapped=True, chunk_bytes=4000))
    kinds = []  # Whether rows come inline, and whether they are of sealed segments.
    try:
        async with asyncio.timeout(30), aclosing(stream.events()) as events:
            async for event in events:
                if not isinstance(event, Pause | End):
                    sealed_rows = SegmentIndex.load(job.folder).n_rows(job.columns)
                    kinds.append((bool(event.columns), event.first_row + event.n_rows <= sealed_rows))
    finally:
        stream.close()

    assert (True, False) in kinds
    assert (False, False) not in kinds


@pytest.mark.parametrize("mapped", [True, False])
async def test_rows_sealed_since_the_reader_looked_are_compared_before_they_are_sent(extractor, mapped):
    extractor.add_corpus(documents(300, seed=172 + mapped))
    job = await extractor.extract()
    stream = RowStream(job, StreamRequest(columns=("document",), mapped=mapped))
    await extractor.until(lambda: job.value.state is ExtractionState.DONE)
    path = segment_path(job.folder, job.set.manifest().column("document"), 0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    try:
        with pytest.raises(DigestMismatch, match="recorded was"):
            async with asyncio.timeout(30), aclosing(stream.events()) as events:
                await anext(events)
    finally:
        stream.close()


@pytest.fixture
def failing_reads(monkeypatch):
    """Fails reads of rows for as long as there are errors in this list."""
    errors, read_into = [], reader.SegmentFile.read_into

    def fail(*arguments):
        if errors:
            raise errors.pop()
        read_into(*arguments)

    monkeypatch.setattr(reader.SegmentFile, "read_into", fail)
    return errors


async def test_rows_of_files_that_can_be_read_at_the_second_look_are_sent(done, failing_reads):
    job, rows = done
    failing_reads.append(SetCorrupt("Input/output error"))

    assert (await read(job))[0] == rows


async def test_rows_that_can_not_be_read_at_the_second_look_either_are_damaged(done, failing_reads):
    job, _ = done
    failing_reads += [SetCorrupt("Input/output error")] * 2

    with pytest.raises(DigestMismatch, match="Input/output error"):
        await read(job)


async def test_a_mapped_reader_of_a_window_must_release_by_itself(extractor):
    extractor.add_corpus(documents(300, seed=78))
    job = await extractor.extract(retention=WINDOW)

    with pytest.raises(FieldInvalid) as caught:
        RowStream(job, StreamRequest(mapped=True))

    assert caught.value.field == "explicit_release"
    await job.cancel()


async def test_a_folder_has_one_nonce_for_a_server_and_another_for_the_next(tmp_path):
    path = tmp_path / ("1" * 32) / "nonce"
    path.parent.mkdir()

    def server_sees():
        return ActivationSets(tmp_path).retained("1" * 32)

    one = server_sees()
    first = one.nonce()

    assert first == one.nonce() == path.read_text()
    assert path.stat().st_mode & 0o777 == 0o644
    assert server_sees().nonce() != first
    path.unlink()
    assert one.nonce() == path.read_text()


async def test_rows_of_a_folder_that_takes_no_nonce_are_sent_inline(extractor, monkeypatch):
    extractor.add_corpus(documents(20, seed=78))
    job = await extractor.extract()
    await extractor.read(job)

    def full(folder, content):
        raise DiskFull(folder, required_bytes=32, free_bytes=0)

    monkeypatch.setattr(activation_set, "write_atomically", full)
    stream = RowStream(job, StreamRequest(mapped=True))
    monkeypatch.undo()
    try:
        async for event in stream.events():
            assert isinstance(event, End) or event.columns
    finally:
        stream.close()

    assert stream.nonce == ""


async def test_a_set_that_is_gone_is_the_failure_of_its_extraction(extractor):
    extractor.add_corpus(documents(300, seed=79))
    job = await extractor.extract(retention=WINDOW)
    await extractor.until(lambda: job.value.n_rows > 0)
    await job.cancel()
    await extractor.until(lambda: job.value.state.ended)
    retention.delete_set(job.folder)

    with pytest.raises(ExtractionCancelled):
        RowStream(job, StreamRequest(start_row=job.value.n_rows))


@pytest.mark.parametrize("at", ["SegmentFile", "dropped_rows"])
async def test_a_stream_of_a_server_without_a_descriptor_left_is_one_too_many(done, asked, monkeypatch, at):
    job, _ = done

    def fail(*args, **kwargs):
        raise TooManyFiles(max_files=1024)

    monkeypatch.setattr(reader, at, fail)

    with pytest.raises(TooManyStreams) as caught:
        await read(job, order=asked())

    assert "ulimit -n" in caught.value.message
    assert caught.value.metadata == {"max_files": "1024"}
    monkeypatch.undo()
    assert (await read(job, order=asked()))[0]


# -- rows wider than a message -----------------------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch):
    """Messages that hold a row of 8 bytes, and none of a hookpoint; the small ones not even that."""
    monkeypatch.setattr(row_stream, "MAX_MESSAGE_BYTES", 1250)
    monkeypatch.setattr(row_stream, "MAX_SMALL_MESSAGE_BYTES", 1180)


@pytest.mark.parametrize("large", [False, True])
async def test_a_row_wider_than_a_message_is_refused_when_the_stream_is_opened(done, narrow, large):
    job, _ = done

    with pytest.raises(RowTooLarge, match="fewer columns") as refused:
        RowStream(job, StreamRequest(allow_large_chunks=large))

    width = sum(column.row_bytes for column in job.set.manifest().columns if column.name in job.columns)
    assert refused.value.metadata == {"row_bytes": str(width), "limit_bytes": "1250" if large else "1180"}
    assert job.reader_names == []


async def test_a_row_for_a_larger_message_names_the_flag(done, narrow):
    job, _ = done
    columns = ("document", "position")

    with pytest.raises(RowTooLarge, match="set allow_large_chunks"):
        RowStream(job, StreamRequest(columns=columns))

    assert (await read(job, allow_large_chunks=True))[0]


async def test_wide_rows_are_mapped(done, narrow):
    job, _ = done
    stream = RowStream(job, StreamRequest(mapped=True))
    n_rows = 0
    try:
        async with asyncio.timeout(30), aclosing(stream.events()) as events:
            async for event in events:
                if not isinstance(event, End | Pause):
                    assert not event.columns
                    n_rows += event.n_rows
    finally:
        stream.close()

    assert n_rows == job.value.n_rows
