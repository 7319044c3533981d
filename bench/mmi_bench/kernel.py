"""Benchmark the MMFS operator on the CPU: our kernel, its ONNX function and GridSample.

All run in ONNX Runtime. The function is the one in every exported file, which runs where there is
no kernel. GridSample is the usual decomposition, one per level, and does the sampling alone: it
gets locations and weights precomputed. Our kernel and the function compute these as well. All take
`value` as the model holds it, channels last, which GridSample has to transpose.

Letters: q queries, m image slots, s feature cells, l levels, h heads, p points,
d channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from mmi_bench.runs import Computation, Measurement, Settings, measure_in_turns
from mmi_bench.statistics import Statistics, ratios
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import (
    IR_VERSION,
    OPSET,
    beyond_kernels,
    denoise_step,
    level_sides,
    llm,
)
from mmi_plugins.conformance.calls import draw
from mmi_plugins.conformance.onnxruntime_kernel import one_node_model
from mmi_plugins.onnx_function import MAX_GATHERED, mmfs_function
from mmi_plugins.operator import INPUT_SHAPES, Call
from mmi_plugins.reference import all_rows, mmfs_reference

# One token; a short prompt; a long prompt; a U-Net's finest map.
QUERIES = (1, 64, 2048, 4096)

# Most queries of a call.
MOST_QUERIES = 1 << 16

# Parts of a model that have the operator.
LLM, IMAGE_DECODER = "llm", "image_decoder"
PARTS = (LLM, IMAGE_DECODER)

# Image slots, as far as a query may look at so many.
IMAGES = 4

OURS, FUNCTION, GRID_SAMPLE = "our kernel", "ONNX function", "GridSample"

# Turns that the implementations take.
TURNS = 9

# Bytes of a cache line.
_ALIGNED = 64

# Output rows that are compared with float64.
_ROWS_COMPARED = 64


@dataclass(frozen=True)
class Shape:
    """Sizes of the operator. levels: side of each square map, finest first. table_rows: relative
    positions of images. base_grid: side of the grid whose cells are the unit of offsets."""

    heads: int
    channels: int
    points: int
    levels: tuple[int, ...]
    images: int
    table_rows: int
    base_grid: float
    null_slot: bool

    @classmethod
    def of(cls, config: ModelConfig, part: str = LLM, images: int | None = None) -> Shape:
        """Sizes in one part of a model, with `images` image slots. Raises `ConfigError` for another
        part, more images than a query may look at, and sizes that the kernel does not support."""
        if part not in PARTS:
            raise ConfigError("--part is unknown", expected=" or ".join(PARTS), got=part)
        unet = config.image_decoder.unet
        mmfs = config.llm_mmfs if part == LLM else config.image_decoder.mmfs
        graph = llm if part == LLM else denoise_step
        if reason := beyond_kernels(config).get(graph.__name__):
            raise ConfigError(f"{config.name}: the kernel does not support its {part}: {reason}")
        if images is not None and not 1 <= images <= mmfs.images_seen:
            raise ConfigError(
                "--images is out of range",
                expected=f"1 to {mmfs.images_seen}, the images that {part} of {config.name} sees",
                got=images,
            )
        return cls(
            mmfs.heads,
            mmfs.head_width,
            mmfs.points,
            level_sides(config, mmfs),
            images or min(IMAGES, mmfs.images_seen),
            mmfs.images,
            float(mmfs.base_grid or mmfs.grid_scale * unet.latent_side),
            mmfs.null_slot,
        )

    def __str__(self) -> str:
        sides = ", ".join(f"{side}x{side}" for side in self.levels)
        images = "1 image" if self.images == 1 else f"{self.images} images"
        return (
            f"{self.heads} heads x {self.channels}, {images}, {self.points} points, levels {sides}"
            f"{', null slot' if self.null_slot else ''}"
        )


@dataclass(frozen=True)
class Comparison:
    """Measurements of the implementations, and the largest difference of an output from float64."""

    queries: int
    measurements: Mapping[str, Measurement]
    error: float

    def speedup(self, name: str) -> Statistics:
        """Time of an implementation over that of our kernel, by neighbouring turns."""
        return ratios(self.measurements[name].means, self.measurements[OURS].means)

    def to_json(self) -> dict[str, Any]:
        return {
            "queries": self.queries,
            "error": self.error,
            "implementations": {
                name: {
                    **found.to_json(),
                    "kernel_times_as_fast": self.speedup(name).to_json(),
                }
                for name, found in self.measurements.items()
            },
        }

    def times(self) -> list[dict[str, Any]]:
        """Every run for `--export-times`."""
        return [
            {"queries": self.queries, "implementation": name, **run}
            for name, found in self.measurements.items()
            for run in found.times()
        ]


def call_of(shape: Shape, queries: int) -> Call:
    """Draw a call: all images visible, one reference point per query."""
    call = draw(
        np.random.default_rng(queries),
        b=1,
        q=queries,
        h=shape.heads,
        d=shape.channels,
        p=shape.points,
        m=shape.images,
        n=shape.images,
        r=shape.table_rows,
        levels=[(side, side) for side in shape.levels],
        dtype="float32",
        base_grid=shape.base_grid,
        per_query=False,
        references=True,
        null_slot=shape.null_slot,
    )
    call.inputs["image_slot"][:] = np.arange(shape.images)
    call.inputs["image_position"][:] = np.arange(1, shape.images + 1)
    side = int(np.ceil(np.sqrt(queries)))
    row, column = np.divmod(np.arange(queries), side)
    call.inputs["reference"][:] = (np.stack([column, row], 1) + 0.5) / side
    return call


def precomputed(call: Call) -> dict[str, np.ndarray]:
    """Compute the inputs of GridSample in its layout: value [m, s, h, d], grid [m*h, q, p, 2] in
    [-1, 1] and weights [l, m*h, 1, q, p]; with a null slot also its share of the output, `null`
    [1, q, h*d]."""
    b, position = 0, call["image_position"][0, 0]
    offsets = call["offsets"][b][:, :, None] + call["offset_table"][position].transpose(1, 0, 2, 3)
    location = call["reference"][:, None, None, None] + offsets / call.base_grid  # [q, h, m, p, 2]
    score = call["logits"][b][:, :, None] + call["logit_table"][position].transpose(1, 0, 2, 3)
    most = score.max(axis=(2, 3, 4), keepdims=True)
    if call.null_slot:  # one more logit, of 0
        most = np.maximum(most, 0)
    power = np.exp(score - most)  # [q, h, m, l, p]
    total = power.sum(axis=(2, 3, 4), keepdims=True) + np.exp(-most) * call.null_slot
    weight = power / total
    queries, heads, images, levels, points = weight.shape
    grid = (2 * location - 1).transpose(2, 1, 0, 3, 4).reshape(images * heads, queries, points, 2)
    weight = weight.transpose(3, 2, 1, 0, 4).reshape(levels, images * heads, 1, queries, points)
    inputs = {
        "value": call["value"][call["image_slot"][b]],
        "grid": grid.astype(np.float32),
        "weight": weight.astype(np.float32),
    }
    if call.null_slot:
        share = (np.exp(-most) / total)[:, :, 0, 0] * call["null_value"]  # [q, h, d]
        inputs["null"] = share.reshape(1, queries, -1).astype(np.float32)
    return inputs


def grid_sample_model(call: Call) -> bytes:
    """Build GridSample's side as ONNX: inputs of `precomputed` -> output [1, q, h*d]."""
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
    shapes = tuple(zip(call.level_heights, call.level_widths, strict=True))
    cells = [height * width for height, width in shapes]
    maps = [f"map{level}" for level in range(levels)]
    nodes.append(oh.make_node("Split", [planes, constant("cells", cells)], maps, axis=3))
    shares = [f"share{level}" for level in range(levels)]
    nodes.append(oh.make_node("Split", ["weight"], shares, axis=0, num_outputs=levels))
    total = ""
    for level, (height, width) in enumerate(shapes):
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
    rows = constant("rows", [1, q, h * d])
    add("Reshape", [turned, rows], "sampled" if call.null_slot else "output")
    if call.null_slot:
        add("Add", ["sampled", "null"], "output")
    given = [
        oh.make_tensor_value_info("value", TensorProto.FLOAT, [m, s, h, d]),
        oh.make_tensor_value_info("grid", TensorProto.FLOAT, [m * h, q, p, 2]),
        oh.make_tensor_value_info("weight", TensorProto.FLOAT, [levels, m * h, 1, q, p]),
    ]
    if call.null_slot:
        given.append(oh.make_tensor_value_info("null", TensorProto.FLOAT, [1, q, h * d]))
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


