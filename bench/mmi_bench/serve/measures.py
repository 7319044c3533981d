"""Measures of one request, from the times of its events; definitions in `definitions.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from mmi_bench.serve.records import Kind, RequestEvent, RequestRecord

# Values of a request by key of the measure, in seconds.
Values = Mapping[str, Sequence[float]]


def values_of(record: RequestRecord) -> dict[str, list[float]]:
    """Values of every latency that the request has; keys without a value are absent."""
    start, events = record.start, record.events
    gaps, stalls = gaps_of(events)
    output = first_output(record)
    texts, images = _times(events, "text"), _times(events, "image")
    counted = record.tokens - 1 - len(stalls)
    found = {
        "first_token": [texts[0] - start] if texts else [],
        "first_image": [images[0] - start] if images else [],
        "first_preview": [time - start for time in _times(events, "preview")[:1]],
        "first_output": [] if output is None else [output],
        "text_gap": gaps,
        "picture_stall": stalls,
        "time_per_token": [sum(gaps) / counted] if gaps and counted > 0 else [],
        "image_interval": [b - a for a, b in pairwise(images)],
        "drawing": list(_drawings(events)),
        "step": list(_steps(events)),
        "end_to_end": [record.end - start] if record.end is not None else [],
        "queue": _queue(record),
        "send_lag": [] if record.due is None else [record.sent - record.due],
    }
    return {key: values for key, values in found.items() if values}


def first_output(record: RequestRecord) -> float | None:
    """Time to first output; None before it."""
    found = (event.time for event in record.events if event.kind in ("text", "image"))
    return next((time - record.start for time in found), None)


def gaps_of(events: Sequence[RequestEvent]) -> tuple[list[float], list[float]]:
    """Text gaps and picture stalls: times from one text event to the next, with no picture between
    and with one or more."""
    gaps: list[float] = []
    stalls: list[float] = []
    last: float | None = None
    across = False
    for event in events:
        if event.kind in ("image_start", "progress", "preview", "image"):
            across = True
        elif event.kind == "text":
            if last is not None:
                (stalls if across else gaps).append(event.time - last)
            last, across = event.time, False
    return gaps, stalls


def _times(events: Sequence[RequestEvent], kind: Kind) -> list[float]:
    return [event.time for event in events if event.kind == kind]


def _steps(events: Sequence[RequestEvent]) -> Iterator[float]:
    steps = [event for event in events if event.kind == "progress"]
    for before, after in pairwise(steps):
        if before.index == after.index:
            yield after.time - before.time


def _drawings(events: Sequence[RequestEvent]) -> Iterator[float]:
    """Times from the start of each picture, where it is known, to the whole picture."""
    start: float | None = None
    for event in events:
        if event.kind == "image_start":
            start = event.time
        elif event.kind == "image" and start is not None:
            yield event.time - start
            start = None


def _queue(record: RequestRecord) -> list[float]:
    seconds = (record.server or {}).get("queue_seconds")
    return [float(seconds)] if isinstance(seconds, int | float) else []
