"""Settings of the server, from the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from ipaddress import ip_address
from math import inf

from mmi_deploy.errors import ConfigError


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request; each is checked before what it limits is decoded or computed.

    body_bytes: of the JSON. parts: texts, pictures and places to draw. text_bytes: of all texts.
    image_bytes: of one picture's file. image_pixels: of one picture, by its header; all_pixels: of
    all that are given. images: given and drawn; None for the model's. tokens: text tokens to write;
    None for the model's context. seconds: until the request is ended.
    """

    body_bytes: int = 64 * 2**20
    parts: int = 1024
    text_bytes: int = 2**20
    image_bytes: int = 20 * 2**20
    image_pixels: int = 64_000_000
    all_pixels: int = 256_000_000
    images: int | None = None
    tokens: int | None = None
    seconds: float = 600.0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a limit that is not positive and finite."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < inf:
                raise ConfigError(
                    f"the limit {field.name} is out of range",
                    expected="above 0, and finite",
                    got=value,
                )


@dataclass(frozen=True)
class StreamRules:
    """Rules of event streams.

    keep_alive: seconds of silence after which something is sent; 0 for never. event_bytes: largest
    line of a stream for the transports `chunked` and `url`. slow_client: seconds after which a
    client that does not read is cancelled. buffer_bytes: pictures that may wait for one client.
    """

    keep_alive: float = 15.0
    event_bytes: int = 65_536
    slow_client: float = 30.0
    buffer_bytes: int = 4 * 2**20

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a time that is negative or not finite."""
        for name in ("keep_alive", "slow_client"):
            value = getattr(self, name)
            if not 0 <= value < inf:
                raise ConfigError(
                    f"{name} is out of range", expected="0 or more seconds", got=value
                )


DEFAULT_RULES = StreamRules()


@dataclass(frozen=True)
class ServerSettings:
    """Settings of `mmi serve` beyond those of its engines.

    keys: accepted API keys; none for a server without keys. hosts: names in `Host` that a server
    without keys answers to, besides loopback's. origins: origins of other sites whose pages may
    call the API. image_hosts: hosts from which pictures may be fetched. queue: documents that may
    wait for a slot; queue_seconds: time that one may wait. drain_seconds: time that running
    documents get at the end. picture_seconds, picture_bytes: of pictures kept under a URL.
    header_seconds, body_seconds: time to send a request. share_cache: documents of different keys
    share caches. probe_seconds: time without a run after which an idle engine is tried; 0 never.
    stall_seconds: time without news from a busy engine after which the server is not ready.
    """

    limits: RequestLimits = RequestLimits()
    rules: StreamRules = StreamRules()
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    image_hosts: tuple[str, ...] = ()
    queue: int = 64
    queue_seconds: float = 600.0
    drain_seconds: float = 30.0
    picture_seconds: float = 3600.0
    picture_bytes: int = 256 * 2**20
    header_seconds: float = 20.0
    body_seconds: float = 60.0
    share_cache: bool = False
    probe_seconds: float = 0.0
    stall_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a host or an origin that no request could ever have."""
        for option, hosts in (
            ("--allow-host", self.hosts),
            ("--allow-image-host", self.image_hosts),
        ):
            for host in hosts:
                if not _is_host(host):
                    raise ConfigError(
                        f"{option} is no host",
                        expected="a name or an address alone, without https:// and port",
                        got=repr(host),
                    )
        for origin in self.origins:
            if origin != "null" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    "--allow-origin is no origin",
                    expected="https://HOST or https://HOST:PORT in small letters, without a path",
                    got=repr(origin),
                )


# Origins as browsers send them.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.\-]*://(?:[a-z0-9._\-]+|\[[0-9a-f:.]+\])(?::\d+)?")
_NAME = re.compile(r"[A-Za-z0-9._\-]+")


def _is_host(host: str) -> bool:
    """True for a name, and for an address without brackets."""
    try:
        ip_address(host)
    except ValueError:
        return _NAME.fullmatch(host) is not None
    return True
