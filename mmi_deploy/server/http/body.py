"""JSON bodies of requests: read under limits of bytes and time, parsed strictly."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.types import Message, Receive, Scope

from mmi_deploy.server.api.errors import ApiError

# Larger bodies are parsed in a thread.
INLINE_BYTES = 2**18

# A body that is refused is read and dropped, as a client that is still sending would miss the
# answer; at most so many bytes, for so many seconds.
DROPPED_BYTES, DROPPED_SECONDS = 2**28, 5.0

# Digits of an integer beyond which Python takes quadratic time, and no field has a use for it.
MOST_DIGITS = 40


async def read_json(scope: Scope, receive: Receive, most: int, seconds: float) -> dict[str, Any]:
    """Read a JSON object of at most `most` bytes that arrives within `seconds`.

    Raises `ApiError`; `ConnectionError` if the client leaves before the end.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(
            415,
            "unsupported_media_type",
            "the body must be JSON; send the header content-type: application/json",
        )
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise ApiError(
            415, "unsupported_encoding", "the body must not be compressed (content-encoding)"
        )
    if int(headers.get(b"content-length", b"0")) > most:
        await _drop(receive)
        raise _too_large(most)
    try:
        body = await asyncio.wait_for(_read(receive, most), seconds)
    except TimeoutError:
        raise ApiError(408, "body_timeout", f"the body took more than {seconds:g} s") from None
    if len(body) <= INLINE_BYTES:
        return parse_json(body)
    return await asyncio.get_running_loop().run_in_executor(None, parse_json, body)


async def _read(receive: Receive, most: int) -> bytes:
    body = bytearray()
    while True:
        message = _body_of(await receive())
        body += message.get("body", b"")
        if len(body) > most:
            body.clear()
            if message.get("more_body"):
                await _drop(receive)
            raise _too_large(most)
        if not message.get("more_body"):
            return bytes(body)


async def _drop(receive: Receive) -> None:
    """Read the rest of a body and forget it."""

    async def rest() -> None:
        dropped, more = 0, True
        while more and dropped < DROPPED_BYTES:
            message = _body_of(await receive())
            dropped += len(message.get("body", b""))
            more = message.get("more_body", False)

    try:
        await asyncio.wait_for(rest(), DROPPED_SECONDS)
    except TimeoutError:
        pass


def _body_of(message: Message) -> Message:
    if message["type"] == "http.disconnect":
        raise ConnectionError("the client left")
    return message


def _too_large(most: int) -> ApiError:
    return ApiError(413, "body_too_large", f"the body is too large; at most {most} bytes")


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises `ApiError` also for what Python's parser would take: NaN, keys
    that come twice, numbers of thousands of digits."""
    try:
        parsed = json.loads(
            body.decode(),
            object_pairs_hook=_object,
            parse_constant=_not_a_number,
            parse_int=_integer,
            parse_float=_number,
        )
    except ApiError:
        raise
    except UnicodeDecodeError:
        raise _invalid("it is not UTF-8") from None
    except RecursionError:
        raise _invalid("it is nested too deeply") from None
    except ValueError as error:
        position = getattr(error, "pos", None)
        where = "" if position is None else f" (at character {position})"
        raise _invalid(f"it is not JSON{where}") from None
    if not isinstance(parsed, dict):
        raise _invalid("it is not an object")
    return parsed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _invalid("an object has a key twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise _invalid("a number is too long")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _invalid("a number is too large")
    return value


def _not_a_number(name: str) -> NoReturn:
    raise _invalid(f"{name} is not JSON")


def _invalid(why: str) -> ApiError:
    return ApiError(400, "invalid_json", f"the body cannot be read: {why}")
