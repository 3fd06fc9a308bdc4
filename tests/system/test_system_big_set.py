"""A large set under a quota: written, read by three readers, evicted. Its size is in the environment variable
HEADRACE_BIG_SET_BYTES; 20 GB take some twenty minutes on two cores.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil
import pytest

from fix_system import MODEL, Digest, columns_of, eventually, texts
from headrace_client import StreamTuning
from headrace_client.values import Recipe

SET_BYTES = int(os.environ.get("HEADRACE_BIG_SET_BYTES", "300000000"))
DEADLINE_S = 120 + SET_BYTES / 2_000_000
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * DEADLINE_S)]

HOOKPOINTS = [
    f"blocks.{layer}.{site}"
    for layer in range(4)
    for site in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
]
ROW_BYTES = len(HOOKPOINTS) * 32 * 4 + 12
RECIPE = Recipe(context_size=128, batch_size=32)
QUOTA_BYTES = SET_BYTES * 5 // 4
# The server maps the rows it sends; its own memory holds only frames and the lists of segments.
GROWTH_BYTES = 100_000_000


@pytest.fixture(scope="module")
def big(start_system, text_llama):
    """A pair with a quota for sets of a quarter more than the large set."""
    started = start_system(models_root=text_llama.parent, extractor=("--sets-quota-bytes", str(QUOTA_BYTES)))
    started.add_model(MODEL, text_llama)
    return started


class Watch:
    """Samples the server's own memory and the size of the sets, until `stop`."""

    def __init__(self, system):
        self.own_bytes, self.set_bytes = [], []
        self._system = system
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self):
        self._stop.set()
        self._thread.join(10)

    def _run(self):
        server = psutil.Process(self._system.extractor.pid)
        while not self._stop.wait(0.5):
            self.own_bytes.append(server.memory_full_info().uss)
            self.set_bytes.append(size_of(self._system))


def size_of(system):
    """Bytes of sealed segments; an open segment has its full size before it has rows."""
    total = 0
    for path in (system.data_dir / "activations").rglob("*.safetensors"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def upload(system, name, n_bytes, seed):
    """Uploads documents that give about so many bytes of rows."""
    documents, n_rows = [], 0
    for document in texts(n_bytes // ROW_BYTES // 20 + 100, seed=seed, longest=12):
        documents.append(document)
        n_rows += len(document) + 1
        if n_rows * ROW_BYTES >= n_bytes:
            break
    system.client.corpora.upload(name, documents=documents)


def start(system, corpus):
    return system.client.extractions.start(MODEL, corpus, HOOKPOINTS, recipe=RECIPE)


def test_a_large_set_is_written_read_by_three_and_evicted(big):
    upload(big, "large", SET_BYTES, seed=1)
    upload(big, "another", SET_BYTES // 2, seed=2)
    watch = Watch(big)
    extraction = start(big, "large")
    digests = [Digest() for _ in range(3)]

    def read(digest, columns):
        tuning = StreamTuning(reconnect_deadline_s=DEADLINE_S, transport="inline")
        with big.connect().chunks(extraction, columns, tuning=tuning) as stream:
            for chunk in stream:
                digest.add(chunk)

    wanted = [columns_of(extraction), columns_of(extraction), HOOKPOINTS[5:6]]
    readers = [
        threading.Thread(target=read, args=(digest, columns)) for digest, columns in zip(digests, wanted, strict=True)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(DEADLINE_S)
    done = big.client.extractions.wait(extraction.id, deadline_s=DEADLINE_S)
    first_folder = Path(done.path)
    assert [digest.n_rows for digest in digests] == [done.n_rows] * 3
    assert digests[0].value == digests[1].value
    assert done.size_bytes > 0.8 * SET_BYTES

    another = big.client.extractions.wait(start(big, "another").id, deadline_s=DEADLINE_S)
    watch.stop()

    settled = watch.own_bytes[len(watch.own_bytes) // 10]
    assert max(watch.own_bytes) - settled < GROWTH_BYTES, f"{settled} grew to {max(watch.own_bytes)}"
    assert max(watch.set_bytes) <= QUOTA_BYTES
    assert not first_folder.exists()
    left = {path.name for path in first_folder.parent.iterdir()}
    assert left <= {another.set_id, ".trash", ".windows"}
    assert not list((first_folder.parent / ".trash").iterdir())
    eventually(lambda: {one.id for one in big.client.sets.list()} == {another.set_id}, "the list knows")
    print(  # noqa: T201 -- figures, shown with -s
        f"{done.size_bytes / 1e9:.2f} GB; "
        f"server's own memory {settled / 1e6:.0f} to {max(watch.own_bytes) / 1e6:.0f} MB; "
        f"sets at most {max(watch.set_bytes) / 1e9:.2f} of {QUOTA_BYTES / 1e9:.2f} GB"
    )
