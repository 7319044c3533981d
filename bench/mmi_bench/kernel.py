"""Benchmark our MMFS kernel for ONNX Runtime against a decomposition into GridSample.

The baseline is the usual decomposition, one GridSample per level, and does the sampling alone: it
gets locations and weights precomputed. Our kernel computes these as well. Both take `value` as the
model holds it, channels last, which GridSample has to transpose.
`python -m mmi_bench.kernel` prints the table.

Letters: q queries, m image slots, s feature cells, l levels, h heads, p points,
d channels per head.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from mmi_bench.machine import describe
from mmi_bench.statistics import Statistics, ratios
from mmi_deploy.cli import program
from mmi_deploy.errors import EngineError
from mmi_deploy.spec.graphs import IR_VERSION, OPSET
from mmi_deploy.system.files import prepare_file, write_new_file
from mmi_deploy.system.progress import shown
from mmi_plugins.conformance.calls import draw
from mmi_plugins.conformance.onnxruntime_kernel import OnnxRuntimeKernel, one_node_model
from mmi_plugins.operator import INPUT_SHAPES, Call
from mmi_plugins.reference import all_rows, mmfs_reference

HEADS, CHANNELS, POINTS, IMAGES = 16, 64, 8, 4
LEVELS = ((32, 32), (16, 16), (8, 8))
# One token; a short prompt; a long prompt; a U-Net's finest map.
QUERIES = (1, 64, 2048, 4096)

# Bytes of a cache line.
_ALIGNED = 64

# Output rows that are compared with float64.
_ROWS_COMPARED = 64


@dataclass(frozen=True)
class Comparison:
    """Seconds of each run of both implementations, and the largest difference of their outputs."""

    queries: int
    ours: tuple[float, ...]
    grid_sample: tuple[float, ...]
    difference: float

    @property
    def speedup(self) -> Statistics:
        """Time of GridSample over that of our kernel."""
        return ratios(self.grid_sample, self.ours)

    def to_json(self) -> dict[str, Any]:
        return {
            "queries": self.queries,
            "ours": Statistics.of(self.ours).to_json(),
            "grid_sample": Statistics.of(self.grid_sample).to_json(),
            "speedup": self.speedup.to_json(),
            "difference": self.difference,
        }


def call_of(queries: int) -> Call:
    """Draw a call of the benchmark's size: all images visible, one reference point per query."""
    call = draw(
        np.random.default_rng(queries),
        b=1,
        q=queries,
        h=HEADS,
        d=CHANNELS,
        p=POINTS,
        m=IMAGES,
        n=IMAGES,
        r=IMAGES + 1,
        levels=list(LEVELS),
        dtype="float32",
        base_grid=16.0,
        per_query=False,
        references=True,
        null_slot=False,
    )
    call.inputs["image_slot"][:] = np.arange(IMAGES)
    call.inputs["image_position"][:] = np.arange(1, IMAGES + 1)
    side = int(np.ceil(np.sqrt(queries)))
    row, column = np.divmod(np.arange(queries), side)
    call.inputs["reference"][:] = (np.stack([column, row], 1) + 0.5) / side
    return call


def precomputed(call: Call) -> dict[str, np.ndarray]:
    """Compute the baseline's inputs: value [m, s, h, d], grid [m*h, q, p, 2] in [-1, 1] and weights
    [l, m*h, 1, q, p], in the layout of GridSample."""
    b, position = 0, call["image_position"][0, 0]
    offsets = call["offsets"][b][:, :, None] + call["offset_table"][position].transpose(1, 0, 2, 3)
    location = call["reference"][:, None, None, None] + offsets / call.base_grid  # [q, h, m, p, 2]
    score = call["logits"][b][:, :, None] + call["logit_table"][position].transpose(1, 0, 2, 3)
    power = np.exp(score - score.max(axis=(2, 3, 4), keepdims=True))  # [q, h, m, l, p]
    weight = power / power.sum(axis=(2, 3, 4), keepdims=True)
    queries, heads, images, levels, points = weight.shape
    grid = (2 * location - 1).transpose(2, 1, 0, 3, 4).reshape(images * heads, queries, points, 2)
    weight = weight.transpose(3, 2, 1, 0, 4).reshape(levels, images * heads, 1, queries, points)
    return {
        "value": call["value"][call["image_slot"][b]],
        "grid": grid.astype(np.float32),
        "weight": weight.astype(np.float32),
    }


