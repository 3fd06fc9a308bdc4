"""Calls of an endpoint as its gRPC channel gets them: no socket, no clock to wait for."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc_testing
import pytest

from headrace.registry.v1 import model_pb2, model_service_pb2
from headrace_client import errors
from headrace_client.rpc.endpoint import Endpoint
from headrace_client.rpc.security import Security

SERVICE = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]


@pytest.fixture
def below():
    """The far side of an endpoint's channel."""
    return grpc_testing.channel([SERVICE], grpc_testing.strict_fake_time(0.0))


@pytest.fixture
def endpoint(below):
    endpoint = Endpoint("127.0.0.1:1", Security(token="a-token-of-some-length"), deadline_s=7.0)
    endpoint._replicas._channels["127.0.0.1:1"] = below
    return endpoint


@pytest.fixture
def call_in_thread():
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield pool.submit


def taken(below, method):
    return below.take_unary_unary(SERVICE.methods_by_name[method])


def test_a_call_carries_request_and_token_and_gives_the_answer(below, endpoint, call_in_thread):
    answer = call_in_thread(endpoint.unary, "ModelService.GetModel", model_id="m")
    metadata, request, rpc = taken(below, "GetModel")
    rpc.send_initial_metadata(())
    rpc.terminate(model_service_pb2.GetModelResponse(model=model_pb2.Model(id="m")), (), grpc.StatusCode.OK, "")

    assert answer.result(5).model.id == "m"
    assert request.model_id == "m"
    assert ("authorization", "Bearer a-token-of-some-length") in [tuple(entry) for entry in metadata]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
    ],
)
def test_a_bare_status_becomes_the_error_of_its_code(below, endpoint, call_in_thread, code, kind):
    answer = call_in_thread(endpoint.unary, "ModelService.GetModel", model_id="m")
    _, _, rpc = taken(below, "GetModel")
    rpc.send_initial_metadata(())
    rpc.terminate(None, (), code, "no more than this")

    with pytest.raises(kind, match="no more than this"):
        answer.result(5)
