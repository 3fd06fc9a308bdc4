"""The ways to a server: proxies, Unix sockets, TLS, tokens, replicas. Real servers and real sockets."""

import threading
import time
from contextlib import closing

import pytest

from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT
from fix_scripted_registry import ScriptedRegistry
from fix_ways import HangingUp, HttpProxy, Listener, elsewhere
from headrace_client import HeadraceClient, errors
from headrace_client.rpc import security as security_room
from headrace_client.rpc.addresses import Proxy, addresses_of, is_local
from headrace_client.rpc.endpoint import Endpoint
from headrace_client.rpc.replicas import Replicas
from headrace_client.rpc.security import Security

TOKEN = "correct-horse-battery-staple"
METHOD, FIELDS = "ExtractionService.StreamActivations", {"extraction_id": EXTRACTION_ID, "columns": [HOOKPOINT]}
NOWHERE = 9  # The discard port: nothing listens there.
PAGE = b"<html>Access denied by policy</html>"


def forbidden(status):
    head = f"HTTP/1.1 {status} No\r\nContent-Type: text/html\r\nContent-Length: {len(PAGE)}\r\n\r\n"
    return head.encode() + PAGE


def rows_of(endpoint):
    with endpoint.raw_stream(METHOD, **FIELDS) as stream:
        return sum(len(one) for one in stream)


def calls_of(endpoint):
    """The three kinds of calls, none of which may take a way that another does not."""
    return {
        "unary": lambda: endpoint.unary("ExtractionService.GetExtraction", extraction_id=EXTRACTION_ID, deadline_s=10),
        "stream": lambda: next(endpoint.stream("ExtractionService.WatchExtraction", extraction_id=EXTRACTION_ID)),
        "rows": lambda: rows_of(endpoint),
    }


KINDS = pytest.mark.parametrize("kind", ["unary", "stream", "rows"])


# -- proxies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
@KINDS
def test_loopback_never_leads_through_a_proxy(proxied, serve_at, scripted_extractor, host, kind):
    proxied(NOWHERE)
    port = serve_at(scripted_extractor, f"{host}:0")

    with closing(Endpoint(f"{host}:{port}", Security())) as endpoint:
        assert calls_of(endpoint)[kind]()


@KINDS
def test_every_kind_of_call_goes_through_the_proxy_to_another_machine(
    proxied, listeners, serve_at, scripted_extractor, kind
):
    proxy = listeners(HttpProxy)
    proxied(proxy.port)
    port = serve_at(scripted_extractor, "127.0.0.1:0")

    with closing(Endpoint(elsewhere(port), Security())) as endpoint:
        assert calls_of(endpoint)[kind]()

    assert [asked[0].split()[:2] for asked in proxy.asked] == [["CONNECT", elsewhere(port)]]


@KINDS
def test_a_host_in_no_proxy_is_reached_without_the_proxy(proxied, serve_at, scripted_extractor, kind):
    proxied(NOWHERE, no_proxy="example.org, 0.0.0.0/8")
    port = serve_at(scripted_extractor, "127.0.0.1:0")

    with closing(Endpoint(elsewhere(port), Security())) as endpoint:
        assert calls_of(endpoint)[kind]()


@pytest.mark.parametrize("status", [401, 403, 407])
@KINDS
def test_a_proxy_that_refuses_is_named_at_once_with_its_status(proxied, listeners, status, kind):
    proxied(listeners(HttpProxy, forbidden(status)).port)
    began = time.monotonic()

    with closing(Endpoint(elsewhere(7471), Security())) as endpoint, pytest.raises(errors.ProxyRefused) as refused:
        calls_of(endpoint)[kind]()

    assert refused.value.metadata["http_status"] == str(status)
    assert "proxy" in refused.value.message
    assert "no_proxy" in refused.value.remedy
    assert time.monotonic() - began < 8


