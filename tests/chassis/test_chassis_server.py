"""The parts that every server has around its services: health, reflection, tokens, TLS, addresses, metrics."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from test_chassis_rpc import outcome, refusal

from fix_chassis import MODEL_SERVICE, SERVICE, TOKEN, make_server
from headrace_chassis.auth import TokenGate, is_loopback, read_tls, read_token, split_address
from headrace_chassis.errors import (
    AddressInvalid,
    ListenFailed,
    ListenRefused,
    ReadyFileInvalid,
    TlsFileInvalid,
    TokenFileInvalid,
    TokenInvalid,
)
from headrace_chassis.server import ServerOptions

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
REFLECTED = {
    SERVICE,
    MODEL_SERVICE,
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
}
BEARER = (("authorization", f"Bearer {TOKEN}"),)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return cert, key


# Health and reflection


async def test_health_is_served_per_service_and_overall(probe_server):
    probe = await probe_server()
    stub = health_pb2_grpc.HealthStub(probe.channel)

    for name in ("", SERVICE, MODEL_SERVICE):
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == SERVING
    assert (await refusal(stub.Check(health_pb2.HealthCheckRequest(service="nope"))))[0] is grpc.StatusCode.NOT_FOUND


async def test_health_watch_follows_changes(probe_server):
    probe = await probe_server()
    watching = health_pb2_grpc.HealthStub(probe.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))

    assert (await watching.read()).status == SERVING
    probe.server.set_health(SERVICE, serving=False)
    assert (await watching.read()).status == NOT_SERVING
    watching.cancel()


async def test_health_watch_ends_when_the_server_stops(probe_server):
    probe = await probe_server(grace_s=20.0)
    watching = health_pb2_grpc.HealthStub(probe.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watching.read()).status == SERVING

    async with asyncio.timeout(2):
        await probe.server.stop()

    assert (await watching.read()).status == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await watching.read()
    assert outcome(caught.value) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")


async def test_reflection_lists_services_and_describes_them(probe_server):
    probe = await probe_server()

    def describe() -> tuple[set[str], list[str]]:
        with grpc.insecure_channel(probe.server.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            service = DescriptorPool(database).FindServiceByName(MODEL_SERVICE)
            return set(database.get_services()), [method.name for method in service.methods]

    services, methods = await asyncio.to_thread(describe)

    assert services == REFLECTED
    assert {"RegisterModel", "WatchModel"} <= set(methods)


async def test_reflection_answers_clients_of_version_1(probe_server):
    probe = await probe_server()
    asking = probe.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    name = "grpc.reflection.v1.ServerReflection"
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=name),
    ]

    listed, described = [answer async for answer in asking(iter(questions))]

    assert {service.name for service in listed.list_services_response.service} == REFLECTED
    file = FileDescriptorProto.FromString(described.file_descriptor_response.file_descriptor_proto[0])
    assert f"{file.package}.{file.service[0].name}" == name
    assert file.service[0].method[0].input_type == ".grpc.reflection.v1.ServerReflectionRequest"


# Tokens


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer wrong-horse-battery-staple"),),
        (("authorization", TOKEN),),
        (("authorization", f"Basic {TOKEN}"),),
        (("authorization", f"Bearer {TOKEN[:-1]}"),),
        (("authorization", "Bearer "),),
    ],
)
async def test_calls_without_the_token_are_refused(probe_server, metadata):
    probe = await probe_server(token=TOKEN)
    refused = (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")

    assert await refusal(probe.unary("x", metadata=metadata)) == refused
    assert await refusal(probe.stream("Generate", "1", metadata=metadata)) == refused
    assert await refusal(probe.upload(iter([StringValue(value="x")]), metadata=metadata)) == refused
    assert await refusal(probe.channel.unary_unary("/no/Method")(b"", metadata=metadata)) == refused
    assert probe.probe.seen == []


async def test_oversized_call_without_the_token_is_refused_unread(probe_server):
    probe = await probe_server(token=TOKEN, max_receive_bytes=1000)

    assert (await refusal(probe.unary("x" * 3000)))[1] == "TOKEN_INVALID"


async def test_calls_with_the_token_pass(probe_server):
    probe = await probe_server(token=TOKEN)

    assert (await probe.unary("x", metadata=BEARER)).value == "X"
    assert (await probe.unary("x", metadata=(("authorization", f"bearer {TOKEN}"),))).value == "X"


async def test_health_needs_no_token_and_reflection_does(probe_server):
    probe = await probe_server(token=TOKEN)

    check = health_pb2_grpc.HealthStub(probe.channel).Check(health_pb2.HealthCheckRequest())
    assert (await check).status == SERVING
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    listed = reflection_pb2_grpc.ServerReflectionStub(probe.channel).ServerReflectionInfo(iter([listing]))
    assert (await refusal(listed))[1] == "TOKEN_INVALID"


def test_gate_takes_bytes_and_text():
    gate = TokenGate("ab")
    gate.check([("authorization", b"Bearer ab")])
    with pytest.raises(TokenInvalid):
        gate.check([("authorization", "Bearer \u00e9")])
    TokenGate(None).check([])


def test_token_file_is_read_without_its_line_end(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")

    assert read_token(path) == TOKEN


@pytest.mark.parametrize("content", [b"", b"short", b"with a space in between here", b"\xff" * 32, None])
def test_unusable_token_file_is_refused_naming_the_remedy(tmp_path, content):
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(TokenFileInvalid, match=r"--token-file|openssl rand"):
        read_token(path)


# TLS


async def test_tls_with_token_serves(probe_server, certificate):
    tls = read_tls(*certificate)
    credentials = grpc.ssl_channel_credentials(tls.cert)
    probe = await probe_server(listen="localhost:0", tls=tls, token=TOKEN, credentials=credentials)

    assert (await probe.unary("x", metadata=BEARER, timeout=5)).value == "X"
    assert await refusal(probe.unary("x", timeout=5)) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")


async def test_plain_client_gets_nowhere_with_tls(probe_server, certificate):
    tls = read_tls(*certificate)
    probe = await probe_server(tls=tls, token=TOKEN, credentials=grpc.ssl_channel_credentials(tls.cert))

    async with grpc.aio.insecure_channel(probe.server.address) as plain:
        call = plain.unary_unary(f"/{SERVICE}/Unary")(b"", metadata=BEARER, timeout=5)
        assert (await refusal(call))[0] is grpc.StatusCode.UNAVAILABLE


def test_key_of_another_certificate_is_refused(tmp_path, certificate):
    other = tmp_path / "other.pem"
    command = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-out", str(other)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)

    with pytest.raises(TlsFileInvalid, match="--tls-key"):
        read_tls(certificate[0], other)
    with pytest.raises(TlsFileInvalid, match="--tls-cert"):
        read_tls(tmp_path / "missing.pem", certificate[1])


def test_encrypted_key_is_refused_without_asking_for_a_password(tmp_path, certificate):
    locked = tmp_path / "locked.pem"
    command = ["openssl", "ec", "-in", str(certificate[1]), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)

    with pytest.raises(TlsFileInvalid, match="unencrypted"):
        read_tls(certificate[0], locked)


# Where a server may listen


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:0", True),
        ("127.8.9.1:7470", True),
        ("localhost:0", True),
        ("[::1]:0", True),
        ("unix:/run/x.sock", True),
        ("0.0.0.0:7470", False),
        ("[::]:7470", False),
        (":7470", False),
        ("10.0.0.1:7470", False),
        ("example.org:7470", False),
        ("localhost.example.org:7470", False),
    ],
)
def test_loopback(listen, expected):
    assert is_loopback(listen) is expected


@pytest.mark.parametrize("flaw", [{}, {"token": TOKEN}, {"tls": True}])
@pytest.mark.parametrize("flag", ["listen", "metrics_listen"])
async def test_listening_beyond_loopback_is_refused_naming_the_flags(probe_server, certificate, flaw, flag):
    if "tls" in flaw:
        flaw = {"tls": read_tls(*certificate)}

    with pytest.raises(ListenRefused) as refused:
        await probe_server(**{flag: "0.0.0.0:0"}, **flaw)

    for remedy in ("--token-file", "--tls-cert", "--tls-key", "--insecure", "--" + flag.replace("_", "-")):
        assert remedy in str(refused.value)


async def test_insecure_or_protected_servers_may_listen_everywhere(probe_server, certificate):
    tls = read_tls(*certificate)

    open_to_all = await probe_server(listen="0.0.0.0:0", insecure=True)
    assert open_to_all.server.address.startswith("0.0.0.0:")
    credentials = grpc.ssl_channel_credentials(tls.cert)
    await probe_server(listen="0.0.0.0:0", token=TOKEN, tls=tls, credentials=credentials)


@pytest.mark.parametrize("listen", ["", "7470", "host", "host:port", "::1:80", "127.0.0.1:70000", "unix:", "a:-1"])
async def test_malformed_address_is_refused(probe_server, listen):
    with pytest.raises(AddressInvalid, match="--listen"):
        await probe_server(listen=listen, insecure=True)


def test_address_is_split():
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address(":80") == ("", 80)


async def test_taken_port_is_refused(probe_server):
    first = await probe_server()

    with pytest.raises(ListenFailed, match="--listen"):
        await probe_server(listen=first.server.address)


async def test_unix_socket_is_served(probe_server, tmp_path):
    probe = await probe_server(listen=f"unix:{tmp_path}/s")

    assert probe.server.address == f"unix:{tmp_path}/s"
    assert (await probe.unary("x")).value == "X"


async def test_ready_file_holds_the_bound_address_while_serving(probe_server, tmp_path):
    ready = tmp_path / "ready"
    probe = await probe_server(ready_file=ready)

    assert ready.read_text() == probe.server.address
    assert not probe.server.address.endswith(":0")
    await probe.server.stop()
    assert list(tmp_path.iterdir()) == []


async def test_unwritable_ready_file_stops_the_start(tmp_path):
    server, _, _, _ = make_server(
        ServerOptions(listen="127.0.0.1:0", ready_file=tmp_path / "no" / "ready"), handle_signals=False
    )

    with pytest.raises(ReadyFileInvalid, match="--ready-file"):
        await server.start()


# Metrics


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        return answer.read().decode()


async def test_metrics_are_scraped_over_http(probe_server):
    probe = await probe_server(metrics_listen="127.0.0.1:0")
    await probe.unary("x")
    await refusal(probe.unary("missing"))
    await probe.rpc_lines(2)
    call = probe.stream("Generate", "1 wait")
    await call.read()
    probe.metrics.sent(f"/{SERVICE}/Generate", 4096, 16)

    text = await asyncio.to_thread(scrape, probe.server.metrics_address)

    unary, generate = f'method="/{SERVICE}/Unary"', f'method="/{SERVICE}/Generate"'
    assert f'headrace_rpcs_total{{code="OK",{unary}}} 1.0' in text
    assert f'headrace_rpcs_total{{code="NOT_FOUND",{unary}}} 1.0' in text
    assert f'headrace_rpc_seconds_count{{code="OK",{unary}}} 1.0' in text
    assert f"headrace_streams_open{{{generate}}} 1.0" in text
    assert f"headrace_bytes_sent_total{{{generate}}} 4096.0" in text
    assert f"headrace_rows_sent_total{{{generate}}} 16.0" in text
    assert "process_resident_memory_bytes" in text
    call.cancel()


async def test_metrics_beyond_loopback_ask_for_the_servers_tls_and_token(probe_server, certificate):
    tls = read_tls(*certificate)
    probe = await probe_server(
        metrics_listen="0.0.0.0:0", token=TOKEN, tls=tls, credentials=grpc.ssl_channel_credentials(tls.cert)
    )
    port = probe.server.metrics_address.rpartition(":")[2]
    context = ssl.create_default_context(cafile=certificate[0])

    def scraped(scheme: str, token: str) -> str:
        asked = urllib.request.Request(
            f"{scheme}://localhost:{port}/metrics", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(asked, timeout=5, context=context if scheme == "https" else None) as answer:
            return answer.read().decode()

    with socket.create_connection(("127.0.0.1", int(port))):  # A silent peer holds nobody up.
        assert "process_resident_memory_bytes" in await asyncio.to_thread(scraped, "https", TOKEN)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            await asyncio.to_thread(scraped, "https", "wrong-horse-battery-staple")
        with pytest.raises(OSError, match=r"closed|reset|Remote"):
            await asyncio.to_thread(scraped, "http", TOKEN)


async def test_taken_metrics_port_is_refused(probe_server):
    first = await probe_server(metrics_listen="127.0.0.1:0")

    with pytest.raises(ListenFailed, match="--metrics-listen"):
        await probe_server(metrics_listen=first.server.metrics_address)


async def test_metrics_stop_with_the_server(probe_server):
    probe = await probe_server(metrics_listen="127.0.0.1:0")
    address = probe.server.metrics_address

    await probe.server.stop()

    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(scrape, address)


def test_options_refuse_limits_that_make_no_server():
    with pytest.raises(ValueError, match="positive"):
        ServerOptions(listen="127.0.0.1:0", max_streams=0)


def test_secrets_stay_out_of_the_options_text(certificate):
    options = ServerOptions(listen="127.0.0.1:0", token=TOKEN, tls=read_tls(*certificate))

    assert TOKEN not in repr(options)
    assert "PRIVATE KEY" not in repr(options)
