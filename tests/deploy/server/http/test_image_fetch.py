"""Pictures by URL: the allowed hosts, their public addresses, and nothing else, not one packet."""

from __future__ import annotations

import http.server
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from deploy.server.requests import picture, png
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.http import image_fetch as module
from mmi_deploy.server.http.image_fetch import ImageFetch
from mmi_deploy.server.http.picture_store import PATH, PictureStore

HOST = "pictures.example"
PUBLIC = "93.184.216.34"
FILE = png(picture(1))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Collects what would have been sent: connections and look-ups of names."""
    tried: list[object] = []

    def guard(*args: object, **_: object) -> Any:
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", guard)
    monkeypatch.setattr(socket, "create_connection", guard)
    monkeypatch.setattr(socket, "getaddrinfo", guard)
    return tried


def refused(fetch: ImageFetch, url: str) -> str:
    with pytest.raises(ApiError) as told:
        fetch(url)
    assert told.value.status == 400 and told.value.retry_after is None
    return told.value.message


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        f"http://{HOST}/a.png",
        "https://169.254.169.254/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://localhost/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://other.example/a.png",
        f"https://{HOST}.evil.example/",
        f"https://evil.example/{HOST}",
        f"https://{HOST}@evil.example/",
        f"https://user:pass@{HOST}/",
        f"https://@{HOST}/",
        f"https://{HOST}:22/",
        f"https://{HOST}:99999/",
        f"https://{HOST}:x/",
        f"https://{HOST}/a b",
        f"https://{HOST}/a\r\nHost: evil",
        f"https://{HOST}/\u00e9",
        f"https://evil.example\\@{HOST}/",
        f"https://evil.example#@{HOST}/",
        "https:///a.png",
        "https://[/",
        f"//{HOST}/a.png",
        f"ftp://{HOST}/a.png",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_",
        "",
    ],
)
def test_other_addresses_are_refused_without_a_packet(no_network: list[object], url: str) -> None:
    message = refused(ImageFetch([HOST], 1000), url)
    assert no_network == []
    assert "evil" not in message and "169.254" not in message


@pytest.mark.parametrize(
    "addresses",
    [
        [],
        ["127.0.0.1"],
        ["10.0.0.1"],
        ["172.16.0.1"],
        ["192.168.1.1"],
        ["169.254.169.254"],
        ["100.64.0.1"],
        ["0.0.0.0"],
        ["224.0.0.1"],
        ["255.255.255.255"],
        ["::1"],
        ["fe80::1%eth0"],
        ["fc00::1"],
        ["::ffff:127.0.0.1"],
        ["::ffff:169.254.169.254"],
        ["ff02::1"],
        ["::"],
        ["64:ff9b::7f00:1"],
        ["2002:7f00:1::"],
        [PUBLIC, "10.0.0.1"],
        ["10.0.0.1", PUBLIC],
        ["not an address"],
    ],
    ids=str,
)
def test_a_name_must_lead_to_public_addresses_alone(
    no_network: list[object], addresses: list[str]
) -> None:
    fetch = ImageFetch([HOST], 1000, resolve=lambda host, port: addresses)
    assert "public address" in refused(fetch, f"https://{HOST}/a.png")
    assert no_network == []


def test_the_connection_goes_to_the_address_that_was_checked(no_network: list[object]) -> None:
    """A name that leads elsewhere at the second look-up leads nowhere."""
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return [PUBLIC] if len(asked) == 1 else ["127.0.0.1"]

    fetch = ImageFetch([HOST.upper() + "."], 1000, resolve=resolve)
    assert "cannot be fetched" in refused(fetch, f"https://{HOST}/a.png")
    assert asked == [HOST]
    [((address, port), *_)] = no_network
    assert (address, port) == (PUBLIC, 443)


# A TLS server of this machine, which stands for a public one.


class Host:
    """Answers of the host, and the paths that it was asked for."""

    def __init__(self) -> None:
        self.answer: Callable[[http.server.BaseHTTPRequestHandler], None] = self.picture
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.port = 0
        self.context = ssl.create_default_context()

    def picture(self, request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("content-length", str(len(FILE)))
        request.end_headers()
        request.wfile.write(FILE)

    def fetch(self, most: int = 100_000, **options: Any) -> ImageFetch:
        options = {"context": self.context, "resolve": lambda *_: ["127.0.0.1"], **options}
        return ImageFetch([HOST], most, port=self.port, **options)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not here to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    key, file = folder / "key.pem", folder / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", str(key), "-out", str(file), "-days", "2"]
    command += ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
    subprocess.run(command, check=True, capture_output=True)
    return file, key


@pytest.fixture
def host(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    found = Host()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.paths.append(self.path)
            found.headers.append(dict(self.headers))
            try:
                found.answer(self)
            except OSError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*map(str, certificate))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    found.port = server.server_address[1]
    found.context.load_verify_locations(str(certificate[0]))
    # The only way to reach it: it is not public.
    monkeypatch.setattr(module, "_is_public", lambda address: True)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()


def test_a_picture_is_fetched_by_its_name(host: Host) -> None:
    assert host.fetch()(f"https://{HOST}/a/b.png?size=1&x=%20") == FILE
    assert host.paths == ["/a/b.png?size=1&x=%20"]
    assert host.headers[0]["Host"].partition(":")[0] == HOST
    assert "Authorization" not in host.headers[0] and "Cookie" not in host.headers[0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(host: Host, status: int) -> None:
    def redirect(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("location", f"https://{HOST}/elsewhere")
        request.end_headers()

    host.answer = redirect
    assert str(status) in refused(host.fetch(), f"https://{HOST}/a.png")
    assert len(host.paths) == 1


def test_errors_of_the_host_are_refusals(host: Host) -> None:
    host.answer = lambda request: request.send_error(500, "secret reason")
    assert "secret" not in refused(host.fetch(), f"https://{HOST}/a.png")

    def nonsense(request: http.server.BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"this is not HTTP\r\n\r\n")

    host.answer = nonsense
    assert "cannot be fetched" in refused(host.fetch(), f"https://{HOST}/a.png")


@pytest.mark.parametrize("declared", [True, False])
def test_a_file_above_the_limit_is_given_up(host: Host, declared: bool) -> None:
    sent = 0

    def endless(request: http.server.BaseHTTPRequestHandler) -> None:
        nonlocal sent
        request.send_response(200)
        if declared:
            request.send_header("content-length", str(10**9))
        request.end_headers()
        while True:
            request.wfile.write(bytes(65_536))
            sent += 65_536

    host.answer = endless
    assert "too large" in refused(host.fetch(100_000), f"https://{HOST}/a.png")
    time.sleep(0.2)
    assert sent < 20 * 2**20


@pytest.mark.timing
def test_a_slow_host_is_given_up_in_time(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.6)

    def slow(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        for _ in range(100):
            request.wfile.write(b"a")
            time.sleep(0.1)

    host.answer = slow
    begun = time.monotonic()
    refused(host.fetch(), f"https://{HOST}/a.png")
    assert time.monotonic() - begun < 3

    def slow_head(request: http.server.BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(100):
            request.wfile.write(b"x-%d: a\r\n" % number)
            time.sleep(0.1)

    host.answer = slow_head
    begun = time.monotonic()
    refused(host.fetch(), f"https://{HOST}/a.png")
    assert time.monotonic() - begun < 3


def test_a_certificate_of_another_name_is_refused(host: Host) -> None:
    fetch = ImageFetch(
        ["other.example"],
        1000,
        resolve=lambda *_: ["127.0.0.1"],
        context=host.context,
        port=host.port,
    )
    assert "cannot be fetched" in refused(fetch, "https://other.example/a.png")
    assert host.paths == []
    # Nor one that nobody vouches for.
    fetch = host.fetch(context=ssl.create_default_context())
    assert "cannot be fetched" in refused(fetch, f"https://{HOST}/a.png")


# Pictures that the server keeps.


def test_kept_pictures_go_after_their_time_and_the_oldest_first() -> None:
    now = 0.0
    store = PictureStore(10.0, 100, clock=lambda: now)
    first = store.put(b"a" * 60, "image/png", "one")
    assert first.startswith(PATH) and len(first) == len(PATH) + 32
    found = store.get(first.removeprefix(PATH), "one")
    assert found is not None and (found.data, found.mime) == (b"a" * 60, "image/png")
    second = store.put(b"b" * 60, "image/png", "one").removeprefix(PATH)
    assert store.get(first.removeprefix(PATH), "one") is None
    assert store.bytes == 60
    now = 9.9
    assert store.get(second, "one") is not None
    now = 10.1
    assert store.get(second, "one") is None and store.bytes == 0


def test_a_kept_picture_is_its_tenants_alone() -> None:
    store = PictureStore(10.0, 100)
    name = store.put(b"a", "image/png", "one").removeprefix(PATH)
    assert store.get(name, "two") is None and store.get(name, "") is None
    assert store.get(name, "one") is not None
    assert store.get("", "one") is None and store.get("../" + name, "one") is None


def test_a_picture_larger_than_the_budget_is_not_kept() -> None:
    store = PictureStore(10.0, 100)
    store.put(b"a" * 101, "image/png", "")
    assert store.bytes == 0


def test_names_of_pictures_do_not_repeat() -> None:
    store = PictureStore(10.0, 10**6)
    names = {store.put(b"a", "image/png", "") for _ in range(1000)}
    assert len(names) == 1000
