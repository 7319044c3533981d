"""Server-sent events: the bytes of one event, and nothing that a client could stumble over.

One event is one `data:` line; `event:` precedes it on the endpoints where OpenAI sends it. Never
`id:` or `retry:`, with which the official client fails. JSON is ASCII: readers that split at U+2028
or U+0085, as `str.splitlines` does, see one line too.
"""

from __future__ import annotations

import json
from typing import Any

from mmi_deploy.server.api.errors import ApiError

# End of a stream of chat and completions.
DONE = b"data: [DONE]\n\n"

# Something to send while there is nothing to say; clients skip it.
KEEP_ALIVE_COMMENT = b": keep-alive\n\n"


def data(value: dict[str, Any]) -> bytes:
    """An event without a name."""
    return b"data: " + json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


def event(value: dict[str, Any]) -> bytes:
    """An event named by its `type`, as OpenAI's Responses and Images send them."""
    return b"event: " + str(value["type"]).encode() + b"\n" + data(value)


def error(failure: ApiError) -> bytes:
    """The event that ends a stream of chat, completions or images after a failure."""
    return data(failure.body())
