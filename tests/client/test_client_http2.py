"""A call over a socket of its own, against real gRPC servers and against peers that break the rules."""

import socket
import struct
import subprocess
import threading
from concurrent import futures
from contextlib import closing, suppress

import grpc
import h2.config
import h2.connection
import h2.events
import pytest

from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT
from headrace.extractor.v1 import extraction_service_pb2_grpc as service_grpc
from headrace_client import errors
from headrace_client.rpc.endpoint import Endpoint
from headrace_client.rpc.http2 import CallFailed, SocketCall
from headrace_client.rpc.security import Security
from headrace_client.rpc.sockets import connect

DEADLINE_S = 10.0
WINDOW_BYTES = 16 * 1024 * 1024
DATA, RST_STREAM, PING, GOAWAY = 0x0, 0x3, 0x6, 0x7
ANSWER = [(":status", "200"), ("content-type", "application/grpc")]
OK = [("grpc-status", "0")]
METHOD, FIELDS = "ExtractionService.StreamActivations", {"extraction_id": EXTRACTION_ID, "columns": [HOOKPOINT]}


def frame(kind, payload=b"", *, flags=0, stream_id=1):
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream_id) + payload


def message(payload, *, compressed=0):
    return struct.pack(">BI", compressed, len(payload)) + payload


class Peer:
    """The server's side of one connection, byte by byte: `script` is called with it once the request has come."""

    def __init__(self, script):
        self._script = script
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self.request = b""
        self.headers = {}
        self.credit = 0
        self.error = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        try:
            self.sock, _ = self._listening.accept()
            self.sock.settimeout(DEADLINE_S)
            with self.sock:
                self.h2.initiate_connection()
                self.flush()
                self.until(h2.events.StreamEnded)
                self._script(self)
                with suppress(OSError):
                    self.sock.shutdown(socket.SHUT_WR)
                    while self.sock.recv(65536):  # Unread bytes would reset the connection, and lose the answer.
                        pass
        except Exception as exc:  # noqa: BLE001 - raised again in the test's own thread
            self.error = exc

    def until(self, kind):
        """Reads until an event of this kind came."""
        seen = False
        while not seen:
            data = self.sock.recv(65536)
            assert data, "the client hung up"
            for event in self.h2.receive_data(data):
                seen = seen or isinstance(event, kind)
                if isinstance(event, h2.events.RequestReceived):
                    self.headers = dict(event.headers)
                elif isinstance(event, h2.events.DataReceived):
                    self.request += event.data
                elif isinstance(event, h2.events.WindowUpdated) and event.stream_id == 1:
                    self.credit += event.delta
            self.flush()

    def wait_for_credit(self):
        """Waits until the client gives credit, and takes it."""
        while not self.credit:
            self.until(h2.events.WindowUpdated)
        credit, self.credit = self.credit, 0
        return credit

    def flush(self):
        self.sock.sendall(self.h2.data_to_send())

    def send(self, *parts):
        self.flush()
        self.sock.sendall(b"".join(parts))

    def headers_frame(self, headers, **options):
        self.h2.send_headers(1, headers, **options)
        self.flush()

    def join(self):
        self._thread.join(DEADLINE_S)
        self._listening.close()
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error


@pytest.fixture
def call_to():
    """Calls a scripted peer; the peer's own assertions count."""
    peers, calls = [], []

    def call(script, *, request=b"question", max_message_bytes=1 << 20):
        peer = Peer(script)
        peers.append(peer)
        one = SocketCall(connect(peer.address, None), max_message_bytes)
        calls.append(one)
        one.start("/x.Y/Z", request, [("authorization", "Bearer t")], authority=peer.address, life_s=60.0)
        return one, peer

    yield call
    for one in calls:
        one.close()
    for peer in peers:
        peer.join()


def received(call):
    return [bytes(one) for one in call]


def test_the_request_is_a_grpc_call(call_to):
    def script(peer):
        peer.headers_frame([*ANSWER, ("grpc-status", "0")], end_stream=True)

    call, peer = call_to(script)

    assert received(call) == []
    assert peer.request == message(b"question")
    assert peer.headers[":path"] == "/x.Y/Z"
    assert peer.headers["content-type"] == "application/grpc"
    assert peer.headers["te"] == "trailers"
    assert peer.headers["grpc-timeout"] == "60S"
    assert peer.headers["authorization"] == "Bearer t"


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
def test_messages_are_whole_however_they_are_cut_into_frames(call_to, step):
    wanted = [b"a" * 10, b"", b"b" * 300, b"c"]
    stream = b"".join(message(one) for one in wanted)

    def script(peer):
        peer.headers_frame(ANSWER)
        peer.send(*(frame(DATA, stream[at : at + step]) for at in range(0, len(stream), step)))
        peer.headers_frame(OK, end_stream=True)

    assert received(call_to(script)[0]) == wanted


