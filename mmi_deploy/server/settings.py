"""Settings of the server, from the command line."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mmi_deploy.errors import ConfigError


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request; each is checked before what it limits is decoded or computed.

    body_bytes: of the JSON. parts: texts, pictures and places to draw. text_bytes: of all texts.
    image_bytes: of one picture's file. image_pixels: of one picture, by its header. images:
    given and drawn; None for the model's. tokens: text tokens to write; None for the model's
    context. seconds: until the request is ended.
    """

    body_bytes: int = 64 * 2**20
    parts: int = 1024
    text_bytes: int = 2**20
    image_bytes: int = 20 * 2**20
    image_pixels: int = 64_000_000
    images: int | None = None
    tokens: int | None = None
    seconds: float = 600.0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a limit that is not positive."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ConfigError(
                    f"the limit {field.name} is out of range", expected="above 0", got=value
                )


@dataclass(frozen=True)
class StreamRules:
    """Rules of event streams.

    keep_alive: seconds of silence after which something is sent; 0 for never. event_bytes: largest
    line of a stream for the transports `chunked` and `url`. slow_client: seconds after which a
    client that does not read is cancelled. buffer_bytes, buffer_events: of one client.
    """

    keep_alive: float = 15.0
    event_bytes: int = 65_536
    slow_client: float = 30.0
    buffer_bytes: int = 4 * 2**20
    buffer_events: int = 64
