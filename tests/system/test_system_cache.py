"""Sets under a quota in the whole of Headrace: evicted, pinned, deleted, with nothing left behind."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fix_system import FAST, HOOKPOINT, MODEL, PATIENCE_S, eventually, read, texts
from headrace_client import errors
from headrace_client.values import ExtractionState, Window

pytestmark = pytest.mark.timeout(240)

QUOTA_BYTES = 5_000_000  # Three sets of these documents, of about 1.4 MB each.
DOCUMENTS = [texts(300, seed=seed, longest=12) for seed in range(4)]


@pytest.fixture(scope="module")
def cache(start_system, text_llama):
    """A pair with a small quota."""
    started = start_system(
        models_root=text_llama.parent,
        extractor=("--sets-quota-bytes", str(QUOTA_BYTES), "--disk-reserve-bytes", "0"),
    )
    started.add_model(MODEL, text_llama)
    for number, documents in enumerate(DOCUMENTS):
        started.client.corpora.upload(f"corpus-{number}", documents=documents)
    started.client.corpora.upload("long", documents=texts(20_000, seed=9))
    return started


@pytest.fixture
def client(cache):
    """A client; no set exists and none is pinned."""
    client = cache.client

    def cleared():
        for one in client.sets.list():
            for pin in one.pins:
                client.sets.unpin(one.id, pin.owner)
            with suppress(errors.StateConflict, errors.SetNotFound):
                client.sets.delete(one.id)
        return not folders(cache)

    eventually(cleared, "all sets are gone")
    eventually(lambda: not list(client.sets.list()), "and off the list")
    return client


def folders(system):
    return {path.name for path in (system.data_dir / "activations").iterdir() if not path.name.startswith(".")}


def extract(system, number):
    started = system.client.extractions.start(MODEL, f"corpus-{number}", HOOKPOINT, recipe=FAST)
    return system.client.extractions.wait(started.id, deadline_s=PATIENCE_S)


def listed(client):
    return {one.id: one for one in client.sets.list()}


def holders(client, extraction):
    return [holder for one in client.sets.list() if one.id == extraction.set_id for holder in one.holders]


def is_listed(client, extraction):
    return extraction.set_id in listed(client)


def test_a_new_set_takes_the_place_of_the_one_used_least_recently(cache, client):
    first, second, third = [extract(cache, number) for number in range(3)]
    digests = read(client, first)
    estimate = client.extractions.estimate(MODEL, "corpus-3", HOOKPOINT, recipe=FAST)
    eventually(lambda: {first.set_id, second.set_id, third.set_id} <= set(listed(client)), "all are listed")

    fourth = extract(cache, 3)

    assert folders(cache) == {first.set_id, third.set_id, fourth.set_id}
    assert estimate.new_bytes > 1_000_000
    assert estimate.available_bytes > QUOTA_BYTES - 100_000  # Every set may be evicted.
    eventually(lambda: second.set_id not in listed(client), "the list knows")
    with pytest.raises(errors.SetNotFound, match="StartExtraction"):
        read(client, second)
    again = extract(cache, 1)
    assert again.set_id == second.set_id
    assert again.n_rows_computed == again.n_rows == second.n_rows
    assert read(client, second) == read(client, again)
    assert read(client, first) == digests or first.set_id not in folders(cache)


def test_a_pin_keeps_the_least_recently_used_until_it_ends(cache, client):
    pinned, idle, _ = [extract(cache, number) for number in range(3)]
    eventually(lambda: pinned.set_id in listed(client), "it is listed")
    client.sets.pin(pinned.set_id, "ann", reason="for the paper", expire_time=datetime.now(UTC) + timedelta(hours=1))

    extract(cache, 3)

    assert pinned.set_id in folders(cache)
    assert idle.set_id not in folders(cache)
    assert [pin.owner for pin in client.sets.get(pinned.set_id)[0].pins] == ["ann"]
    with pytest.raises(errors.StateConflict, match="ann"):
        client.sets.delete(pinned.set_id)


def test_what_does_not_fit_beside_pins_is_refused_with_figures(cache, client):
    made = [extract(cache, number) for number in range(3)]
    eventually(lambda: {one.set_id for one in made} <= set(listed(client)), "all are listed")
    for one in made:
        client.sets.pin(one.set_id, "ann")

    with pytest.raises(errors.DiskFull, match="unpin") as caught:
        extract(cache, 3)

    assert int(caught.value.metadata["required_bytes"]) > int(caught.value.metadata["free_bytes"])
    assert folders(cache) >= {one.set_id for one in made}
    client.sets.unpin(made[0].set_id, "ann")
    retried = eventually(lambda: retry(cache), "it fits once a pin has ended")
    assert retried.state is ExtractionState.DONE


def retry(cache):
    with suppress(errors.DiskFull):
        return extract(cache, 3)
    return None


def test_a_set_that_is_used_is_not_deleted_before_that_has_ended(cache, client):
    window = Window(window_bytes=1024 * 1024, reader_grace_s=PATIENCE_S)
    before = client.extractions.start(MODEL, "long", HOOKPOINT, recipe=FAST, retention=window)
    eventually(lambda: client.extractions.get(before.id).state is ExtractionState.WAITING, "the runner is taken")
    extraction = client.extractions.start(MODEL, "corpus-0", HOOKPOINT, recipe=FAST)
    eventually(lambda: holders(client, extraction), "who uses it is known")
    with pytest.raises(errors.StateConflict, match=extraction.id):
        client.sets.delete(extraction.set_id)
    client.extractions.cancel(before.id)
    client.extractions.wait(extraction.id, deadline_s=PATIENCE_S)
    eventually(lambda: is_listed(client, extraction) and not holders(client, extraction), "nobody uses it")

    client.sets.delete(extraction.set_id)

    eventually(lambda: extraction.set_id not in folders(cache), "it is gone")
    eventually(lambda: not is_listed(client, extraction), "and off the list")


@pytest.mark.fault
def test_a_node_killed_again_and_again_while_it_evicts_leaves_no_file_and_keeps_its_quota(cache, client):
    sizes, stop = [], threading.Event()
    watching = threading.Thread(target=watch_size, args=(cache, sizes, stop))
    watching.start()
    for number in range(6):
        started = client.extractions.start(MODEL, f"corpus-{number % 4}", HOOKPOINT, recipe=FAST)
        time.sleep(0.05 * number)
        cache.kill_extractor()
        cache.extractor.start()
        assert client.extractions.wait(started.id, deadline_s=PATIENCE_S).state is ExtractionState.DONE
    stop.set()
    watching.join(10)

    trash = cache.data_dir / "activations" / ".trash"
    assert not trash.exists() or not list(trash.iterdir())
    assert max(sizes) <= QUOTA_BYTES
    eventually(lambda: set(listed(client)) == folders(cache), "the list says what is there")


def watch_size(system, sizes, stop):
    while not stop.wait(0.05):
        total = 0
        for path in Path(system.data_dir / "activations").rglob("*.safetensors"):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        sizes.append(total)
