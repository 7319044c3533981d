"""Replica: a batch engine in a process of Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from typing import Any

from mmi_deploy.runtime.events import Finished
from mmi_deploy.server.engine.messages import (
    Arrays,
    pack,
    pack_event,
    split,
    unpack_document,
    unpack_options,
)
from mmi_deploy.server.engine.open_options import OpenOptions
from mmi_deploy.server.engine.process import description, open_engine, plain


class EngineReplica:
    """Ray Serve makes one in each process of the deployment."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Load the engines and run each once. options: of `OpenOptions`."""
        self._options = OpenOptions(**options)
        self._engine = open_engine(self._options)

    async def describe(self, affinity: int) -> dict[str, Any]:
        """Description of the engine. affinity: any, for the router."""
        return description(self._engine, self._options)

    async def stats(self, affinity: int) -> dict[str, Any]:
        """Statistics of the engine."""
        return plain(asdict(self._engine.stats()))

    async def generate(self, affinity: int, message: bytes) -> AsyncIterator[bytes]:
        """Generate a document; yields a message for each event, or for the error that ends it. A
        caller that stops early ends the document."""
        header, arrays = split(message)
        try:
            stream = self._engine.submit(
                unpack_document(header["parts"], arrays),
                unpack_options(header["options"]),
                max_seconds=header["max_seconds"],
                tenant=header["tenant"],
            )
            async with stream:
                end: Finished | None = None
                async for event in stream:
                    if isinstance(event, Finished):
                        end = event
                    else:
                        yield _message(event)
                assert end is not None, "a document ends with `Finished`"
                yield _message(end, stream.stats)
        except Exception as error:
            yield _message(error)


def _message(event: Any, stats: Any = None) -> bytes:
    arrays = Arrays()
    return pack({"event": pack_event(event, stats, arrays)}, arrays)
