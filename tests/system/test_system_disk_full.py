"""A full disk: typed errors, no row lost, and the same request completes once there is room."""

from __future__ import annotations

import contextlib
import os
import subprocess

import pytest

from fix_system import FAST, MODEL, PATIENCE_S, At, Digest, columns_of, eventually, read, texts
from headrace_client import errors
from headrace_client.values import ExtractionState, Recipe

pytestmark = pytest.mark.timeout(240)

MIB = 1024 * 1024
# All sites of all layers: rows of 2 KiB, so that a few passes fill a segment.
HOOKPOINTS = [
    f"blocks.{layer}.{site}"
    for layer in range(4)
    for site in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
]
DISK_BYTES = 170 * MIB  # Two segments of 64 MiB, and some more.
RECIPE = Recipe(context_size=128, batch_size=16)
DOCUMENTS = texts(1100, seed=6, longest=12)  # More rows than one segment holds.


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=755", "headrace-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("a disk of a known size needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def cramped(start_system, text_llama, small_disk):
    """A pair with the extractor's data on the small disk."""
    system = start_system(models_root=text_llama.parent, extractor=("--data-dir", str(small_disk / "data")))
    system.add_model(MODEL, text_llama)
    yield system
    system.stop()  # Before its disk is unmounted.


@pytest.fixture
def hog(small_disk):
    """Takes all free space of the disk, and gives it back."""
    path = small_disk / "hog"

    class Hog:
        def take_all(self):
            with path.open("wb") as file, contextlib.suppress(OSError):
                for size in (MIB, 4096, 1):
                    with contextlib.suppress(OSError):
                        while True:
                            os.write(file.fileno(), b"x" * size)

        def give_back(self):
            path.unlink(missing_ok=True)

    yield Hog()
    path.unlink(missing_ok=True)


def test_rows_before_a_full_disk_stay_and_the_same_request_completes_when_there_is_room(cramped, hog):
    corpus = cramped.variant(DOCUMENTS)
    extraction = cramped.client.extractions.start(MODEL, corpus, HOOKPOINTS, recipe=RECIPE)
    received = Digest()

    with (
        pytest.raises(errors.DiskFull) as caught,
        cramped.client.chunks(extraction, columns_of(extraction)) as stream,
    ):
        fill = At(1, hog.take_all)  # Within the first segment: its blocks are reserved already.
        for chunk in stream:
            received.add(chunk)
            fill(received.n_rows)

    assert int(caught.value.metadata["free_bytes"]) < int(caught.value.metadata["required_bytes"])
    failed = cramped.client.extractions.get(extraction.id)
    assert (failed.state, failed.failure.reason) == (ExtractionState.FAILED, "DISK_FULL")
    assert failed.n_rows >= received.n_rows > 0
    again = read_up_to(cramped.client, extraction, received.n_rows)
    assert again.value == received.value
    hog.give_back()
    hog.take_all()  # Also the space that the open segments gave back.
    with pytest.raises(errors.DiskFull):
        cramped.client.corpora.upload("one-more", documents=texts(20_000))
    assert cramped.extractor.running

    hog.give_back()
    retried = cramped.client.extractions.start(MODEL, corpus, HOOKPOINTS, recipe=RECIPE)
    done = cramped.client.extractions.wait(retried.id, deadline_s=PATIENCE_S)

    assert done.set_id == extraction.set_id
    assert done.n_rows_computed <= done.n_rows - failed.n_rows  # Rows that existed were not computed again.
    assert read_up_to(cramped.client, retried, received.n_rows).value == received.value
    assert int(read(cramped.client, retried)["n_rows"]) == done.n_rows > received.n_rows


def read_up_to(client, extraction, end_row):
    digest = Digest()
    with client.chunks(extraction, columns_of(extraction), end_row=end_row) as stream:
        for chunk in stream:
            digest.add(chunk)
    return digest


def test_a_request_on_a_full_disk_is_a_typed_error_and_works_afterwards(cramped, hog):
    corpus = cramped.variant(texts(20, seed=7))
    hog.take_all()

    with pytest.raises(errors.DiskFull):
        extraction = cramped.client.extractions.start(MODEL, corpus, HOOKPOINTS, recipe=FAST)
        cramped.client.extractions.wait(extraction.id, deadline_s=PATIENCE_S)
    assert cramped.client.corpora.get(corpus).n_documents > 0

    hog.give_back()
    extraction = cramped.client.extractions.start(MODEL, corpus, HOOKPOINTS, recipe=FAST)
    assert cramped.client.extractions.wait(extraction.id, deadline_s=PATIENCE_S).n_rows > 20
    eventually(lambda: all(r.n_leases == 0 for r in cramped.client.residencies.list()), "no lease is held")
