"""Server-sent events: the bytes of one event, and nothing that a client could stumble over.

One event is one `data:` line; `event:` precedes it on the endpoints where OpenAI sends it. Never
`id:` or `retry:`, with which the official client fails. JSON is ASCII: readers that split at U+2028
or U+0085, as `str.splitlines` does, see one line too.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from mmi_deploy.errors import MmiError
from mmi_deploy.server.api.errors import ApiError, api_error_of

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


async def with_failure(
    items: AsyncGenerator[bytes], failure: Callable[[ApiError], bytes]
) -> AsyncIterator[bytes]:
    """The items, and the event of the error that they end with, if they have begun.

    An error before the first item is raised, as it can still be the answer's status. One that is no
    answer to the client, a fault of the server, is raised after its event, so that it is logged.
    """
    begun = False
    try:
        async with aclosing(items):  # a client that leaves ends them at once
            async for item in items:
                begun = True
                yield item
    except Exception as error:
        if not begun:
            raise
        yield failure(api_error_of(error))
        if not isinstance(error, ApiError | MmiError):
            raise