def test_padding_is_no_data(call_to):
    whole = message(b"abcdef")

    def script(peer):
        peer.headers_frame(ANSWER)
        peer.send(frame(DATA, bytes([3]) + whole[:7] + b"xxx", flags=0x8), frame(DATA, b"\0" + whole[7:], flags=0x8))
        peer.headers_frame(OK, end_stream=True)

    assert received(call_to(script)[0]) == [b"abcdef"]


def test_a_message_larger_than_the_window_comes_through(call_to):
    size = WINDOW_BYTES + 1_000_000

    def script(peer):
        peer.headers_frame(ANSWER)
        whole, credit, at = message(bytes(size)), WINDOW_BYTES, 0
        while at < len(whole):
            part = whole[at : at + min(credit, 1 << 20)]
            peer.send(frame(DATA, part))
            credit, at = credit - len(part), at + len(part)
            credit = credit or peer.wait_for_credit()
        peer.headers_frame(OK, end_stream=True)

    assert [len(one) for one in call_to(script, max_message_bytes=2 * size)[0]] == [size]


def test_pings_are_answered_while_nobody_takes_messages(call_to):
    acknowledged = threading.Event()

    def script(peer):
        peer.headers_frame(ANSWER)
        peer.send(frame(DATA, message(b"first")), frame(DATA, message(b"second")), frame(PING, bytes(8), stream_id=0))
        data = peer.sock.recv(65536)
        while b"\x00\x00\x08\x06\x01" not in data:
            data += peer.sock.recv(65536)
        acknowledged.set()
        peer.headers_frame(OK, end_stream=True)

    call, _ = call_to(script)
    assert bytes(next(call)) == b"first"
    while not acknowledged.wait(0.01):
        call.tend()

    assert received(call) == [b"second"]


def test_tending_gives_no_credit(call_to):
    given, tended = [], threading.Event()

    def script(peer):
        peer.headers_frame(ANSWER)
        part = bytes(1 << 20)
        whole = message(bytes(WINDOW_BYTES - 5))
        peer.send(*(frame(DATA, whole[at : at + len(part)]) for at in range(0, len(whole), len(part))))
        peer.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            peer.wait_for_credit()
        peer.sock.settimeout(DEADLINE_S)
        tended.set()
        given.append(peer.wait_for_credit())
        peer.headers_frame(OK, end_stream=True)

    call, _ = call_to(script, max_message_bytes=WINDOW_BYTES)
    while not tended.is_set():
        call.tend()

    assert received(call) == [bytes(WINDOW_BYTES - 5)]
    assert given == [WINDOW_BYTES]


def test_a_server_that_goes_away_may_end_its_calls(call_to):
    def script(peer):
        peer.headers_frame(ANSWER)
        peer.send(frame(DATA, message(b"one")), frame(GOAWAY, struct.pack(">II", 1, 0), stream_id=0))
        peer.send(frame(PING, bytes(8), stream_id=0), frame(DATA, message(b"two")))
        peer.headers_frame(OK, end_stream=True)

    assert received(call_to(script)[0]) == [b"one", b"two"]


@pytest.mark.parametrize(
    ("headers", "code", "text"),
    [
        ([*ANSWER, ("grpc-status", "8"), ("grpc-message", "a%20b%C3%A9")], "RESOURCE_EXHAUSTED", "a bé"),
        ([*ANSWER, ("grpc-status", "99")], "UNKNOWN", "UNKNOWN"),
        ([(":status", "503"), ("content-type", "text/html")], "UNAVAILABLE", "HTTP status 503"),
        ([(":status", "401")], "UNAUTHENTICATED", "HTTP status 401"),
        (ANSWER, "UNAVAILABLE", "without a status"),
    ],
)
def test_a_call_that_fails_says_why(call_to, headers, code, text):
    call, _ = call_to(lambda peer: peer.headers_frame(headers, end_stream=True))

    with pytest.raises(CallFailed, match=text) as failed:
        next(call)
    assert failed.value.code == code


@pytest.mark.parametrize("end", [0x0, 0x1], ids=["stays open", "ends"])
@pytest.mark.parametrize(
    ("status", "code"),
    [("401", "UNAUTHENTICATED"), ("403", "PERMISSION_DENIED"), ("502", "UNAVAILABLE"), ("200", "UNKNOWN")],
)
def test_a_page_of_a_proxy_is_no_message_however_it_ends(call_to, status, code, end):
    def script(peer):
        peer.headers_frame([(":status", status), ("content-type", "text/html")])
        peer.send(frame(DATA, b"<html>" * 100), frame(DATA, b"", flags=end))

    call, _ = call_to(script)

    with pytest.raises(CallFailed, match=f"HTTP status {status} and text/html") as failed:
        next(call)
    assert (failed.value.code, failed.value.http_status) == (code, status)


def test_an_answer_that_ends_with_its_data_has_no_status(call_to):
    def script(peer):
        peer.headers_frame(ANSWER)
        peer.send(frame(DATA, message(b"one")), frame(DATA, b"", flags=0x1))
        peer.sock.recv(1)  # The connection stays open.

    call, _ = call_to(script)

    assert bytes(next(call)) == b"one"
    with pytest.raises(CallFailed, match="without a status"):
        next(call)


