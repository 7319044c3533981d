"""Plots of a result, as SVG for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mmi_bench.serve.definitions import BY_KEY
from mmi_bench.serve.measures import values_of
from mmi_bench.serve.records import RequestRecord
from mmi_bench.serve.result import Result
from mmi_deploy.system.plots import plotted

# Latencies whose distribution is drawn.
_DISTRIBUTIONS = (
    "first_token",
    "first_image",
    "end_to_end",
    "text_gap",
    "picture_stall",
    "drawing",
)

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

# Requests in the timeline.
_LINES = 40


def plots(result: Result, folder: Path) -> list[tuple[str, str]]:
    """Heading and SVG of each plot; `folder` is for their files while they are drawn. Raises
    `MmiError` without matplotlib."""
    found = []
    if result.measures:
        found.append(("Distributions", _svg(folder, 8, 4, lambda f: _distributions(result, f))))
    if any(one.run.in_flight for one in result.runs):
        found.append(("Requests in flight", _svg(folder, 8, 2.5, lambda f: _flying(result, f))))
    if any(one.run.successes for one in result.runs):
        text = "Timeline of the first requests: text (dots), pictures (bars)"
        found.append((text, _svg(folder, 8, 5, lambda f: _timeline(result, f))))
    return found


def _svg(folder: Path, width: float, height: float, draw: Callable[[Any], None]) -> str:
    """The `<svg>` element of a figure."""
    with TemporaryDirectory(dir=folder) as work:
        path = Path(work) / "plot.svg"
        with plotted(path, width, height) as figure:
            draw(figure)
        text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]


def _distributions(result: Result, figure: Any) -> None:
    axes = figure.subplots()
    records = [record for one in result.runs for record in one.run.successes]
    values = [values_of(record) for record in records]
    for colour, key in zip(_COLOURS, _DISTRIBUTIONS, strict=True):
        found = np.sort([1000 * v for one in values for v in one.get(key, [])])
        if len(found):
            share = np.arange(1, len(found) + 1) / len(found)
            axes.step(found, share, where="post", color=colour, label=BY_KEY[key].name)
    axes.set_xscale("log")
    axes.set_xlabel("ms")
    axes.set_ylabel("share at or below")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _flying(result: Result, figure: Any) -> None:
    axes = figure.subplots()
    for index, one in enumerate(result.runs):
        run = one.run
        times = [time - run.begin for time, _ in run.in_flight]
        counts = [count for _, count in run.in_flight]
        colour = _COLOURS[index % len(_COLOURS)]
        axes.step(times, counts, where="post", color=colour, label=f"run {run.number + 1}")
    axes.set_xlabel("seconds of the window")
    axes.set_ylabel("requests")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _timeline(result: Result, figure: Any) -> None:
    axes = figure.subplots()
    run = next(one.run for one in result.runs if one.run.successes)
    records = sorted(run.successes, key=lambda record: record.start)[:_LINES]
    for row, record in enumerate(records):
        end = record.end or record.start
        axes.hlines(row, record.start - run.begin, end - run.begin, color="#dedbd2", linewidth=4)
        for start, length in _bars(record):
            axes.hlines(row, start - run.begin, start + length - run.begin,
                        color="#d55e00", linewidth=4)  # fmt: skip
        texts = [event.time - run.begin for event in record.events if event.kind == "text"]
        axes.plot(texts, [row] * len(texts), ".", color="#0072b2", markersize=3)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of the window")
    axes.set_ylabel("request")


def _bars(record: RequestRecord) -> Iterator[tuple[float, float]]:
    """Start and length of each picture's drawing; no length where its start is not known."""
    start: float | None = None
    for event in record.events:
        if event.kind == "image_start":
            start = event.time
        elif event.kind == "image":
            begun = event.time if start is None else start
            yield begun, event.time - begun
            start = None
