"""Messages between the front process and an engine process: JSON and raw arrays, never pickle.

A message is two lengths (big-endian uint32: JSON, arrays), a JSON object, and the bytes of its
arrays one after another. An array in the JSON is its place among them: `[start, shape]`, uint8.

To an engine process: `open` (once), `submit`, `cancel`, `stats`, `drain`. From it: `loading`,
`ready` or `refused` (once), `events` (those of all documents since the last run), `stats`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mmi_deploy.batching.job import JobStats
from mmi_deploy.documents.document import Document, Draw, Image, Part, Text
from mmi_deploy.documents.images import Rgb
from mmi_deploy.errors import (
    BundleError,
    BusyError,
    ConfigError,
    DocumentError,
    EngineError,
    MmiError,
    WeightsError,
)
from mmi_deploy.runtime.events import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    ImageStarted,
    TextDelta,
)
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.sampling import Sampled
from mmi_deploy.runtime.timings import Timing, Timings

LENGTHS = struct.Struct(">II")

# Larger messages are a fault of the program: the front's limits of a request are far below.
MOST_BYTES = 2**30

# Errors that keep their class on the way; all others become an `EngineError` without a message.
ERRORS: Mapping[str, type[MmiError]] = {
    kind.__name__: kind
    for kind in (BundleError, BusyError, ConfigError, DocumentError, EngineError, WeightsError)
}


class Arrays:
    """Arrays of one message: written one by one, or read by their places."""

    def __init__(self, data: bytes = b"") -> None:
        self._pieces: list[bytes] = []
        self._data, self._size = data, 0

    def put(self, rgb: Rgb) -> list[Any]:
        """Add an array; returns its place."""
        piece = np.ascontiguousarray(rgb).tobytes()
        place = [self._size, list(rgb.shape)]
        self._pieces.append(piece)
        self._size += len(piece)
        return place

    def get(self, place: Sequence[Any]) -> Rgb:
        """Array at a place, which may be written to."""
        start, shape = place
        count = int(np.prod(shape))
        return np.frombuffer(self._data, np.uint8, count, start).reshape(shape).copy()

    def bytes(self) -> bytes:
        """All arrays that were put."""
        return b"".join(self._pieces)


def pack(header: Mapping[str, Any], arrays: Arrays | None = None) -> bytes:
    """Bytes of a message."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    data = arrays.bytes() if arrays else b""
    return LENGTHS.pack(len(text), len(data)) + text + data


def lengths(head: bytes) -> tuple[int, int]:
    """Lengths of the JSON and of the arrays. Raises `EngineError` for impossible ones."""
    text, data = LENGTHS.unpack(head)
    if text + data > MOST_BYTES:
        raise EngineError("a message between the processes is too long")
    return text, data


def unpack(text: bytes, data: bytes) -> tuple[dict[str, Any], Arrays]:
    """The JSON and the arrays of a message."""
    header: dict[str, Any] = json.loads(text)
    return header, Arrays(data)


def split(message: bytes) -> tuple[dict[str, Any], Arrays]:
    """The JSON and the arrays of the bytes of `pack`."""
    text, _ = lengths(message[: LENGTHS.size])
    end = LENGTHS.size + text
    return unpack(message[LENGTHS.size : end], message[end:])


# Documents and options.


def pack_document(document: Document, arrays: Arrays) -> list[Any]:
    """Parts of a document as JSON: a string, `["image", place, alt]` or None to draw."""

    def packed(part: Part) -> Any:
        if isinstance(part, Text):
            return part.text
        return ["image", arrays.put(part.rgb), part.alt] if isinstance(part, Image) else None

    return [packed(part) for part in document.parts]


def unpack_document(parts: Sequence[Any], arrays: Arrays) -> Document:
    """The document of `pack_document`."""

    def unpacked(part: Any) -> Part:
        if isinstance(part, str):
            return Text(part)
        return Draw() if part is None else Image(arrays.get(part[1]), part[2])

    return Document(tuple(unpacked(part) for part in parts))


def pack_options(options: GenerationOptions) -> dict[str, Any]:
    """Options that differ from the defaults."""
    defaults = asdict(GenerationOptions())
    return {name: value for name, value in asdict(options).items() if value != defaults[name]}


def unpack_options(packed: Mapping[str, Any]) -> GenerationOptions:
    """The options of `pack_options`; JSON has made lists of tuples."""
    fields = dict(packed)
    if "stop" in fields:
        fields["stop"] = tuple(fields["stop"])
    if "logit_bias" in fields:
        fields["logit_bias"] = tuple((token, bias) for token, bias in fields["logit_bias"])
    return GenerationOptions(**fields)


# Events.


def pack_event(event: Event | Exception, stats: JobStats | None, arrays: Arrays) -> list[Any]:
    """An event, or the error that ends a document, as JSON. stats: at the end."""
    match event:
        case TextDelta():
            packed: list[Any] = ["text", event.text, event.tokens]
            if event.logprobs:
                packed.append([[s.token, s.logprob, s.top] for s in event.logprobs])
            return packed
        case ImageStarted():
            return ["start", event.index, event.steps]
        case ImageProgress():
            preview = None if event.preview is None else arrays.put(event.preview)
            return ["step", event.index, event.step, event.of, preview]
        case ImageDone():
            return ["image", event.index, arrays.put(event.rgb)]
        case Finished():
            totals = event.timings.totals()
            return ["end", event.reason, event.tokens, event.images, totals, _stats(stats)]
    kind = type(event).__name__
    return ["error", kind, str(event) if kind in ERRORS else "", _stats(stats)]


def unpack_event(
    packed: Sequence[Any], arrays: Arrays
) -> tuple[Event | MmiError, JobStats | None, bool]:
    """The event of `pack_event`, the statistics at the end, and True if it is the last one."""
    kind, *values = packed
    match kind:
        case "text":
            text, tokens, *more = values
            return TextDelta(text, _logprobs(more), tokens), None, False
        case "start":
            return ImageStarted(*values), None, False
        case "step":
            index, step, of, place = values
            preview = None if place is None else arrays.get(place)
            return ImageProgress(index, step, of, preview), None, False
        case "image":
            return ImageDone(values[0], arrays.get(values[1])), None, False
        case "end":
            reason, tokens, images, totals, stats = values
            runs = [Timing(stage, seconds, count) for stage, (seconds, count) in totals.items()]
            return Finished(reason, tokens, images, Timings(runs)), _read_stats(stats), True
    name, message, stats = values
    error = ERRORS.get(name, EngineError)(message or "the engine failed on this document")
    return error, _read_stats(stats), True


def _logprobs(more: Sequence[Any]) -> tuple[Sampled, ...]:
    sampled = more[0] if more else ()
    return tuple(
        Sampled(token, logprob, tuple((other, value) for other, value in top))
        for token, logprob, top in sampled
    )


def _stats(stats: JobStats | None) -> list[Any] | None:
    return None if stats is None else list(asdict(stats).values())


def _read_stats(values: Sequence[Any] | None) -> JobStats | None:
    return None if values is None else JobStats(*values)