@KINDS
def test_a_proxy_without_the_server_behind_it_may_have_it_again_later(proxied, listeners, kind):
    proxied(listeners(HttpProxy, forbidden(502)).port)

    with closing(Endpoint(elsewhere(7471), Security())) as endpoint, pytest.raises(errors.Unavailable) as away:
        calls_of(endpoint)[kind]()

    assert away.value.metadata["http_status"] == "502"


@pytest.mark.parametrize(
    ("address", "environment", "proxy"),
    [
        ("a.example.org:80", {"http_proxy": "http://p:3128"}, ("p", 3128)),
        ("a.example.org:80", {"http_proxy": "http://p:3128", "grpc_proxy": "http://q:1"}, ("q", 1)),
        ("a.example.org:80", {"http_proxy": "p:3128"}, ("p", 3128)),
        ("a.example.org:80", {"http_proxy": "http://p:3128", "no_proxy": "example.org"}, None),
        (
            "a.example.org:80",
            {"http_proxy": "http://p:3128", "no_grpc_proxy": "b", "no_proxy": "example.org"},
            ("p", 3128),
        ),
        ("10.1.2.3:80", {"http_proxy": "http://p:3128", "no_proxy": "10.0.0.0/8"}, None),
        ("a.example.org:80", {"http_proxy": "socks5://p:3128"}, None),
        ("a.example.org:80", {}, None),
        ("[::1]:80", {"http_proxy": "http://p:3128"}, None),
        ("unix:/x", {"http_proxy": "http://p:3128"}, None),
    ],
)
def test_proxies_are_chosen_by_grpcs_rules(address, environment, proxy):
    found = Proxy.of(address, environment)

    assert (found and (found.host, found.port)) == proxy


def test_a_proxy_gets_the_name_and_password_of_its_url():
    found = Proxy.of("a.example.org:80", {"http_proxy": "http://me:a%40b@p:3128"})

    assert found is not None
    assert found.authorization == "Basic bWU6YUBi"


@pytest.mark.parametrize("url", ["http://me:secret@proxy:abc", "me:secret/@proxy:1", "proxy:70000", "http://[::1"])
def test_a_proxy_that_is_no_address_is_refused_by_the_name_of_its_variable(url):
    with pytest.raises(errors.InvalidArgument, match="https_proxy is not of") as raised:
        Proxy.of("a.example.org:80", {"https_proxy": url, "http_proxy": "http://other:1"})

    assert "secret" not in raised.value.message


# -- long requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16_384, 20_000, 65_535, 100_000, 3_900_000])
def test_rows_are_asked_for_by_requests_up_to_the_servers_limit(serve_at, scripted_extractor, size):
    port = serve_at(scripted_extractor, "127.0.0.1:0")

    with (
        closing(Endpoint(f"127.0.0.1:{port}", Security())) as endpoint,
        endpoint.raw_stream(METHOD, **FIELDS, reader="r" * size) as stream,
    ):
        assert sum(len(one) for one in stream) > scripted_extractor.column(HOOKPOINT).nbytes
    assert len(scripted_extractor.calls["StreamActivations"][0].reader) == size


def test_a_request_beyond_the_servers_limit_is_message_too_large(serve_at, scripted_extractor):
    port = serve_at(scripted_extractor, "127.0.0.1:0")

    with (
        closing(Endpoint(f"127.0.0.1:{port}", Security())) as endpoint,
        pytest.raises(errors.MessageTooLarge),
        endpoint.raw_stream(METHOD, **FIELDS, reader="r" * 5_000_000) as stream,
    ):
        next(stream)


# -- Unix sockets ------------------------------------------------------------------------------------------------------


def test_a_client_works_over_unix_sockets_alone(serve_at, scripted_extractor, tmp_path):
    registry = ScriptedRegistry()
    registry.add_node("n1", f"unix:{tmp_path}/x.sock")
    serve_at(scripted_extractor, f"unix:{tmp_path}/x.sock")
    serve_at(registry, f"unix:{tmp_path}/r.sock")

    with HeadraceClient.connect(f"unix:{tmp_path}/r.sock", token=TOKEN) as client:
        assert [node.address for node in client.nodes()] == [f"unix:{tmp_path}/x.sock"]
        with client.chunks(EXTRACTION_ID) as stream:
            assert sum(chunk.n_rows for chunk in stream) > 0
    assert registry.metadata["ListNodes"][0]["authorization"] == f"Bearer {TOKEN}"


