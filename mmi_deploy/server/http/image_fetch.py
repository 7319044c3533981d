"""Fetch pictures from the hosts that the operator allowed: https alone, no redirects, public
addresses alone, and a connection to the very address that was checked."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from threading import Timer
from urllib.parse import urlsplit

from mmi_deploy.server.api.errors import ApiError

# Seconds for a picture, from the look-up of its host to its last byte.
SECONDS = 10.0

CHUNK = 65_536

# IPv6 networks of addresses that stand for IPv4 addresses of any kind: NAT64, 6to4, Teredo.
_TRANSLATED = tuple(
    map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))
)


class ImageFetch:
    """Reader of pictures by URL; every refusal is an `ApiError` 400."""

    def __init__(
        self,
        hosts: Collection[str],
        most_bytes: int,
        *,
        resolve: Callable[[str, int], list[str]] | None = None,
        context: ssl.SSLContext | None = None,
        port: int = 443,
    ) -> None:
        """hosts: allowed names. resolve: name and port to addresses. context, port: for tests."""
        self._hosts = {host.lower().rstrip(".") for host in hosts}
        self._most, self._port = most_bytes, port
        self._resolve = resolve or _addresses
        self._context = context or ssl.create_default_context()

    def __call__(self, url: str) -> bytes:
        """The file at `url`."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise _refused("is not a URL") from None
        if parts.scheme != "https" or parts.username is not None or port not in (None, 443):
            raise _refused("must be https://HOST/... without a user or a port")
        if host not in self._hosts:
            raise _refused("names a host that this server does not fetch from")
        path = parts.path or "/"
        target = f"{path}?{parts.query}" if parts.query else path
        if any(ord(letter) <= 32 or ord(letter) > 126 for letter in target):
            raise _refused("has characters that must be escaped")
        end = time.monotonic() + SECONDS
        try:
            return self._get(host, self._checked_address(host), target, end)
        except (OSError, http.client.HTTPException):
            raise _refused("cannot be fetched") from None

    def _checked_address(self, host: str) -> str:
        addresses = self._resolve(host, self._port)
        # All of them: a name with one public and one private address is a trap.
        if not addresses or not all(_is_public(address) for address in addresses):
            raise _refused("does not lead to a public address")
        return addresses[0]

    def _get(self, host: str, address: str, target: str, end: float) -> bytes:
        connection = _Connection(host, address, self._port, self._context, _left(end))
        try:
            connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "mmi"})
            response = connection.getresponse()
            if response.status != 200:  # a redirect would lead anywhere
                raise _refused(f"was answered with status {response.status}")
            data = bytearray()
            while chunk := response.read1(CHUNK):
                data += chunk
                if len(data) > self._most:
                    raise _refused(f"is too large; at most {self._most} bytes")
            _left(end)  # else it may have been cut
            return bytes(data)
        except (OSError, http.client.HTTPException):
            _left(end)
            raise
        finally:
            connection.end()


class _Connection(http.client.HTTPSConnection):
    """Connection to a given address in the name of a host, which is cut after `seconds` in all: the
    time of a socket begins anew with every byte."""

    def __init__(
        self, host: str, address: str, port: int, context: ssl.SSLContext, seconds: float
    ) -> None:
        super().__init__(host, port, context=context, timeout=seconds)
        self._address, self._tls = address, context
        self._cut: Timer | None = None

    def connect(self) -> None:
        """Connect without a second look-up of the name, which could give another address."""
        plain = socket.create_connection((self._address, self.port), self.timeout)
        try:
            self.sock = self._tls.wrap_socket(
                plain, server_hostname=self.host, do_handshake_on_connect=False
            )
        except BaseException:
            plain.close()
            raise
        self._cut = Timer(self.timeout or 0, _shut_down, [self.sock])
        self._cut.start()
        self.sock.do_handshake()

    def end(self) -> None:
        """Close the connection and stop its time. `close` is called before the body is read too."""
        if self._cut is not None:
            self._cut.cancel()
        self.close()


def _shut_down(sock: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _left(end: float) -> float:
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise _refused(f"took more than {SECONDS:g} seconds")
    return seconds


def _addresses(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if any(parsed in network for network in _TRANSLATED):
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_global and not parsed.is_multicast


def _refused(why: str) -> ApiError:
    return ApiError(400, "image_url", f"the address of a picture {why}", param="image_url")
