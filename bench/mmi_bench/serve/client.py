"""HTTP client of the benchmark: sends a request and records the time of every event."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin

import aiohttp

from mmi_bench.serve.records import RequestEvent, RequestRecord
from mmi_bench.serve.sse import EventReader
from mmi_bench.serve.wire import PATHS, Endpoint, StreamReader
from mmi_deploy.errors import MmiError

# Statuses of a server that refuses work which it has no room for.
_REFUSED = (429, 503)

# Characters of an error's body that are kept.
_SHOWN = 500


class Client:
    """Client of one server; `async with` opens its connections.

    Connections are kept and their number is not limited, so that no request waits for another here.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 600.0) -> None:
        """url: root of the server, without /v1. timeout: seconds of silence of a stream."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=timeout)
        self._origin = time.perf_counter()

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=self._timeout,
            headers=self._headers,
            read_bufsize=2**20,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def now(self) -> float:
        """Seconds after the origin of this client's times."""
        return time.perf_counter() - self._origin

    async def generate(
        self, record: RequestRecord, endpoint: Endpoint, body: bytes, keep: bool
    ) -> None:
        """Send a request and complete its record; no error is raised.

        keep: hold the files of pictures in the reply.
        """
        fetching: list[asyncio.Task[None]] = []

        def fetch(url: str, index: int, place: int) -> None:
            fetching.append(asyncio.create_task(self._fetch(record, reader, url, index, place)))

        reader = StreamReader(record, endpoint, keep, fetch)
        events = EventReader()
        headers = {"Content-Type": "application/json"}
        record.sent = self.now()
        try:
            async with self._session.post(
                self.url + PATHS[endpoint], data=body, headers=headers
            ) as response:
                record.status = response.status
                record.request_id = response.headers.get("x-request-id", "")
                if response.status != 200:
                    record.error = message_of(await response.read())
                else:
                    async for chunk in response.content.iter_any():
                        now = self.now()
                        for data in events.feed(chunk):
                            reader.feed(data, now)
                    if not reader.finished and not record.error:
                        record.error = "the stream ended before it was complete"
            if fetching:
                await asyncio.gather(*fetching)
                # A picture may come after later texts: order by time again.
                record.events.sort(key=lambda event: event.time)
            reader.close()
        except asyncio.CancelledError:
            record.error = record.error or "not finished when the benchmark ended"
            raise
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            record.error = f"{type(error).__name__}: {error}"[:_SHOWN]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            record.error = f"the stream cannot be understood ({type(error).__name__}: {error})"
            record.error = record.error[:_SHOWN]
        finally:
            for task in fetching:
                task.cancel()
            record.events.append(RequestEvent(self.now(), "end"))
            refused = record.status in _REFUSED
            record.outcome = "rejected" if refused else "failed" if record.error else "done"

    async def _fetch(
        self, record: RequestRecord, reader: StreamReader, url: str, index: int, place: int
    ) -> None:
        """Get a picture that a stream named; it is whole when it is here."""
        async with self._session.get(urljoin(f"{self.url}/", url)) as response:
            response.raise_for_status()
            data = await response.read()
        record.events.append(RequestEvent(self.now(), "image", index, size=len(data)))
        reader.add_picture(place, data)

    async def get_json(self, path: str) -> Mapping[str, Any] | None:
        """JSON object of a path; None if there is none."""
        try:
            async with self._session.get(self.url + path) as response:
                if response.status != 200:
                    return None
                value = json.loads(await response.read())
                return value if isinstance(value, dict) else None
        except (ValueError, aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def models(self) -> Mapping[str, Any]:
        """First model of `/v1/models`. Raises `MmiError` if the server does not answer."""
        try:
            async with self._session.get(f"{self.url}/v1/models") as response:
                body = await response.read()
                if response.status != 200:
                    raise MmiError(
                        f"{self.url}/v1/models answers {response.status}: {message_of(body)}"
                    )
                return dict(json.loads(body)["data"][0])
        except (ValueError, KeyError, TypeError, IndexError):
            raise MmiError(f"{self.url}/v1/models is not a list of models") from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise MmiError(
                f"no server answers at {self.url} ({error})", fix="start one: mmi serve BUNDLE"
            ) from None


def message_of(body: bytes) -> str:
    """Message of an error's body, in OpenAI's shape or any other."""
    try:
        error = json.loads(body)["error"]
        code = f"{error['code']}: " if error.get("code") else ""
        return f"{code}{error['message']}"[:_SHOWN]
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:_SHOWN].decode(errors="replace").strip() or "no message"