@pytest.mark.parametrize(
    ("answer", "code", "text"),
    [
        (frame(DATA, message(b"x", compressed=1)), "INTERNAL", "compressed"),
        (frame(DATA, struct.pack(">BI", 0, 2_000_000)), "RESOURCE_EXHAUSTED", "larger than max"),
        (frame(RST_STREAM, struct.pack(">I", 7)), "UNAVAILABLE", "reset the call"),
        (frame(GOAWAY, struct.pack(">II", 0, 0) + b"full", stream_id=0), "UNAVAILABLE", "goes away: full"),
        (frame(PING, b"short", stream_id=0), "UNAVAILABLE", "rules of HTTP/2"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "UNAVAILABLE", "does not speak HTTP/2"),
        (frame(DATA, message(b"whole")[:-1]), "UNAVAILABLE", "closed"),
    ],
)
def test_what_breaks_a_call_says_so(call_to, answer, code, text):
    def script(peer):
        peer.headers_frame(ANSWER)
        peer.send(answer)

    call, _ = call_to(script)

    with pytest.raises(CallFailed, match=text) as failed:
        next(call)
    assert failed.value.code == code


def test_what_broke_while_nobody_read_comes_behind_the_whole_messages(call_to):
    sent = threading.Event()

    def script(peer):
        peer.headers_frame(ANSWER)
        peer.send(frame(DATA, message(b"ready")))
        sent.wait(DEADLINE_S)
        peer.send(frame(DATA, message(b"whole")), frame(DATA, message(b"half")[:-2]))

    call, _ = call_to(script)
    assert bytes(next(call)) == b"ready"
    sent.set()
    while call._failed is None:
        call.tend()

    assert bytes(next(call)) == b"whole"
    for _ in range(2):
        with pytest.raises(CallFailed, match="closed"):
            next(call)


def test_cancel_ends_the_wait_of_another_thread(call_to):
    ended = threading.Event()

    def script(peer):
        peer.headers_frame(ANSWER)
        with pytest.raises(AssertionError, match="hung up"):
            peer.until(h2.events.StreamReset)
        ended.set()

    call, _ = call_to(script)
    timer = threading.Timer(0.1, call.cancel)
    timer.start()

    with pytest.raises(CallFailed):
        next(call)
    timer.join()
    assert ended.wait(DEADLINE_S)


def test_nobody_at_the_address_is_unavailable():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    with pytest.raises(CallFailed, match="can't connect") as failed:
        connect(f"127.0.0.1:{port}", None)
    assert failed.value.code == "UNAVAILABLE"


@pytest.mark.parametrize("address", ["nothing", "host:port", ":80"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(CallFailed, match="no host:port"):
        connect(address, None)


@pytest.fixture
def serve(scripted_extractor):
    """Serves the scripted extractor with gRPC's own server at an address of the test's choice."""
    servers = []

    def start(address, credentials=None):
        server = grpc.server(futures.ThreadPoolExecutor(4))
        service_grpc.add_ExtractionServiceServicer_to_server(scripted_extractor, server)
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        server.start()
        servers.append(server)
        return port

    yield start
    for server in servers:
        server.stop(None).wait()


def test_rows_come_over_a_unix_socket(serve, scripted_extractor, tmp_path):
    address = f"unix:{tmp_path}/x.sock"
    serve(address)

    with closing(Endpoint(address, Security())) as endpoint, endpoint.raw_stream(METHOD, **FIELDS) as stream:
        assert sum(len(one) for one in stream) > scripted_extractor.column(HOOKPOINT).nbytes


@pytest.fixture(scope="session")
def make_certificate(tmp_path_factory):
    """Makes a key and a self-signed certificate for localhost."""

    def make():
        folder = tmp_path_factory.mktemp("tls")
        cert, key = folder / "cert.pem", folder / "key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost"]
        command += ["-addext", "subjectAltName=DNS:localhost"]
        subprocess.run(command, check=True, capture_output=True, timeout=30)
        return key.read_bytes(), cert.read_bytes()

    return make


def test_rows_come_over_tls_and_only_from_whom_the_root_vouches_for(serve, scripted_extractor, make_certificate):
    key, cert = make_certificate()
    port = serve("127.0.0.1:0", grpc.ssl_server_credentials([(key, cert)]))

    n_bytes = 0
    with (
        closing(Endpoint(f"localhost:{port}", Security(ca_pem=cert))) as endpoint,
        endpoint.raw_stream(METHOD, **FIELDS) as stream,
    ):
        for one in stream:
            n_bytes += len(one)
            stream.tend()
    assert n_bytes > scripted_extractor.column(HOOKPOINT).nbytes

    with (
        closing(Endpoint(f"localhost:{port}", Security(ca_pem=make_certificate()[1]))) as endpoint,
        pytest.raises(errors.Unavailable, match="CERTIFICATE_VERIFY_FAILED"),
        endpoint.raw_stream(METHOD, **FIELDS),
    ):
        pass
