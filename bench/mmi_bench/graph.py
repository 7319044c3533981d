"""One graph of a bundle alone, measured as TensorRT's trtexec measures an engine.

The engine is the one that documents run on: the same backend, kernels and threads. Inputs are drawn
from a seed and valid: every image slot is visible, tokens lie at successive places of the KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from mmi_bench.runs import Computation, Device, Measurement, Settings, measure
from mmi_deploy.cli.console import counted, print_table
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.buffers import HOST
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.graphs import Graph, chosen_sizes
from mmi_deploy.system.progress import Progress, silent
from mmi_deploy.targets.sample_inputs import Arrays, inputs_at

# Argument that stands for every graph of a bundle.
ALL = "all"

# Row of the table -> summary of a measurement; trtexec's names, which on a CPU too say compute.
ROWS = {
    "Latency": "latency",
    "Enqueue Time": "enqueue",
    "H2D Latency": "h2d",
    "Compute Time": "compute",
    "D2H Latency": "d2h",
}

ON_HOST = "n/a: on the CPU nothing is enqueued or copied to a device, so latency is compute time"
WORDS = ("min", "max", "mean", "median", "p90", "p95", "p99")


@dataclass(frozen=True)
class GraphResult:
    """Measurement of one graph at `sizes`; rows: of its batch."""

    graph: str
    sizes: Mapping[str, int]
    rows: int
    measurement: Measurement

    def to_json(self) -> dict[str, Any]:
        found = self.measurement
        return {
            "graph": self.graph,
            "sizes": dict(self.sizes),
            "rows": self.rows,
            "rows_per_second": self.rows * found.throughput,
            **found.to_json(),
        }

    def times(self) -> list[dict[str, Any]]:
        """Every run for `--export-times`."""
        about = {"graph": self.graph, "sizes": dict(self.sizes)}
        return [{**about, **run} for run in self.measurement.times()]


def batch_dimension(graph: Graph) -> str:
    """Dimension that counts the rows of a run: documents or pictures, or images to encode."""
    return "b" if "b" in graph.ranges else "n"


def named(name: str, graphs: Mapping[str, Graph]) -> list[Graph]:
    """The graph called `name`, or all of them. Raises `ConfigError` with the names there are."""
    if name == ALL:
        return list(graphs.values())
    if name not in graphs:
        raise ConfigError(f"there is no graph {name!r}", expected=f"{', '.join(graphs)} or {ALL}")
    return [graphs[name]]


def sizes_of(graph: Graph, given: Mapping[str, int], rows: Sequence[int]) -> list[dict[str, int]]:
    """Sizes of each measurement: those `given`, the typical ones of the contract for the others,
    and one measurement for each of `rows`. Raises `ConfigError` for a dimension that the graph does
    not have, and a size out of its range."""
    if unknown := sorted(set(given) - set(graph.ranges)):
        raise ConfigError(
            f"{graph.name} has no dimension {unknown[0]}", expected=", ".join(graph.ranges)
        )
    letter = batch_dimension(graph)
    if rows and letter in given:
        raise ConfigError(
            f"--rows and --sizes {letter} both set the rows of {graph.name}", expected="one of them"
        )
    return [chosen_sizes(graph, {**given, letter: count}) for count in rows] or [
        chosen_sizes(graph, given)
    ]


def inputs_of(graph: Graph, sizes: Mapping[str, int], seed: int) -> Arrays:
    """Inputs of a run at `sizes`: floats are standard normal."""
    draw = np.random.default_rng(seed)
    inputs = inputs_at(graph, sizes, draw)
    if "image_slot" in inputs:
        # As in a document: each slot has its own image as far as there are enough, and is seen.
        inputs["image_slot"][...] = np.arange(sizes["m"]) % sizes["n"]
        positions = inputs["image_position"]
        below = graph["image_position"].below
        assert isinstance(below, int), "relative positions have a fixed bound"
        positions[...] = draw.integers(1, max(below, 2), positions.shape)
    if "position" in inputs:
        inputs["position"][...] = inputs["write_index"][:, None] + np.arange(sizes["t"])
    return inputs


def computation(engine: Engine, inputs: Arrays, sizes: Mapping[str, int]) -> Computation:
    """Bind `inputs` and new outputs to `engine`.

    On a device a run copies all floats in and all outputs out, as trtexec does, except for the KV
    cache, which is updated in place; indices stay on the host, from where the engine takes them.
    """
    graph, memory = engine.graph, engine.memory
    buffers = {
        tensor.name: (memory if tensor.below is None else HOST).from_array(inputs[tensor.name])
        for tensor in graph.inputs
    }
    outputs = {
        tensor.name: memory.allocate(tensor.resolve(**sizes), tensor.dtype)
        for tensor in graph.outputs
        if tensor.name not in graph.in_place
    }
    plan = engine.bind(buffers, outputs)
    if memory.device == HOST.device:
        return Computation(plan.run)
    kept = set(graph.in_place.values())
    copied = [
        (buffers[tensor.name], inputs[tensor.name])
        for tensor in graph.inputs
        if tensor.below is None and tensor.name not in kept
    ]

    def copy_in() -> None:
        for buffer, array in copied:
            buffer.write(array)

    def copy_out() -> None:
        for buffer in outputs.values():
            buffer.read()

    return Computation(plan.run, Device(copy_in, memory.wait, copy_out))


def run(
    runtime: Runtime,
    wanted: Sequence[tuple[Graph, Mapping[str, int]]],
    settings: Settings,
    seed: int = 0,
    progress: Progress = silent,
) -> list[GraphResult]:
    """Measure graphs one after another, each at its sizes."""
    found = []
    for done, (graph, sizes) in enumerate(wanted):
        progress("measuring", done, len(wanted), detail=graph.name)
        engine = runtime.engine(graph.name)
        bound = computation(engine, inputs_of(graph, sizes, seed), sizes)
        rows = sizes[batch_dimension(graph)]
        found.append(GraphResult(graph.name, sizes, rows, measure(bound, settings)))
    return found


def at(sizes: Mapping[str, int]) -> str:
    """Sizes as `--sizes` takes them."""
    return ",".join(f"{letter}={size}" for letter, size in sizes.items())


def print_report(out: Console, results: Sequence[GraphResult], about: Mapping[str, Any]) -> None:
    """Print trtexec's summary of one measurement, or a line each of several."""
    if len(results) == 1:
        (one,) = results
        print_table(out, summary_table(one))
        out.print(throughput_line(one))
    else:
        print_table(out, overview(results))
    if not results[0].measurement.on_device:
        out.print(ON_HOST)
    settings: Settings = about["settings"]
    short = settings.warm_up < Settings.warm_up or settings.duration < Settings.duration
    machine = f"{about['machine']['processor']}, {counted(about['threads'], 'thread')}"
    times = f"warm-up {1e3 * settings.warm_up:g} ms, {settings.duration:g} s"
    out.print(
        f"{machine}, {about['target']}, kernels: {about['kernels']}; {times}"
        f"{', shorter than trtexec runs' if short else ''}; "
        f"load before: {about['machine']['load_before']:.1f}"
    )