# -- tokens and TLS ----------------------------------------------------------------------------------------------------


@KINDS
def test_a_token_never_goes_out_in_clear_beyond_this_machine(listeners, kind):
    listener = listeners(HangingUp)

    with (
        closing(Endpoint(elsewhere(listener.port), Security(token=TOKEN), deadline_s=5)) as endpoint,
        pytest.raises(errors.HeadraceError),
    ):
        calls_of(endpoint)[kind]()

    assert listener.received
    assert TOKEN.encode() not in listener.received


@KINDS
def test_a_server_without_tls_beyond_this_machine_is_refused_with_the_remedy(serve_at, scripted_extractor, kind):
    port = serve_at(scripted_extractor, "127.0.0.1:0")

    with (
        closing(Endpoint(elsewhere(port), Security(token=TOKEN), deadline_s=5)) as endpoint,
        pytest.raises(errors.Unavailable) as refused,
    ):
        calls_of(endpoint)[kind]()

    assert "speaks no TLS" in refused.value.remedy
    assert "--tls-cert" in refused.value.remedy
    assert not scripted_extractor.metadata


@KINDS
def test_a_server_with_tls_tells_a_client_without_it_what_to_give(serve_at, scripted_extractor, identity, kind):
    port = serve_at(scripted_extractor, "127.0.0.1:0", identity)

    with (
        closing(Endpoint(f"127.0.0.1:{port}", Security(), deadline_s=5)) as endpoint,
        pytest.raises(errors.Unavailable) as refused,
    ):
        calls_of(endpoint)[kind]()

    assert "speaks TLS" in refused.value.remedy
    assert "HEADRACE_CA_FILE" in refused.value.remedy


@KINDS
def test_the_systems_roots_vouch_for_a_server_where_no_file_is_given(
    serve_at, scripted_extractor, identity, monkeypatch, kind
):
    monkeypatch.setenv("SSL_CERT_FILE", str(identity[0]))
    security_room.system_roots.cache_clear()
    port = serve_at(scripted_extractor, "127.0.0.1:0", identity)

    with closing(Endpoint(elsewhere(port), Security(token=TOKEN), deadline_s=10)) as endpoint:
        assert calls_of(endpoint)[kind]()
    security_room.system_roots.cache_clear()

    assert all(seen[0]["authorization"] == f"Bearer {TOKEN}" for seen in scripted_extractor.metadata.values())


@KINDS
def test_a_certificate_of_a_stranger_is_refused_with_the_remedy(
    serve_at, scripted_extractor, identity, make_identity, kind
):
    port = serve_at(scripted_extractor, "127.0.0.1:0", identity)
    security = Security.load(None, make_identity()[0])

    with (
        closing(Endpoint(f"localhost:{port}", security, deadline_s=5)) as endpoint,
        pytest.raises(errors.Unavailable) as refused,
    ):
        calls_of(endpoint)[kind]()

    assert "root certificate" in refused.value.remedy


def test_the_word_system_stands_for_this_machines_certificates(identity, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(identity[0]))
    security_room.system_roots.cache_clear()

    assert Security.load(None, "system").ca_pem == identity[0].read_bytes().strip()
    security_room.system_roots.cache_clear()


def test_a_file_without_a_certificate_is_refused(tmp_path):
    (tmp_path / "empty.pem").write_text("nothing")

    with pytest.raises(errors.InvalidArgument, match="no certificate"):
        Security.load(None, tmp_path / "empty.pem")


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("LocalHost:1", True),
        ("[::1]:1", True),
        ("unix:/x", True),
        ("0.0.0.0:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.org:1", False),
    ],
)
def test_addresses_of_this_machine(address, local):
    assert is_local(address) is local