def grid_sample_model(call: Call) -> bytes:
    """Build the baseline as ONNX: inputs of `precomputed` -> output [1, q, h*d]."""
    import onnx.helper as oh
    from onnx import TensorProto

    sizes = call.sizes
    m, s, h, d = sizes["m"], sizes["s"], sizes["h"], sizes["d"]
    q, p, levels = sizes["q"], sizes["p"], sizes["l"]
    nodes, constants = [], []

    def constant(name: str, values: Sequence[int]) -> str:
        constants.append(oh.make_tensor(name, TensorProto.INT64, [len(values)], list(values)))
        return name

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(oh.make_node(op, inputs, [output], **attributes))
        return output

    planes = add("Transpose", ["value"], "planes", perm=[0, 2, 3, 1])  # [m, h, d, s]
    cells = [height * width for height, width in LEVELS]
    maps = [f"map{level}" for level in range(levels)]
    nodes.append(oh.make_node("Split", [planes, constant("cells", cells)], maps, axis=3))
    shares = [f"share{level}" for level in range(levels)]
    nodes.append(oh.make_node("Split", ["weight"], shares, axis=0, num_outputs=levels))
    total = ""
    for level, (height, width) in enumerate(LEVELS):
        sides = constant(f"sides{level}", [m * h, d, height, width])
        image = add("Reshape", [maps[level], sides], f"image{level}")
        found = add(
            "GridSample",
            [image, "grid"],
            f"found{level}",
            mode="linear",
            padding_mode="zeros",
            align_corners=0,
        )  # [m*h, d, q, p]
        flat = constant(f"flat{level}", [m * h, 1, q, p])
        share = add("Reshape", [shares[level], flat], f"flat_share{level}")
        weighted = add("Mul", [found, share], f"weighted{level}")
        last = constant(f"last{level}", [-1])
        part = add("ReduceSum", [weighted, last], f"part{level}", keepdims=0)  # [m*h, d, q]
        total = add("Add", [total, part], f"total{level}") if total else part
    split = add("Reshape", [total, constant("images", [m, h, d, q])], "by_image")
    summed = add("ReduceSum", [split, constant("first", [0])], "summed", keepdims=0)  # [h, d, q]
    turned = add("Transpose", [summed], "turned", perm=[2, 0, 1])
    add("Reshape", [turned, constant("rows", [1, q, h * d])], "output")
    given = [
        oh.make_tensor_value_info("value", TensorProto.FLOAT, [m, s, h, d]),
        oh.make_tensor_value_info("grid", TensorProto.FLOAT, [m * h, q, p, 2]),
        oh.make_tensor_value_info("weight", TensorProto.FLOAT, [levels, m * h, 1, q, p]),
    ]
    output = oh.make_tensor_value_info("output", TensorProto.FLOAT, [1, q, h * d])
    model = oh.make_model(
        oh.make_graph(nodes, "grid_sample", given, [output], constants),
        opset_imports=[oh.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    return bytes(model.SerializeToString())


Run = Callable[[], np.ndarray]


def bound(model: bytes, inputs: dict[str, np.ndarray], threads: int, library: Path | None) -> Run:
    """Load `model` and bind its inputs and output; return a function that runs it on them."""
    from mmi_deploy.runtime.onnxruntime.module import ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # Otherwise idle threads of one implementation spin and slow the other one while it is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(aligned(x)) for name, x in inputs.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    shape = session.get_outputs()[0].shape
    output = aligned(np.zeros(shape, np.float32))  # allocated once, as in the runtime
    binding.bind_ortvalue_output("output", ort.OrtValue.ortvalue_from_numpy(output))

    def run() -> np.ndarray:
        session.run_with_iobinding(binding)
        return output

    run()
    return run


def aligned(array: np.ndarray) -> np.ndarray:
    """Copy `array` to a cache-line boundary; NumPy's alignment differs from run to run."""
    raw = np.empty(array.nbytes + _ALIGNED, np.uint8)
    first = -raw.ctypes.data % _ALIGNED
    copy = raw[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def compare(
    queries: int, library: Path, threads: int, repeats: int, seconds: float = 0.5
) -> Comparison:
    """Time both implementations in turns, `repeats` times, each over `seconds / repeats` seconds.

    Raises `EngineError` if the output of either differs from the float64 reference.
    """
    call = call_of(queries)
    inputs = {name: call[name] for name in INPUT_SHAPES}
    implementations = (
        bound(one_node_model(call), inputs, threads, library),
        bound(grid_sample_model(call), precomputed(call), threads, None),
    )
    ours, theirs = (run().copy() for run in implementations)
    difference = float(np.abs(ours - theirs).max())
    rows = all_rows(call)[:: max(1, call.rows // _ROWS_COMPARED)]
    b, q, h = rows.T
    wanted = mmfs_reference(call, rows)
    for name, got in (("our kernel", ours), ("GridSample", theirs)):
        error = np.abs(got.reshape(1, queries, HEADS, CHANNELS)[b, q, h] - wanted).max()
        if not error < 1e-4:
            raise EngineError(f"{name} is wrong at {queries} queries", expected="< 1e-4", got=error)
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, times in zip(implementations, taken, strict=True):
            times.append(_seconds(run, seconds / repeats))
    return Comparison(queries, tuple(taken[0]), tuple(taken[1]), difference)


def _seconds(run: Run, least: float) -> float:
    """Mean seconds of a run, over as many runs as take `least` seconds."""
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < least:
        run()
        count += 1
    return (time.perf_counter() - start) / count


def table(comparisons: Sequence[Comparison], threads: int) -> Table:
    """Build the printed table: medians, and the speedup with quartiles."""
    title = (
        f"{HEADS} heads x {CHANNELS}, {IMAGES} images, {POINTS} points, "
        f"levels {', '.join(f'{height}x{width}' for height, width in LEVELS)}, {threads} threads"
    )
    shown = Table("queries", "our kernel", "GridSample", "times as fast", title=title)
    for item in comparisons:
        ours, theirs = (
            f"{1e3 * Statistics.of(times).median:.3f} ms" for times in (item.ours, item.grid_sample)
        )
        low, high = item.speedup.low, item.speedup.high
        times = f"{item.speedup.median:.0f} ({low:.0f} to {high:.0f})"
        shown.add_row(str(item.queries), ours, theirs, times)
    return shown


def main(
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of both implementations.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each size.")] = 9,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the samples to this JSON file.")
    ] = None,
) -> int:
    """Measure our MMFS kernel against GridSample in ONNX Runtime."""
    if out:
        prepare_file(out)
    kernel = OnnxRuntimeKernel(threads=threads)
    if reason := kernel.missing():
        raise EngineError(f"our kernel cannot run here: {reason}")
    done = []
    with shown(Console(stderr=True)) as progress:
        for index, queries in enumerate(QUERIES):
            progress(f"measuring {queries} queries", index, len(QUERIES))
            done.append(compare(queries, kernel.library, threads, repeats))
    Console().print(table(done, threads))
    if out:
        report = {"machine": describe(), "threads": threads, "sizes": [x.to_json() for x in done]}
        write_new_file(out, json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    program.main(program.program("python -m mmi_bench.kernel", main))