def implementations(call: Call, library: Path, threads: int) -> dict[str, Run]:
    """The three implementations of `call`, ready to run."""
    inputs = {name: call[name] for name in INPUT_SHAPES}
    function = mmfs_function(call.sizes["l"], MAX_GATHERED)
    return {
        OURS: bound(one_node_model(call), inputs, threads, library),
        FUNCTION: bound(one_node_model(call, function), inputs, threads, None),
        GRID_SAMPLE: bound(grid_sample_model(call), precomputed(call), threads, None),
    }


def compare(
    shape: Shape,
    queries: int,
    library: Path,
    threads: int,
    settings: Settings,
    turns: int = TURNS,
) -> Comparison:
    """Measure the implementations, which take turns.

    Raises `EngineError` if the output of one differs from the float64 reference.
    """
    call = call_of(shape, queries)
    found = implementations(call, library, threads)
    rows = all_rows(call)[:: max(1, call.rows // _ROWS_COMPARED)]
    b, q, h = rows.T
    wanted = mmfs_reference(call, rows)
    worst = 0.0
    for name, run in found.items():
        got = run().reshape(1, queries, shape.heads, shape.channels)[b, q, h]
        error = float(np.abs(got - wanted).max())
        if not error < 1e-4:
            raise EngineError(f"{name} is wrong at {queries} queries", expected="< 1e-4", got=error)
        worst = max(worst, error)
    measured = measure_in_turns([Computation(run) for run in found.values()], settings, turns)
    return Comparison(queries, dict(zip(found, measured, strict=True)), worst)


def table(comparisons: Sequence[Comparison], shape: Shape) -> Table:
    """Table of throughput and latency, with quartiles of the speed-up."""
    shown = Table(
        box=box.SIMPLE_HEAD, title=f"MMFS alone: {shape}; milliseconds", title_justify="left"
    )
    shown.add_column("queries", justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True)
    for heading in ("runs", "runs/s", "min", "median", "p90", "p95", "p99"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("our kernel is times as fast", justify="right", no_wrap=True)
    for item in comparisons:
        for name, found in item.measurements.items():
            latency = found.summaries()["latency"]
            assert latency is not None, "every run has a latency"
            tails = (latency.p90, latency.p95, latency.p99)
            ratio = item.speedup(name)
            shown.add_row(
                str(item.queries) if name == OURS else "",
                name,
                str(len(found.runs)),
                f"{found.throughput:.4g}",
                *(_ms(value) for value in (latency.min, latency.median, *tails)),
                "" if name == OURS else f"{ratio.median:.3g} ({ratio.low:.3g} to {ratio.high:.3g})",
            )
    return shown


def report(comparisons: Sequence[Comparison], shape: Shape) -> dict[str, Any]:
    """The results for JSON."""
    return {"shape": asdict(shape), "sizes": [one.to_json() for one in comparisons]}


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
