"""Two registries, two extractors, one Postgres: after any of them is killed, all of it converges again."""

import contextlib
import random
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import grpc
import psutil
import pytest

from fix_system import MODEL, PATIENCE_S, Process, eventually
from headrace.registry.v1 import model_pb2 as m
from headrace.registry.v1 import model_service_pb2 as models_pb
from headrace.registry.v1 import model_service_pb2_grpc as models_grpc
from headrace.registry.v1 import node_service_pb2 as nodes_pb
from headrace.registry.v1 import node_service_pb2_grpc as nodes_grpc
from headrace.registry.v1 import residency_pb2 as r
from headrace.registry.v1 import residency_service_pb2 as pb
from headrace.registry.v1 import residency_service_pb2_grpc as pb_grpc
from headrace_client import HeadraceClient
from headrace_client.values import NodeState, ResidencyState
from headrace_registry.postgres.server.embedded import EmbeddedPostgres

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

LEASE_S = 6.0
HEARTBEAT_S = 1.0
N_BORROWERS = 4
SECONDS = 120
SETTLED = (r.RESIDENCY_STATE_RESIDENT, r.RESIDENCY_STATE_UNLOADED, r.RESIDENCY_STATE_FAILED, r.RESIDENCY_STATE_LOST)


class Cluster:
    """The five processes, each with a way to kill it and to start it again."""

    def __init__(self, folder, models_root):
        self.models_root = models_root
        self.postgres = EmbeddedPostgres(folder / "database")
        self._postmaster_pid = folder / "database" / "postgres" / "postmaster.pid"
        self.postgres.own()
        self.postgres.start()
        common = ["--grace-s", "5"]
        shared = ["--data-dir", str(folder / "registry"), "--models-root", str(models_root)]
        shared += ["--database-url", self.postgres.url, "--heartbeat-interval-s", str(HEARTBEAT_S)]
        shared += ["--min-residency-s", "1", "--max-wait-s", "2"]
        self.registries = [
            self._process(folder / f"registry-{n}", "headrace_registry", common + shared) for n in (0, 1)
        ]
        self.address = "ipv4:" + ",".join(registry.address for registry in self.registries)
        node = ("--registry", self.address, "--device", "cpu", "--spare-runners", "0")
        self.extractors = [
            self._process(
                folder / f"node-{name}",
                "headrace_extractor",
                [*common, *node, "--data-dir", str(folder / f"node-{name}"), "--node-id", f"node-{name}"],
            )
            for name in "ab"
        ]
        for process in (*self.registries, *self.extractors):
            process.start()

    @staticmethod
    def _process(home, module, arguments):
        home.mkdir(parents=True)
        return Process(module, home, arguments)

    def kill_postgres(self):
        psutil.Process(int(self._postmaster_pid.read_text().split("\n", 1)[0])).send_signal(signal.SIGKILL)

    def start_postgres(self):
        def started():
            with contextlib.suppress(Exception):
                self.postgres.start()
                return True
            return False

        eventually(started, "Postgres is back")

    def runners_of(self, extractor):
        """Process ids of an extractor's runners."""
        found = []
        for child in psutil.Process(extractor.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "headrace_extractor.runner" in child.cmdline():
                    found.append(child.pid)
        return found

    def stop(self):
        for process in (*self.extractors, *self.registries):
            with contextlib.suppress(Exception):
                if process.running:
                    process.terminate()
        self.postgres.stop()


@pytest.fixture
def cluster(text_llama):
    # Not below tmp_path, which only its owner may enter: as root, Postgres runs as another user.
    with tempfile.TemporaryDirectory(prefix="headrace-replicas-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder), text_llama.parent)
        yield cluster
        cluster.stop()


@contextlib.contextmanager
def stubs(address):
    with grpc.insecure_channel(address, [("grpc.max_reconnect_backoff_ms", 500)]) as channel:
        yield channel


def patiently(call):
    """Repeats an idempotent call until a registry answers it."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except grpc.RpcError as exc:
            passing = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            if exc.code() not in passing or time.monotonic() > end:
                raise
            time.sleep(0.2)


class Borrower(threading.Thread):
    """Leases models at random while servers are killed; only passing errors are allowed."""

    ALLOWED = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "INTERNAL")

    def __init__(self, address, seed, stopping):
        super().__init__(daemon=True)
        self._address, self._random, self._stopping = address, random.Random(seed), stopping
        self.n_served = 0
        self.errors = []

    def run(self):
        with stubs(self._address) as channel:
            stub = pb_grpc.ResidencyServiceStub(channel)
            while not self._stopping.is_set():
                try:
                    self._borrow(stub)
                except grpc.RpcError as exc:
                    if exc.code().name not in self.ALLOWED or "a bug" in exc.details():
                        self.errors.append(exc)
                    time.sleep(0.2)

    def _borrow(self, stub):
        request = pb.AcquireLeaseRequest(
            model_id=self._random.choice((MODEL, "second")), holder=self.name, ttl_s=LEASE_S, wait_s=30
        )
        lease = list(stub.AcquireLease(request, timeout=40))[-1].granted.lease
        time.sleep(self._random.uniform(0, 0.5))
        if self._random.random() < 0.7:  # The other leases are left to expire.
            stub.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence), timeout=10)
        self.n_served += 1


def prepare(channel, folder, model_id):
    stub = models_grpc.ModelServiceStub(channel)
    model = m.Model(id=model_id, source=m.ModelSource(folder=m.FolderSource(path=str(folder))))
    patiently(lambda: stub.RegisterModel(models_pb.RegisterModelRequest(model=model), timeout=10))
    patiently(lambda: stub.PrepareModel(models_pb.PrepareModelRequest(model_id=model_id), timeout=10))


def is_ready(channel, model_id):
    stub = models_grpc.ModelServiceStub(channel)
    answer = patiently(lambda: stub.GetModel(models_pb.GetModelRequest(model_id=model_id), timeout=10))
    assert answer.model.state != m.MODEL_STATE_FAILED, answer.model.failure
    return answer.model.state == m.MODEL_STATE_READY


def copy_of(folder, name):
    return shutil.copytree(folder, folder.with_name(name), dirs_exist_ok=True)


def test_whoever_is_killed_everything_converges(cluster, text_llama):
    chance = random.Random(20)
    second, late = (copy_of(text_llama, name) for name in ("replica-2", "replica-3"))
    with stubs(cluster.address) as channel:
        for model_id, folder in ((MODEL, text_llama), ("second", second)):
            prepare(channel, folder, model_id)
            eventually(lambda wanted=model_id: is_ready(channel, wanted), "the model is ready")
        stopping = threading.Event()
        borrowers = [Borrower(cluster.address, seed, stopping) for seed in range(N_BORROWERS)]
        for borrower in borrowers:
            borrower.start()
        preparing = threading.Thread(target=prepare, args=(channel, late, "late"), daemon=True)

        end, n_kills = time.monotonic() + SECONDS, 0
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.5, 3.0))
            victim = chance.choice((*cluster.registries, *cluster.extractors, None))
            if victim is None:
                cluster.kill_postgres()
            else:
                victim.kill()
            if not preparing.ident:
                preparing.start()
            n_kills += 1
            time.sleep(chance.uniform(0.0, 2.0))
            cluster.start_postgres() if victim is None else victim.start()
        stopping.set()
        for borrower in borrowers:
            borrower.join(60)
        preparing.join(PATIENCE_S)
        assert not preparing.is_alive()
        print(f"\n{n_kills} kills, {[borrower.n_served for borrower in borrowers]} leases")  # noqa: T201

        eventually(lambda: converged(cluster, channel), "converged", deadline_s=2 * LEASE_S + PATIENCE_S)
        eventually(lambda: is_ready(channel, "late"), "the model prepared meanwhile is ready")
        assert [error for borrower in borrowers for error in borrower.errors] == []
        assert sum(borrower.n_served for borrower in borrowers) > 0
        check_stale_reports_are_refused(channel)


def test_a_node_lives_on_at_the_other_registry_when_one_is_killed(cluster, text_llama):
    addresses = ",".join(registry.address for registry in cluster.registries)
    with HeadraceClient.connect(addresses, deadline_s=20) as client:
        client.models.register(folder=text_llama, id=MODEL)
        client.models.prepare(MODEL)
        client.models.wait_ready(MODEL, deadline_s=PATIENCE_S)
        client.residencies.load(MODEL, node="node-a")
        resident = eventually(lambda: resident_on(client, "node-a"), "the model is resident")
        epochs = {node.id: node.epoch for node in client.nodes()}

        for killed in (0, 1):  # The registry that the nodes know best, then the one that they went over to.
            cluster.registries[killed].kill()
            end = time.monotonic() + 20 * HEARTBEAT_S
            while time.monotonic() < end:
                assert {node.id: (node.state, node.epoch) for node in client.nodes()} == {
                    name: (NodeState.ALIVE, epoch) for name, epoch in epochs.items()
                }
                time.sleep(0.2)
            assert resident_on(client, "node-a") == resident
            cluster.registries[killed].start()


def resident_on(client, node_id):
    """The id of the residency on a node; None while it has none."""
    found = client.residencies.list(model=MODEL)
    return next((one.id for one in found if one.node_id == node_id and one.state is ResidencyState.RESIDENT), None)


def converged(cluster, channel):
    """True if all nodes are alive, no residency is between two states, no lease is left, and the residents run."""
    stub = pb_grpc.ResidencyServiceStub(channel)
    nodes = patiently(lambda: stub.ListNodes(pb.ListNodesRequest(), timeout=10)).nodes
    found = patiently(lambda: stub.ListResidencies(pb.ListResidenciesRequest(), timeout=10)).residencies
    if any(node.state != r.NODE_STATE_ALIVE for node in nodes):
        return False
    if any(one.state not in SETTLED or one.n_leases for one in found):
        return False
    resident = {name: sum(one.node_id == name for one in found) for name in ("node-a", "node-b")}
    running = {f"node-{name}": len(cluster.runners_of(e)) for name, e in zip("ab", cluster.extractors, strict=True)}
    return resident == running


def check_stale_reports_are_refused(channel):
    stub, nodes = nodes_grpc.NodeServiceStub(channel), pb_grpc.ResidencyServiceStub(channel)
    epoch = next(node.epoch for node in nodes.ListNodes(pb.ListNodesRequest(), timeout=10).nodes if node.id == "node-a")
    report = nodes_pb.ReportResidencyRequest(
        node_id="node-a", epoch=epoch - 1, residency_id="x", fence=1, state=r.RESIDENCY_STATE_RESIDENT
    )
    with pytest.raises(grpc.RpcError) as refused:
        stub.ReportResidency(report, timeout=10)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "epoch" in refused.value.details()
