"""API keys: read from a file or the environment, compared in constant time."""

from __future__ import annotations

import os
from collections.abc import Collection
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path

from mmi_deploy.errors import ConfigError
from mmi_deploy.system.files import open_regular

VARIABLE = "MMI_API_KEYS"

# Shorter keys could be guessed.
SHORTEST = 8


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Keys of a file, one per line, or of the environment variable, separated by commas.

    Empty lines and lines that begin with # are skipped. Raises `ConfigError`.
    """
    if path is not None:
        with open_regular(path) as file:
            text = file.read().decode(errors="replace")
        keys = [line.strip() for line in text.splitlines()]
        keys = [key for key in keys if key and not key.startswith("#")]
        if not keys:
            raise ConfigError(f"{path} has no key", expected="one per line")
    else:
        keys = [key.strip() for key in os.environ.get(VARIABLE, "").split(",") if key.strip()]
    for key in keys:
        if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                "an API key cannot be used", expected=f"{SHORTEST} or more printable characters"
            )
    return tuple(dict.fromkeys(keys))


class Keys:
    """Accepted keys, as digests of equal length."""

    def __init__(self, keys: Collection[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def tenant(self, key: str) -> str | None:
        """Name of the key's caches, which does not tell the key; None for an unknown key."""
        digest = sha256(key.encode(errors="replace")).digest()
        # All of them, whichever fits: the time must not tell.
        fits = [compare_digest(digest, other) for other in self._digests]
        return sha256(b"tenant" + digest).hexdigest()[:16] if any(fits) else None
