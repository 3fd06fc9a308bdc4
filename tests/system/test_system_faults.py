"""kill -9 in the middle of a stream: every row once if the victim comes back, a typed error if it does not."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode

from fix_postgres import refusal_of
from fix_system import HOOKPOINT, MODEL, PATIENCE_S, SLOW, At, columns_of, eventually, read, texts
from headrace.registry.v1 import model_service_pb2, model_service_pb2_grpc
from headrace_client import StreamTuning, errors
from headrace_client.values import ExtractionState, Recipe, Retain, Window
from headrace_log.manifest import SEGMENT_BYTES
from headrace_registry.postgres.server.embedded import EmbeddedPostgres

pytestmark = pytest.mark.timeout(300)

DOCUMENTS = texts(1200, seed=1, longest=10)
# Smaller than the set: the forward pass stays close to its reader, and segments are sealed and dropped.
WINDOW = Window(window_bytes=1024 * 1024, reader_grace_s=PATIENCE_S)
# The client reads so little ahead that a slow consumer holds up the forward pass of a WINDOW set.
NARROW = {"queue_bytes": 64 * 1024, "chunk_bytes": 8 * 1024}
BOTH = pytest.mark.parametrize("retention", [Retain(), WINDOW], ids=["retain", "window"])
# A runner takes seconds to start: one retention is tested every day, the other by `make fault`.
RETAIN_FIRST = pytest.mark.parametrize(
    "retention", [Retain(), pytest.param(WINDOW, marks=pytest.mark.fault)], ids=["retain", "window"]
)
WINDOW_FIRST = pytest.mark.parametrize(
    "retention", [pytest.param(Retain(), marks=pytest.mark.fault), WINDOW], ids=["retain", "window"]
)
RUNNING = ExtractionState.RUNNING
# Rows of 2 KiB, so that a few passes fill a segment.
EVERYTHING = [
    f"blocks.{layer}.{site}"
    for layer in range(4)
    for site in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
]
N_ROUNDS = int(os.environ.get("HEADRACE_FAULT_ROUNDS", "8"))
FIRST_SEED = int(os.environ.get("HEADRACE_FAULT_SEED", "1"))


@pytest.fixture(scope="module")
def quiet(fragile):
    """The digests of an undisturbed run."""
    return read(fragile.client, start(fragile))


def start(system, retention=None, model=MODEL):
    return system.client.extractions.start(
        model, system.variant(DOCUMENTS), HOOKPOINT, recipe=SLOW, retention=retention or Retain()
    )


def in_the_middle(system, quiet, extraction, act, part=0.25):
    """Acts once, when `part` of the rows have arrived; asserts that the extraction still runs then."""

    def check_and_act():
        now = system.client.extractions.get(extraction.id)
        assert now.state in (ExtractionState.RUNNING, ExtractionState.WAITING)
        act()

    return At(int(int(quiet["n_rows"]) * part), check_and_act)


def all_is_well(system):
    """Asserts that a new extraction works from its lease to its last row."""
    extraction = system.client.extractions.start(MODEL, system.variant(texts(20)), HOOKPOINT, recipe=SLOW)
    assert system.client.extractions.wait(extraction.id, deadline_s=PATIENCE_S).n_rows > 0


# -- killed and back ---------------------------------------------------------------------------------------------------


@RETAIN_FIRST
def test_rows_come_once_although_the_runner_is_killed(fragile, quiet, retention):
    extraction = start(fragile, retention)
    killed = []

    def act():
        killed.extend(runner.pid for runner in fragile.runners())
        fragile.kill_runner()

    kill = in_the_middle(fragile, quiet, extraction, act)

    assert read(fragile.client, extraction, on_rows=kill, **NARROW) == quiet
    assert killed
    assert not set(killed) & {runner.pid for runner in fragile.runners()}


@pytest.mark.fault
def test_a_model_that_keeps_dying_is_left_alone_for_a_while_and_its_rows_come_once(start_system, text_llama, quiet):
    system = start_system(models_root=text_llama.parent)
    system.add_model(MODEL, text_llama)
    extraction = start(system, WINDOW)

    def crash():  # As a fault in a library does. A runner that is killed from outside is tried again at once.
        system.kill_runner(signal.SIGSEGV)

    kills = [At(int(int(quiet["n_rows"]) * part), crash) for part in (0.1, 0.3, 0.5, 0.7)]

    def on_rows(n_rows):
        for kill in kills:
            kill(n_rows)

    assert read(system.client, extraction, on_rows=on_rows, **NARROW) == quiet
    assert all(kill.done for kill in kills)
    assert "tried again in" in (system.folder / "headrace_extractor.log").read_text()


@WINDOW_FIRST
def test_rows_come_once_although_the_extractor_is_killed(fragile, quiet, supervisor, retention):
    extraction = start(fragile, retention)

    def act():
        fragile.kill_extractor()
        supervisor.later(1.0, fragile.extractor.start)

    kill = in_the_middle(fragile, quiet, extraction, act)

    assert read(fragile.client, extraction, on_rows=kill, **NARROW) == quiet
    assert kill.done


@pytest.mark.fault
def test_tensors_come_once_although_runner_and_extractor_are_killed(fragile, quiet, supervisor):
    extraction = start(fragile, WINDOW)

    def kill_extractor():
        fragile.kill_extractor()
        supervisor.later(0.5, fragile.extractor.start)

    n_rows = int(quiet["n_rows"])
    kills = [At(n_rows // 4, fragile.kill_runner), At(n_rows // 2, kill_extractor)]
    hashes = {name: hashlib.sha256() for name in columns_of(extraction)}
    with fragile.client.activations(
        extraction, columns=columns_of(extraction), batch_size=100, tuning=StreamTuning(**NARROW)
    ) as batches:
        for batch in batches:
            for name, tensor in batch.items():
                hashes[name].update(tensor.numpy())
            for kill in kills:
                kill(batches.next_row)
        assert batches.epoch == 1

    assert all(kill.done for kill in kills)
    assert {name: each.hexdigest() for name, each in hashes.items()} | {"n_rows": str(n_rows)} == quiet


@pytest.mark.fault
@BOTH
def test_rows_come_once_although_the_registry_is_killed(fragile, quiet, supervisor, retention):
    extraction = start(fragile, retention)

    def act():
        fragile.registry.kill()
        supervisor.later(1.5, fragile.registry.start)

    kill = in_the_middle(fragile, quiet, extraction, act)

    assert read(fragile.client, extraction, on_rows=kill, **NARROW) == quiet
    supervisor.join()
    all_is_well(fragile)


@pytest.mark.fault
@BOTH
def test_rows_come_once_although_the_postmaster_is_killed(fragile, quiet, retention):
    extraction = start(fragile, retention)
    killed = []

    def act():
        killed.append(fragile.postmaster().pid)
        fragile.kill_postmaster()

    kill = in_the_middle(fragile, quiet, extraction, act)

    assert read(fragile.client, extraction, on_rows=kill, **NARROW) == quiet
    eventually(fragile.postmaster, "Postgres is back")
    assert fragile.postmaster().pid not in killed
    all_is_well(fragile)


@pytest.mark.fault
@BOTH
def test_rows_come_once_although_the_registry_is_away_when_the_runner_dies(fragile, quiet, supervisor, retention):
    extraction = start(fragile, retention)

    def act():
        fragile.registry.kill()
        fragile.kill_runner()
        supervisor.later(3.0, fragile.registry.start)

    kill = in_the_middle(fragile, quiet, extraction, act)

    assert read(fragile.client, extraction, on_rows=kill, **NARROW) == quiet
    supervisor.join()
    all_is_well(fragile)


@pytest.mark.fault
@BOTH
def test_rows_come_once_although_everything_is_killed_at_once(fragile, quiet, supervisor, retention):
    extraction = start(fragile, retention)

    def act():
        fragile.kill_extractor()
        fragile.registry.kill()
        fragile.kill_postmaster()
        supervisor.later(0.5, fragile.extractor.start)  # Before the registry that it belongs to.
        supervisor.later(2.0, fragile.registry.start)

    kill = in_the_middle(fragile, quiet, extraction, act)

    assert read(fragile.client, extraction, on_rows=kill, **NARROW) == quiet
    supervisor.join()
    all_is_well(fragile)


@pytest.mark.fault
def test_an_extraction_that_waits_for_its_model_survives_the_registry(fragile, quiet, supervisor):
    fragile.client.residencies.unload(MODEL, force=True)
    eventually(lambda: not fragile.runners(), "the model is unloaded")
    extraction = start(fragile)
    eventually(
        lambda: fragile.client.extractions.get(extraction.id).state is ExtractionState.LOADING, "the model is loading"
    )

    fragile.registry.kill()
    supervisor.later(1.5, fragile.registry.start)

    assert read(fragile.client, extraction) == quiet
    supervisor.join()
    all_is_well(fragile)


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + N_ROUNDS))
def test_rows_come_once_whatever_is_killed(fragile, quiet, supervisor, seed):
    """Kills random victims at random rows, one after another or while another one is still down."""
    dice = random.Random(seed)
    extraction = start(fragile, dice.choice([Retain(), WINDOW]))
    plan = sorted((dice.uniform(0.0, 0.9), dice.choice(list(VICTIMS)), dice.uniform(0.2, 2.0)) for _ in range(3))
    kills = [
        At(int(int(quiet["n_rows"]) * part), lambda v=victim, p=pause: VICTIMS[v](fragile, supervisor, p))
        for part, victim, pause in plan
    ]

    def on_rows(n_rows):
        for kill in kills:
            kill(n_rows)

    assert read(fragile.client, extraction, on_rows=on_rows, **NARROW) == quiet, plan
    assert all(kill.done for kill in kills)
    supervisor.join()
    all_is_well(fragile)


def _runner(system, supervisor, pause_s):
    system.kill_runner()


def _extractor(system, supervisor, pause_s):
    if system.extractor.running:
        system.kill_extractor()
        supervisor.later(pause_s, system.extractor.start)


def _registry(system, supervisor, pause_s):
    if system.registry.running:
        system.registry.kill()
        supervisor.later(pause_s, system.registry.start)


def _postmaster(system, supervisor, pause_s):
    if system.postmaster():
        system.kill_postmaster()


VICTIMS = {"runner": _runner, "extractor": _extractor, "registry": _registry, "postmaster": _postmaster}


@pytest.mark.fault
def test_what_is_sealed_is_not_computed_again(fragile, supervisor):
    documents = texts(1500, seed=3, longest=12)

    def start_wide():
        corpus = fragile.variant(documents)
        return fragile.client.extractions.start(MODEL, corpus, EVERYTHING, recipe=Recipe(context_size=128))

    whole = read(fragile.client, start_wide())
    extraction = start_wide()
    sealed = []

    def act():
        eventually(lambda: list(Path(extraction.path).glob("token_id/00000000.safetensors")), "a segment is sealed")
        fragile.kill_runner()
        resumed = eventually(
            lambda: [x for x in [fragile.client.extractions.get(extraction.id)] if x.state is not RUNNING], "it resumes"
        )
        sealed.append(resumed[0].n_rows)
        fragile.kill_extractor()
        supervisor.later(0.5, fragile.extractor.start)

    kill = At(int(int(whole["n_rows"]) * 0.7), act)

    assert read(fragile.client, extraction, on_rows=kill, chunk_bytes=1024 * 1024) == whole
    assert sealed[0] == SEGMENT_BYTES // (16 * 32 * 4 + 3 * 4)


@pytest.mark.fault
def test_no_lease_outlives_its_holder(fragile):
    """A lease that was released while the registry was down expires a minute later."""
    eventually(lambda: all(r.n_leases == 0 for r in fragile.client.residencies.list()), "no lease is held")


# -- killed for good ---------------------------------------------------------------------------------------------------


def test_a_runner_that_cannot_come_back_is_a_typed_error(fragile, quiet, text_llama):
    folder = text_llama.with_name("brittle")
    shutil.copytree(text_llama, folder)
    (folder / "README.md").write_text("Another model, as far as its digest goes.")
    fragile.add_model("brittle", folder)
    extraction = start(fragile, model="brittle")

    def act():
        (folder / "model.safetensors").unlink()
        fragile.runners()[-1].kill()

    kill = in_the_middle(fragile, quiet, extraction, act)

    with pytest.raises((errors.LoadFailed, errors.ModelUnsupported)) as caught:
        read(fragile.client, extraction, on_rows=kill)

    assert kill.done
    ended = fragile.client.extractions.get(extraction.id)
    assert ended.state is ExtractionState.FAILED
    assert ended.failure.reason == caught.value.reason
    all_is_well(fragile)


def test_an_extractor_that_stays_away_is_a_typed_error(fragile, quiet, supervisor):
    extraction = start(fragile)
    kill = in_the_middle(fragile, quiet, extraction, fragile.kill_extractor)
    received = []

    def on_rows(n_rows):
        received.append(n_rows)
        kill(n_rows)

    try:
        with pytest.raises(errors.StreamLost) as caught:
            read(fragile.client, extraction, on_rows=on_rows, reconnect_deadline_s=2.0)
        with pytest.raises(errors.Unavailable):
            fragile.connect(extractor=fragile.extractor.address, deadline_s=2.0).extractions.get(extraction.id)
    finally:
        fragile.extractor.start()

    assert caught.value.metadata["next_row"] == str(received[-1])
    assert read(fragile.client, extraction) == quiet  # A later stream still gets every row.


@pytest.mark.fault
def test_a_registry_that_stays_away_stops_no_stream_and_is_a_typed_error_for_the_rest(fragile, quiet):
    extraction = start(fragile)
    corpus = fragile.variant(texts(5))
    kill = in_the_middle(fragile, quiet, extraction, fragile.registry.kill)

    try:
        assert read(fragile.client, extraction, on_rows=kill) == quiet
        assert kill.done
        with pytest.raises(errors.Unavailable):
            fragile.connect(deadline_s=2.0).models.get(MODEL)
        beside = fragile.connect(extractor=fragile.extractor.address)
        with pytest.raises(errors.RegistryUnavailable):
            beside.extractions.start(MODEL, corpus, HOOKPOINT)
    finally:
        fragile.registry.start()

    all_is_well(fragile)


@pytest.mark.fault
def test_a_database_that_stays_away_stops_no_stream_and_is_a_typed_error_for_the_rest(
    start_system, text_llama, quiet, tmp_path
):
    postgres = EmbeddedPostgres(tmp_path)
    postgres.start()
    try:
        system = start_system(models_root=text_llama.parent, registry=("--database-url", postgres.url))
        system.add_model(MODEL, text_llama)
        extraction = start(system)
        kill = in_the_middle(system, quiet, extraction, lambda: postgres._postmaster().kill())

        assert read(system.client, extraction, on_rows=kill) == quiet
        assert kill.done
        with pytest.raises((errors.DatabaseUnavailable, errors.DeadlineExceeded)):
            system.connect(deadline_s=3.0).models.get(MODEL)
        refusal = refusal_of_get(system)
        assert (refusal.code, refusal.reason) == (StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert refusal.retry_after_s > 0

        postgres.start()  # The registry does not start a Postgres that is not its own.
        assert system.client.models.get(MODEL).id == MODEL
        all_is_well(system)
        system.stop()
    finally:
        postgres.stop()


def refusal_of_get(system):
    """The registry's own answer: a bare channel does not try again."""
    with grpc.insecure_channel(system.registry.address) as channel, pytest.raises(grpc.RpcError) as caught:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        stub.GetModel(model_service_pb2.GetModelRequest(model_id=MODEL), timeout=PATIENCE_S)
    return refusal_of(caught.value)
