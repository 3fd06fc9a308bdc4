"""Scripted servers for the client's tests, on real sockets, and a client of them."""

from concurrent import futures

import grpc
import pytest

from fix_scripted_extractor import ScriptedExtractor
from fix_scripted_registry import ScriptedRegistry
from headrace.extractor.v1 import corpus_service_pb2_grpc as corpora_grpc
from headrace.extractor.v1 import extraction_service_pb2_grpc as service_grpc
from headrace.registry.v1 import activation_set_service_pb2_grpc as sets_grpc
from headrace.registry.v1 import model_service_pb2_grpc as models_grpc
from headrace.registry.v1 import residency_service_pb2_grpc as residencies_grpc
from headrace_client import HeadraceClient


class Host:
    """A scripted servicer behind a port, which it keeps over `stop()` and `start()`."""

    def __init__(self, servicer):
        self.servicer = servicer
        self.port = 0
        self.server = None
        self.start()

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def start(self):
        pool = futures.ThreadPoolExecutor(max_workers=16)
        self.server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
        for kind, add in _ADDERS.items():
            if isinstance(self.servicer, kind):
                add(self.servicer, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.server.start()

    def stop(self):
        if self.server is not None:
            self.server.stop(0).wait(5)
            self.server = None


_ADDERS = {
    service_grpc.ExtractionServiceServicer: service_grpc.add_ExtractionServiceServicer_to_server,
    corpora_grpc.CorpusServiceServicer: corpora_grpc.add_CorpusServiceServicer_to_server,
    models_grpc.ModelServiceServicer: models_grpc.add_ModelServiceServicer_to_server,
    residencies_grpc.ResidencyServiceServicer: residencies_grpc.add_ResidencyServiceServicer_to_server,
    sets_grpc.ActivationSetServiceServicer: sets_grpc.add_ActivationSetServiceServicer_to_server,
}


@pytest.fixture
def hosts():
    """Starts servers: `hosts(servicer)`; stops them at the end."""
    started = []

    def start(servicer):
        started.append(Host(servicer))
        return started[-1]

    yield start
    for host in started:
        host.stop()


@pytest.fixture
def extractor_host(hosts):
    return hosts(ScriptedExtractor())


@pytest.fixture
def scripted_extractor(extractor_host):
    return extractor_host.servicer


@pytest.fixture
def registry_host(hosts, extractor_host):
    registry = ScriptedRegistry()
    registry.add_node("n1", extractor_host.address)
    return hosts(registry)


@pytest.fixture
def scripted_registry(registry_host):
    return registry_host.servicer


@pytest.fixture
def client(registry_host):
    with HeadraceClient.connect(registry_host.address, deadline_s=5) as one:
        yield one