def summary_table(result: GraphResult) -> Table:
    """Table of the latencies of one measurement."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{result.graph} at {at(result.sizes)}, milliseconds",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for word in WORDS:
        table.add_column(word, justify="right", no_wrap=True)
    summaries = result.measurement.summaries()
    for title, name in ROWS.items():
        found = summaries[name]
        cells = ["n/a"] * len(WORDS) if found is None else [_ms(getattr(found, w)) for w in WORDS]
        table.add_row(title, *cells)
    return table


def throughput_line(result: GraphResult) -> str:
    """Throughput and the number of runs."""
    found = result.measurement
    rows = f" ({result.rows * found.throughput:.4g} rows/s)" if result.rows > 1 else ""
    return (
        f"Throughput: {found.throughput:.4g} queries/s{rows}, {len(found.runs)} runs in "
        f"{found.seconds:.2f} s after {found.warm_up} of warm-up"
    )


def overview(results: Sequence[GraphResult]) -> Table:
    """Table of throughput and latency of several measurements, a line each."""
    table = Table(box=box.SIMPLE_HEAD, title="latency, milliseconds", title_justify="left")
    table.add_column("graph", no_wrap=True)
    table.add_column("sizes", no_wrap=True)
    for heading in ("runs", "queries/s", "rows/s", *WORDS):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in results:
        found = one.measurement
        latency = found.summaries()["latency"]
        table.add_row(
            one.graph,
            at(one.sizes),
            str(len(found.runs)),
            f"{found.throughput:.4g}",
            f"{one.rows * found.throughput:.4g}",
            *(_ms(getattr(latency, word)) for word in WORDS),
        )
    return table


def dimensions(graphs: Mapping[str, Graph]) -> dict[str, dict[str, dict[str, int]]]:
    """Graph -> dynamic dimension -> its smallest, typical and largest size, for `--list`."""
    return {
        name: {
            letter: {"min": of.min, "typical": of.opt, "max": of.max}
            for letter, of in graph.ranges.items()
        }
        for name, graph in graphs.items()
    }


def list_table(graphs: Mapping[str, Graph]) -> Table:
    """Table of the graphs and their dynamic dimensions."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("graph", no_wrap=True)
    table.add_column("typical sizes", no_wrap=True)
    table.add_column("ranges", no_wrap=True)
    for name, graph in graphs.items():
        typical = at({letter: of.opt for letter, of in graph.ranges.items()})
        ranges = ", ".join(f"{letter} {of.min} to {of.max}" for letter, of in graph.ranges.items())
        table.add_row(name, typical, ranges)
    return table


def _ms(value: float | None) -> str:
    """Milliseconds with three to four digits; a dash for a percentile that is not known."""
    return "–" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"
