"""Small graphs for TensorRT-RTX's builder, and the kernel plans that it makes of them, without a
GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmi_deploy.bundle.kernel_plan import ProfilePlan
from mmi_deploy.spec.backends import TENSORRT_RTX
from mmi_deploy.spec.graphs import IR_VERSION, OPSET, Range
from mmi_deploy.system.progress import silent
from mmi_deploy.targets.profiles import DEFAULT, Profile, Shape
from mmi_deploy.targets.tensorrt_build import Job, build_engine, open_tensorrt
from mmi_plugins.tensorrt.plugin import plugin_for

TYPES = {
    "float32": (TensorProto.FLOAT, np.float32),
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
Side = int | str


def value(name: str, dtype: str, *shape: Side) -> onnx.ValueInfoProto:
    kind = {"int64": TensorProto.INT64, "bool": TensorProto.BOOL}.get(dtype)
    return helper.make_tensor_value_info(name, kind or TYPES[dtype][0], shape)


def weight(name: str, dtype: str, *shape: int) -> onnx.TensorProto:
    """Positive numbers, as scales of DequantizeLinear must be."""
    draw = np.random.default_rng(len(name)).uniform(0.01, 0.03, shape)
    return numpy_helper.from_array(draw.astype(TYPES[dtype][1]), name)


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    for index, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type}_{index}"
    made = helper.make_graph(list(nodes), "small", list(inputs), list(outputs), list(weights))
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(made, opset_imports=opset, ir_version=IR_VERSION)


def attention(dtype: str, tokens: int = 1024, heads: int = 5, width: int = 64) -> onnx.ModelProto:
    """One self-attention on [1, heads, tokens, width], static."""
    shape = (1, heads, tokens, width)
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention")
    inputs = [value(name, dtype, *shape) for name in "qkv"]
    return graph([node], inputs, [value("y", dtype, *shape)])


def cached_attention(dtype: str = "float16", scaled_before: bool = False) -> onnx.ModelProto:
    """Attention of one new token over a KV cache, of the sizes of LLaMA 13B: 40 heads of 128, 2048
    slots. scaled_before: queries are scaled by a Mul, and the operator by 1."""
    heads, slots, width = 40, 2048, 128
    names = [("q", 1), ("k", 1), ("v", 1), ("past_key", slots), ("past_value", slots)]
    inputs = [value(name, dtype, 1, heads, t, width) for name, t in names]
    inputs += [value("write_index", "int64", 1), value("mask", "bool", 1, 1, 1, slots)]
    nodes = [
        helper.make_node("TensorScatter", [f"past_{name}", name[0], "write_index"],
                         [f"present_{name}"], axis=2, mode="linear")
        for name in ("key", "value")
    ]  # fmt: skip
    query, options, weights = "q", {}, []
    if scaled_before:
        query, options = "scaled", {"scale": 1.0}
        number = np.array(width**-0.5, TYPES[dtype][1])
        weights = [numpy_helper.from_array(number, "scale")]
        nodes.append(helper.make_node("Mul", ["q", "scale"], [query]))
    read = [query, "present_key", "present_value", "mask"]
    nodes.append(helper.make_node("Attention", read, ["y"], name="attention", **options))
    outputs = [value("y", dtype, 1, heads, 1, width)]
    outputs += [
        value(f"present_{name}", dtype, 1, heads, slots, width) for name in ("key", "value")
    ]
    return graph(nodes, inputs, outputs, weights)


def group_norm(channels: int, side: int) -> onnx.ModelProto:
    """Group norm of 32 groups in float16 on [2, channels, side, side], and SiLU."""
    shape = (2, channels, side, side)
    nodes = [
        helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["normed"], name="norm",
                         num_groups=32, epsilon=1e-5, stash_type=1),
        helper.make_node("Sigmoid", ["normed"], ["gate"]),
        helper.make_node("Mul", ["normed", "gate"], ["y"]),
    ]  # fmt: skip
    weights = [weight(name, "float16", channels) for name in ("scale", "bias")]
    ends = [value(name, "float16", *shape) for name in "xy"]
    return graph(nodes, ends[:1], ends[1:], weights)


def quantised_product(rows: Side, numbers: str = "int8") -> onnx.ModelProto:
    """x [1, rows, 512] in float16 times a weight [512, 2048] behind DequantizeLinear. numbers:
    `int8`, one scale per channel, or `int4`, one per 32 rows."""
    inside, out, block = 512, 2048, 32
    if numbers == "int8":
        stored = numpy_helper.from_array(np.ones((inside, out), np.int8), "numbers")
        scales, options = weight("scales", "float16", out), {"axis": 1}
    else:
        packed = np.full(inside * out // 2, 0x11, np.uint8).tobytes()
        stored = TensorProto(name="numbers", dims=[inside, out], data_type=TensorProto.INT4,
                             raw_data=packed)  # fmt: skip
        scales = weight("scales", "float16", inside // block, out)
        options = {"axis": 0, "block_size": block}
    nodes = [
        helper.make_node("DequantizeLinear", ["numbers", "scales"], ["w"], name="dq", **options),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    ends = [value("x", "float16", 1, rows, inside), value("y", "float16", 1, rows, out)]
    return graph(nodes, ends[:1], ends[1:], [stored, scales])


def plans_of(
    model: onnx.ModelProto,
    folder: Path,
    architecture: str = "sm89",
    shapes: Mapping[str, tuple[Shape, Shape, Shape]] | None = None,
    name: str = DEFAULT,
) -> tuple[ProfilePlan, ...]:
    """Build `model` for TensorRT-RTX as `mmi build` does. shapes: (min, opt, max) of its dynamic
    inputs, in one profile called `name`."""
    plugin = plugin_for(TENSORRT_RTX, architecture)
    source = folder / "small.onnx"
    onnx.save(plugin.copy(model), source)
    profile = Profile(name, {"b": Range(1, 1, 1)}, dict(shapes or {}))
    job = Job("small", TENSORRT_RTX, architecture, source, folder / "small.engine", (profile,),
              plugin)  # fmt: skip
    return build_engine(open_tensorrt(plugin, TENSORRT_RTX, architecture), job, silent).plans
