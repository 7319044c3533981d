"""Connections that no client should make: floods, slowness, smuggling, pipelines."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.server.requests import CHAT, chat, check_error_body
from deploy.server.scripted_engine import Script
from deploy.server.server_process import (
    SCRIPTED_ENGINE,
    ServerProcess,
    read_all,
    read_response,
    request_bytes,
    responses_of,
    wait_until,
)

BODY = json.dumps(chat(tokens=1)).encode()
LIVE = request_bytes("/health/live", method="GET")


@pytest.fixture(scope="module")
def hasty(bundle: Path) -> Iterator[ServerProcess]:
    """A server that waits half a second for heads and bodies."""
    settings = {"header_seconds": 0.5, "body_seconds": 0.5}
    with ServerProcess(bundle, settings=settings, engine=SCRIPTED_ENGINE) as started:
        yield started


def post(*headers: str, body: bytes = BODY) -> bytes:
    """A request whose framing is in `headers`."""
    lines = [f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


SMUGGLED = request_bytes("/v1/models", method="GET")


@pytest.mark.parametrize(
    "data",
    [
        post(f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked", body=chunked(BODY)),
        post("Transfer-Encoding: chunked", f"Content-Length: {len(BODY)}", body=chunked(BODY)),
        post(f"Content-Length: {len(BODY)}", "Content-Length: 5"),
        post(f"Content-Length: {len(BODY)}", f"Content-Length: {len(BODY)}"),
        post(f"Content-Length: {len(BODY)}, 5"),
        post(f"Content-Length: +{len(BODY)}"),
        post("Content-Length: -1"),
        post("Content-Length: 0x10"),
        post("Content-Length: 99999999999999999999999"),
        post(f"Content-Length : {len(BODY)}"),
        post(f"Content-Length: {len(BODY)}", " folded: 1"),
        post("Transfer-Encoding: chunked, identity", body=chunked(BODY)),
        post("Transfer-Encoding: xchunked", body=chunked(BODY)),
        post("Transfer-Encoding: chunked", body=b"zz\r\n" + BODY),
        post("Transfer-Encoding: chunked", body=b"-5\r\n" + BODY),
        post("Transfer-Encoding: chunked", body=b"ffffffffffffffffff\r\n" + BODY),
        post(f"Content-Length: {len(BODY)}").replace(b"\r\n", b"\n"),
        post(f"Content-Length: {len(BODY)}").replace(b"Host", b"X: a\rb\r\nHost"),
        post(f"Content-Length: {len(BODY)}", "X\x00: a"),
        post(f"Content-Length: {len(BODY)}", "X: a\x00b"),
        b"GET /health/live HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /health/live SPDY/3\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"\x00" * 100,
        b"BREW /pot HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=[str(number) for number in range(27)],
)
def test_what_two_parsers_could_read_differently_is_refused(
    hasty: ServerProcess, data: bytes
) -> None:
    """And the connection closed, so that nothing after it is read as a request."""
    answers = responses_of(hasty.exchange(data + SMUGGLED))
    assert [status for status, _, _ in answers] == [400]
    [(status, headers, body)] = answers
    assert check_error_body(body, headers, status)["code"] == "invalid_http"
    assert headers["connection"] == "close"


def test_pipelined_requests_are_answered_in_order(server: ServerProcess) -> None:
    last = request_bytes("/version", b"", "Connection: close", method="GET")
    first = request_bytes(CHAT, BODY)
    answers = responses_of(
        server.exchange(first + LIVE + request_bytes("/nowhere", method="GET") + last)
    )
    assert [status for status, _, _ in answers] == [200, 200, 404, 200]
    assert json.loads(answers[0][2])["object"] == "chat.completion"
    assert json.loads(answers[1][2]) == {"status": "live"}
    assert len({headers["x-request-id"] for _, headers, _ in answers}) == 4


def test_what_follows_a_request_does_not_get_into_its_answer(scripted: ServerProcess) -> None:
    body = json.dumps(chat(seed=Script.SLOW, stream=True)).encode()
    with scripted.connect() as sock:
        sock.sendall(request_bytes(CHAT, body))
        first = sock.recv(100)
        assert first.startswith(b"HTTP/1.1 200")
        sock.sendall(b"\x00garbage\r\n\r\n")
        rest = read_all(sock)
    assert b"HTTP/1.1" not in rest


def test_a_client_that_leaves_is_noticed_behind_a_pipelined_request(
    scripted: ServerProcess,
) -> None:
    body = json.dumps(chat(seed=Script.HANG)).encode()
    with scripted.connect() as sock:
        sock.sendall(request_bytes(CHAT, body) + LIVE)
        wait_until(lambda: scripted.get("/health").json()["documents"])
    wait_until(lambda: not scripted.get("/health").json()["documents"], 3)


@pytest.mark.parametrize(
    "flood",
    [
        b"".join(b"x-%d: %s\r\n" % (number, b"a" * 100) for number in range(2000)),
        b"x: " + b"a" * 200_000 + b"\r\n",
        b"x" * 200_000 + b": a\r\n",
    ],
    ids=["many", "long value", "long name"],
)
def test_floods_of_headers_are_refused(server: ServerProcess, flood: bytes) -> None:
    data = server.exchange(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n" + flood)
    [(status, headers, body)] = responses_of(data)
    assert (status, headers["connection"]) == (431, "close")
    check_error_body(body, headers, status)


def test_a_flood_in_the_request_line_is_refused(server: ServerProcess) -> None:
    data = server.exchange(b"GET /" + b"a" * 200_000)
    assert [status for status, _, _ in responses_of(data)] == [431]


def test_an_endless_head_takes_no_memory(server: ServerProcess) -> None:
    before = server.memory()
    with server.connect() as sock:
        sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n")
        try:
            for _ in range(2000):
                sock.sendall(b"x: " + b"a" * 65_000 + b"\r\n")
        except OSError:
            pass
        else:
            pytest.fail("130 MB of headers were taken")
    assert server.memory() - before < 8 * 2**20


def test_endless_trailers_take_no_memory(scripted: ServerProcess) -> None:
    before = scripted.memory()
    with scripted.connect() as sock:
        sock.sendall(post("Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n"))
        try:
            for _ in range(1000):
                sock.sendall(b"x: " + b"a" * 65_000 + b"\r\n")
        except OSError:
            pass
        else:
            pytest.fail("65 MB of trailers were taken")
    assert scripted.memory() - before < 8 * 2**20


@pytest.mark.timing
def test_slow_heads_end_the_connection(hasty: ServerProcess) -> None:
    begun = time.monotonic()
    with hasty.connect() as sock:
        assert (
            drip(sock, b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n" + b"x: y\r\n" * 40)
            == b""
        )
    assert time.monotonic() - begun < 2


@pytest.mark.timing
def test_slow_heads_of_a_second_request_do_too(hasty: ServerProcess) -> None:
    with hasty.connect() as sock:
        sock.sendall(LIVE)
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        begun = time.monotonic()
        assert (
            drip(sock, b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n" + b"x: y\r\n" * 40)
            == b""
        )
    assert time.monotonic() - begun < 2


def drip(sock: socket.socket, data: bytes) -> bytes:
    """Send byte by byte until the server closes; returns what it sent."""
    sock.setblocking(True)
    try:
        for place in range(len(data)):
            sock.sendall(data[place : place + 1])
            sock.settimeout(0.02)
            try:
                return read_first(sock)
            except TimeoutError:
                sock.settimeout(10)
    except (ConnectionResetError, BrokenPipeError):
        return b""
    return read_all(sock)


def read_first(sock: socket.socket) -> bytes:
    first = sock.recv(65_536)
    return first + read_all(sock) if first else b""


@pytest.mark.timing
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_of_one_byte_now_and_then_is_refused(hasty: ServerProcess, framing: str) -> None:
    length = framing == "length"
    head = post(
        f"Content-Length: {len(BODY)}" if length else "Transfer-Encoding: chunked", body=b""
    )
    body = BODY if length else b"".join(b"1\r\n%c\r\n" % byte for byte in BODY)
    begun = time.monotonic()
    with hasty.connect() as sock:
        sock.sendall(head)
        [(status, headers, answer)] = responses_of(drip(sock, body))
    assert time.monotonic() - begun < 3
    assert (status, headers["connection"]) == (408, "close")
    assert check_error_body(answer, headers, status)["code"] == "body_timeout"


def test_a_chunked_body_that_never_ends_is_refused_in_time(hasty: ServerProcess) -> None:
    with hasty.connect() as sock:
        sock.sendall(post("Transfer-Encoding: chunked", body=b""))
        begun = time.monotonic()
        sock.settimeout(0)
        answer = b""
        while time.monotonic() - begun < 5 and not answer:
            try:
                sock.settimeout(0.02)
                answer = sock.recv(4096)
            except TimeoutError:
                sock.settimeout(5)
                sock.sendall(b"1\r\n \r\n" * 100)
    assert answer.startswith(b"HTTP/1.1 408")


def test_half_a_body_and_a_client_that_leaves_is_no_error(scripted: ServerProcess) -> None:
    with scripted.connect() as sock:
        request_id = "half-a-body"
        sock.sendall(request_bytes(CHAT, BODY, f"X-Request-Id: {request_id}")[:-20])
        time.sleep(0.1)
    line = scripted.logged(request_id)
    assert (line["status"], line["level"]) == (499, "info")


@pytest.mark.timing
def test_a_large_declared_body_is_refused_and_the_connection_closed(
    server: ServerProcess,
) -> None:
    begun = time.monotonic()
    data = server.exchange(post(f"Content-Length: {133 * 2**20}", body=b"{" + b" " * 100_000))
    [(status, headers, body)] = responses_of(data)
    assert (status, headers["connection"]) == (413, "close")
    assert check_error_body(body, headers, status)["code"] == "body_too_large"
    assert time.monotonic() - begun < 8


def test_expect_continue_is_answered_only_if_the_body_is_wanted(server: ServerProcess) -> None:
    headers = f"Content-Length: {len(BODY)}", "Expect: 100-continue", "Connection: close"
    with server.connect() as sock:
        sock.sendall(post(*headers, body=b""))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(BODY)
        assert read_all(sock).startswith(b"HTTP/1.1 200")
    refused = post(*headers, body=b"").replace(b"application/json", b"text/plain")
    assert server.exchange(refused).startswith(b"HTTP/1.1 415")


def test_http_1_0_is_answered_and_closed(server: ServerProcess) -> None:
    data = server.exchange(b"GET /health/live HTTP/1.0\r\nHost: localhost\r\n\r\n")
    [(status, headers, body)] = responses_of(data)
    assert (status, json.loads(body)) == (200, {"status": "live"})
    assert headers["connection"] == "close"
    request = request_bytes(CHAT, BODY).replace(b"HTTP/1.1", b"HTTP/1.0")
    [(status, headers, body)] = responses_of(server.exchange(request))
    assert status == 200 and int(headers["content-length"]) == len(body)


def test_connections_are_kept_for_the_next_request(server: ServerProcess) -> None:
    with server.connect() as sock:
        for _ in range(3):
            for request, status in ((LIVE, 200), (request_bytes("/no", method="GET"), 404)):
                sock.sendall(request)
                assert read_response(sock)[0] == status
        # An error in the middle of a body leaves the connection in order too.
        sock.sendall(request_bytes(CHAT, b"{}" + b" " * 200_000))
        assert read_response(sock)[0] == 400
        sock.sendall(LIVE)
        assert read_response(sock)[0] == 200


@pytest.mark.timing
def test_many_idle_connections_hold_nobody_up(server: ServerProcess) -> None:
    idle = [server.connect() for _ in range(300)]
    try:
        begun = time.monotonic()
        assert server.get("/health/live").status_code == 200
        assert time.monotonic() - begun < 1
    finally:
        for sock in idle:
            sock.close()


def test_upgrades_are_not_taken(server: ServerProcess) -> None:
    upgrade = "Connection: Upgrade, close", "Upgrade: websocket", "Sec-WebSocket-Version: 13"
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    data = server.exchange(request_bytes("/v1/models", b"", *upgrade, key, method="GET"))
    assert not data.startswith(b"HTTP/1.1 101")
    assert server.get("/health/live").status_code == 200


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_are_refused_in_openais_shape(server: ServerProcess, method: str) -> None:
    target = "localhost:1" if method == "CONNECT" else CHAT
    data = server.exchange(request_bytes(target, b"", "Connection: close", method=method))
    [(status, headers, body)] = responses_of(data)
    assert status == (400 if method == "CONNECT" else 405)
    check_error_body(body, headers, status)


@pytest.mark.parametrize(
    "path",
    [
        "/nowhere",
        "/v1",
        "/v1/",
        "/v1/models/",
        "/v1/chat/completions/",
        "/v1/models/a/b",
        "/page/../../etc/passwd",
        "/page/%2e%2e/%2e%2e/etc/passwd",
        "/page/..%2fstyle.css",
        "//etc/passwd",
        "/v1/mmi/images/",
        "/v1/mmi/images/../../metrics",
        "/docs",
        "/redoc",
        "/%00",
        "/\u00e9",
        "/v1/models?x=1#y",
        "/v1/mmi/images/" + "0" * 32,
    ],
)
def test_unknown_paths_are_404_in_openais_shape(server: ServerProcess, path: str) -> None:
    encoded = path.encode().decode("latin-1") if path.isascii() else "/%C3%A9"
    data = server.exchange(request_bytes(encoded, b"", "Connection: close", method="GET"))
    [(status, headers, body)] = responses_of(data)
    if path.startswith("/v1/models?"):
        assert status == 200
        return
    assert status == 404
    check_error_body(body, headers, status)
    assert headers["x-request-id"]


def test_head_is_get_without_a_body(server: ServerProcess) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/"):
        with server.client() as client:
            head, get = client.head(path), client.get(path)
        assert head.status_code == get.status_code
        assert head.content == b""
        assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.timing
def test_answers_on_a_kept_connection_do_not_wait_for_acknowledgements(
    scripted: ServerProcess,
) -> None:
    """Without TCP_NODELAY, every answer but the first takes 40 ms."""
    took = []
    with scripted.client() as client:
        for _ in range(40):
            begun = time.perf_counter()
            client.get("/health/live")
            took.append(time.perf_counter() - begun)
    assert sorted(took)[10] < 0.03
