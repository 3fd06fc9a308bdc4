"""Real models on a device too small for all: every client is served, memory stays within bounds and is freed."""

import random
import shutil
import threading
import time

import grpc
import psutil
import pytest

from fix_system import MODEL, PATIENCE_S, eventually
from headrace.registry.v1 import residency_pb2 as r
from headrace.registry.v1 import residency_service_pb2 as pb
from headrace.registry.v1 import residency_service_pb2_grpc as pb_grpc

MODELS = (MODEL, "second", "third")
N_CLIENTS = 8
# Short, so that models change places many times.
POLICY = ("--min-residency-s", "1", "--max-wait-s", "2")


class Borrower(threading.Thread):
    """Leases models at random, one after the other, until told to stop; remembers the models it was granted."""

    def __init__(self, address, seed, stopping):
        super().__init__(daemon=True)
        self._address = address
        self._random = random.Random(seed)
        self._stopping = stopping
        self.served = []
        self.error = None

    def run(self):
        try:
            with grpc.insecure_channel(self._address) as channel:
                stub = pb_grpc.ResidencyServiceStub(channel)
                while not self._stopping.is_set():
                    self._borrow(stub, self._random.choice(MODELS))
        except Exception as exc:  # noqa: BLE001 - the test raises it
            self.error = exc

    def _borrow(self, stub, model_id):
        request = pb.AcquireLeaseRequest(model_id=model_id, holder=f"borrower {self.name}", ttl_s=15, wait_s=PATIENCE_S)
        events = list(stub.AcquireLease(request, timeout=2 * PATIENCE_S))
        lease = events[-1].granted.lease
        assert lease.model_id == model_id
        time.sleep(self._random.uniform(0.05, 0.6))
        stub.RenewLease(pb.RenewLeaseRequest(lease_id=lease.id, fence=lease.fence), timeout=PATIENCE_S)
        stub.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence), timeout=PATIENCE_S)
        self.served.append(model_id)


def measured_bytes(system):
    """Loads the model and unloads it again; returns its measured size."""
    with grpc.insecure_channel(system.registry.address) as channel:
        stub = pb_grpc.ResidencyServiceStub(channel)
        stub.LoadModel(pb.LoadModelRequest(model_id=MODEL), timeout=PATIENCE_S)

        def resident():
            found = stub.ListResidencies(pb.ListResidenciesRequest(), timeout=PATIENCE_S).residencies
            return next((one for one in found if one.state == r.RESIDENCY_STATE_RESIDENT), None)

        found = eventually(resident, "the model is resident")
        stub.UnloadModel(pb.UnloadModelRequest(model_id=MODEL), timeout=PATIENCE_S)
        eventually(lambda: not system.runners(), "the model is unloaded")
    return found.measured_bytes


def unloaded(system):
    """Residencies that were unloaded."""
    return [each for each in system.client.residencies.list(include_ended=True) if each.state == "UNLOADED"]


def used_bytes(runners):
    """Memory that would be free again if these processes ended."""
    total = 0
    for runner in runners:
        try:
            total += runner.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return total


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(8, marks=pytest.mark.timeout(300)),
        pytest.param(120, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_eight_clients_share_a_device_that_holds_two_of_three_models(start_system, text_llama, seconds):
    system = start_system(models_root=text_llama.parent, registry=POLICY)
    system.add_model(MODEL, text_llama)
    one = measured_bytes(system)
    budget = int(2.5 * one)
    system.extractor.terminate()
    system.extractor.add_arguments("--cpu-bytes", str(budget))
    system.extractor.start()
    for model_id in MODELS[1:]:
        system.add_model(model_id, shutil.copytree(text_llama, text_llama.with_name(model_id), dirs_exist_ok=True))

    stopping, most_runners, most_bytes = threading.Event(), 0, 0
    borrowers = [Borrower(system.registry.address, seed, stopping) for seed in range(N_CLIENTS)]
    for borrower in borrowers:
        borrower.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end or (len(unloaded(system)) < 2 and time.monotonic() < end + PATIENCE_S):
        runners = system.runners()
        most_runners, most_bytes = max(most_runners, len(runners)), max(most_bytes, used_bytes(runners))
        time.sleep(0.1)
    stopping.set()
    for borrower in borrowers:
        borrower.join(2 * PATIENCE_S)

    assert [borrower.error for borrower in borrowers if borrower.error] == []
    assert all(borrower.served for borrower in borrowers)
    assert {model_id for borrower in borrowers for model_id in borrower.served} == set(MODELS)
    assert most_runners <= 2
    assert most_bytes <= budget
    assert len(unloaded(system)) >= 2
    assert all(each.reason and each.actor for each in unloaded(system))
    served = sum(len(borrower.served) for borrower in borrowers)
    print(f"\n{served} leases, {len(unloaded(system))} unloads, at most {most_bytes:,} of {budget:,} bytes")  # noqa: T201 - figures, with -s


class Footprint:
    """Memory, descriptors, threads and connections of the servers, without models."""

    def __init__(self, system):
        servers = [psutil.Process(process.pid) for process in (system.registry, system.extractor)]
        self.uss_bytes = sum(server.memory_full_info().uss for server in servers)
        self.n_descriptors = sum(server.num_fds() for server in servers)
        self.n_threads = sum(server.num_threads() for server in servers)
        self.n_connections = sum(len(server.net_connections()) for server in servers)
        eventually(lambda: not has_more_than_a_zygote(servers[1]), "every runner has ended and was reaped")


def has_more_than_a_zygote(extractor):
    """True while the extractor has a child, or a zombie, beside the process that its parsers are forked from."""
    for child in extractor.children(recursive=True):
        try:
            if "headrace_chassis.confined.zygote" not in child.cmdline():
                return True
        except psutil.ZombieProcess:
            return True
        except psutil.NoSuchProcess:
            continue
    return False


@pytest.mark.parametrize("n_cycles", [1, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(2400)])])
def test_loads_and_unloads_leave_nothing_behind(start_system, text_llama, n_cycles):
    system = start_system(models_root=text_llama.parent)
    system.add_model(MODEL, text_llama)
    for _ in range(2):  # Things that are made once exist after these.
        measured_bytes(system)
    before = Footprint(system)

    for _ in range(n_cycles):
        measured_bytes(system)

    after = Footprint(system)
    grown = after.uss_bytes - before.uss_bytes
    print(f"\n{n_cycles} cycles: {grown:,} bytes more, {after.n_descriptors} descriptors after {before.n_descriptors}")  # noqa: T201
    assert grown < 100_000_000
    # Pools open a few connections more or less; a leak would add one in every cycle.
    assert after.n_descriptors <= before.n_descriptors + 12
    assert after.n_connections <= before.n_connections + 8
    assert after.n_threads <= before.n_threads + 8