# -- replicas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a:1", ("a:1",)),
        ("a:1, b:2,a:1", ("a:1", "b:2")),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", ("127.0.0.1:1", "127.0.0.1:2")),
        ("dns:///a:1", ("a:1",)),
        ("unix:/x,[::1]:5", ("unix:/x", "[::1]:5")),
    ],
)
def test_replicas_are_written_with_commas(text, found):
    assert addresses_of(text, name="registry") == found


@pytest.mark.parametrize(
    "text", ["", "a", "a:b", ":1", "a:1,,b:2", "::1:5", "unix:", "a:70000", ",".join(["a:1"] * 17)]
)
def test_text_that_is_no_address_is_refused(text):
    with pytest.raises(errors.InvalidArgument, match="registry is HOST:PORT"):
        HeadraceClient.connect(text)


def test_the_next_replica_is_asked_when_one_does_not_answer(hosts):
    first, second = hosts(ScriptedRegistry()), hosts(ScriptedRegistry())
    first.servicer.add_node("n1", "127.0.0.1:1")
    second.servicer.add_node("n2", "127.0.0.1:2")

    with HeadraceClient.connect(f"127.0.0.1:{NOWHERE},{first.address},{second.address}", deadline_s=10) as client:
        assert [node.id for node in client.nodes()] == ["n1"]
        first.stop()
        assert [node.id for node in client.nodes()] == ["n2"]
        second.stop()
        first.start()
        assert [node.id for node in client.nodes()] == ["n1"]
        first.stop()
        with pytest.raises(errors.Unavailable):
            client.nodes()


def test_a_replica_that_hangs_leaves_time_for_the_next(hosts, listeners):
    host = hosts(ScriptedRegistry())
    host.servicer.add_node("n1", "127.0.0.1:1")

    with HeadraceClient.connect(f"127.0.0.1:{listeners(Listener).port},{host.address}", deadline_s=4) as client:
        assert [node.id for node in client.nodes()] == ["n1"]


def test_a_validation_begins_at_the_next_replica(hosts):
    host = hosts(ScriptedRegistry())

    with HeadraceClient.connect(f"127.0.0.1:{NOWHERE},{host.address}", deadline_s=5) as client:
        assert client.models.validate("tiny").passed


@pytest.mark.parametrize(("deadline_s", "first_s"), [(4, 2), (30, 25), (120, 60)])
def test_a_replica_may_use_its_longest_wait_where_the_deadline_allows_it(deadline_s, first_s):
    replicas = Replicas(("127.0.0.1:1", "127.0.0.1:2"), Security())

    timeout_s = replicas.first_answer(lambda _channel, timeout_s: timeout_s, deadline_s=deadline_s, failed=None)
    replicas.close()

    assert timeout_s == pytest.approx(first_s, abs=0.1)


def test_a_watch_goes_on_at_the_next_replica(hosts):
    first, second = hosts(ScriptedRegistry()), hosts(ScriptedRegistry())
    for host in (first, second):
        host.servicer.RegisterModel(_registration(), _Context())
    first.servicer.script = ["DOWNLOADING"]
    second.servicer.script = ["DOWNLOADING", "READY"]
    seen = []

    with HeadraceClient.connect(f"{first.address},{second.address}", deadline_s=5) as client:
        killed = threading.Timer(0.5, first.stop)
        killed.start()
        for event in client.models.watch("tiny", deadline_s=20):
            seen.append(event.model.state.value)
            if seen[-1] == "READY":
                break
        killed.join()

    assert seen == ["DOWNLOADING", "READY"]


def _registration():
    from headrace.registry.v1 import model_pb2, model_service_pb2  # noqa: PLC0415

    return model_service_pb2.RegisterModelRequest(model=model_pb2.Model(id="tiny"))


class _Context:
    def invocation_metadata(self):
        return ()
