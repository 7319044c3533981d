"""The rounding error of TensorRT's attention scale, folded into the query projections: by exact
algebra, and against TensorRT's own parser."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from deploy.targets.precision.graphs import contract, write
from mmi_deploy.runtime.onnxruntime.run_graph import model_runner
from mmi_deploy.spec.backends import TENSORRT_RTX
from mmi_deploy.spec.graphs import Graph, Tensor
from mmi_deploy.targets.precision import Ranges, recipe, rewrite
from mmi_deploy.targets.precision.attention_scale import fold_scales, rounded_scale
from mmi_deploy.targets.precision.constants import Constants
from mmi_deploy.targets.precision.emulation import emulated
from mmi_deploy.targets.precision.rewrite import read_model
from mmi_deploy.targets.precision.types import F32, NodeTypes

BF16, FP16 = ir.DataType.BFLOAT16, ir.DataType.FLOAT16
TOKENS, HEADS, KEY_HEADS, WIDTH, CHANNELS = 6, 4, 2, 128, 24


def drawn(name: str, *shape: int) -> np.ndarray:
    draw = np.random.default_rng(sum(name.encode()))
    return draw.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("width", "dtype", "error"),
    [(128, BF16, -2.87e-3), (128, FP16, 4.1e-4), (64, BF16, 0.0), (16, BF16, 0.0), (256, FP16, 0)],
)
def test_the_scale_of_tensorrt_is_rounded_at_each_step(
    width: int, dtype: ir.DataType, error: float
) -> None:
    """By hand for 128 in bfloat16: 11.3125, 0.08837890625, 0.296875, 0.088134765625."""
    found = rounded_scale(width, dtype) * width**0.5 - 1
    if error:
        assert found == pytest.approx(error, rel=0.05)
    else:
        assert abs(found) < 3e-3
    if (width, dtype) == (128, BF16):
        assert rounded_scale(width, dtype) == 0.296875**2


def fused(path: Path) -> tuple[Path, Graph, dict[str, np.ndarray]]:
    """As in the language model: one product, one rotary embedding, four heads on two keys."""
    heads = HEADS + 2 * KEY_HEADS
    weights: dict[str, Any] = {
        "qkv": drawn("qkv", CHANNELS, heads * WIDTH) / 8,
        "apart": np.array([0, TOKENS, heads, WIDTH]),
        "rotating": np.array([HEADS + KEY_HEADS, KEY_HEADS]),
        "of_rotating": np.array([HEADS, KEY_HEADS]),
        "cos": np.cos(drawn("angle", 2, TOKENS, WIDTH // 2)),
        "sin": np.sin(drawn("angle", 2, TOKENS, WIDTH // 2)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "qkv"], ["product"], name="product"),
        helper.make_node("Reshape", ["product", "apart"], ["cut"], name="cut"),
        helper.make_node("Transpose", ["cut"], ["turned"], perm=[0, 2, 1, 3], name="turn"),
        helper.make_node("Split", ["turned", "rotating"], ["plain", "v"], axis=1, name="split1"),
        helper.make_node("RotaryEmbedding", ["plain", "cos", "sin"], ["rotated"], name="rotary"),
        helper.make_node("Split", ["rotated", "of_rotating"], ["q", "k"], axis=1, name="split2"),
        helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention"),
    ]
    x = Tensor("x", "float32", ("b", TOKENS, CHANNELS), activation=True)
    y = Tensor("y", "float32", ("b", HEADS, TOKENS, WIDTH), activation=True)
    graph = contract([x], [y])
    return write(path, nodes, weights, graph), graph, weights


def normed(path: Path) -> tuple[Path, Graph, dict[str, np.ndarray]]:
    """As in Qwen3: queries and keys of one product have a norm each before their rotation."""
    heads = HEADS + 2 * KEY_HEADS
    weights: dict[str, Any] = {
        "qkv": drawn("qkv", CHANNELS, heads * WIDTH) / 8,
        "apart": np.array([0, TOKENS, heads, WIDTH]),
        "sizes": np.array([HEADS, KEY_HEADS, KEY_HEADS]),
        "q_norm": 1 + drawn("q_norm", WIDTH) / 4,
        "k_norm": 1 + drawn("k_norm", WIDTH) / 4,
        "cos": np.cos(drawn("angle", 2, TOKENS, WIDTH // 2)),
        "sin": np.sin(drawn("angle", 2, TOKENS, WIDTH // 2)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "qkv"], ["product"], name="product"),
        helper.make_node("Reshape", ["product", "apart"], ["cut"], name="cut"),
        helper.make_node("Transpose", ["cut"], ["turned"], perm=[0, 2, 1, 3], name="turn"),
        helper.make_node("Split", ["turned", "sizes"], ["q1", "k1", "v"], axis=1, name="split"),
    ]
    for name in "qk":
        norm = [f"{name}1", f"{name}_norm"]
        rotary = [f"{name}2", "cos", "sin"]
        nodes += [
            helper.make_node("RMSNormalization", norm, [f"{name}2"], name=f"{name}_normed"),
            helper.make_node("RotaryEmbedding", rotary, [name], name=f"{name}_rotary"),
        ]
    nodes.append(helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention"))
    x = Tensor("x", "float32", ("b", TOKENS, CHANNELS), activation=True)
    y = Tensor("y", "float32", ("b", HEADS, TOKENS, WIDTH), activation=True)
    graph = contract([x], [y])
    return write(path, nodes, weights, graph), graph, weights


def separate(path: Path, bias: bool, shared: bool = False) -> tuple[Path, Graph, dict[str, Any]]:
    """As in CLIP and the U-Net: a product for each, with or without a bias, some behind a
    Transpose. shared: queries are the keys too."""
    weights: dict[str, Any] = {"apart": np.array([0, TOKENS, HEADS, WIDTH])}
    nodes, out = [], HEADS * WIDTH
    for name in "qkv":
        weights[f"{name}_weight"] = drawn(name, CHANNELS, out) / 4
        weight = f"{name}_weight"
        if name == "q":
            weights[weight] = weights[weight].T.copy()
            nodes.append(helper.make_node("Transpose", [weight], ["qt"], perm=[1, 0], name="qt"))
            weight = "qt"
        nodes.append(helper.make_node("MatMul", ["x", weight], [f"{name}1"], name=f"{name}1"))
        last = f"{name}1"
        if bias:
            weights[f"{name}_bias"] = drawn(name, out)
            inputs = [f"{name}_bias", last]
            nodes.append(helper.make_node("Add", inputs, [f"{name}2"], name=f"{name}2"))
            last = f"{name}2"
        nodes += [
            helper.make_node("Reshape", [last, "apart"], [f"{name}3"], name=f"{name}3"),
            helper.make_node("Transpose", [f"{name}3"], [name], perm=[0, 2, 1, 3], name=f"{name}4"),
        ]
    read = ["q", "q" if shared else "k", "v"]
    nodes.append(helper.make_node("Attention", read, ["y"], name="attention"))
    x = Tensor("x", "float32", ("b", TOKENS, CHANNELS), activation=True)
    y = Tensor("y", "float32", ("b", HEADS, TOKENS, WIDTH), activation=True)
    graph = contract([x], [y], "vision_encoder")
    return write(path, nodes, weights, graph), graph, weights


def folded(path: Path, graph: Graph, dtype: ir.DataType) -> tuple[ir.Model, list[str]]:
    """The graph in float32 with folded weights, and its attention scaled as TensorRT scales it."""
    model = read_model(path, graph)
    constants = Constants(model.graph)
    low = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    left = fold_scales(
        model.graph, constants, NodeTypes(model.graph, constants, dtype, (), (), low)
    )
    for node in model.graph:
        if node.op_type == "Attention":
            scale = rounded_scale(WIDTH, dtype)
            node.attributes["scale"] = ir.AttrFloat32("scale", scale)
    return model, left


def inputs() -> dict[str, np.ndarray]:
    return {"x": drawn("x", 2, TOKENS, CHANNELS)}


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("form", ["fused", "normed", "plain", "bias"])
def test_the_folded_graph_is_exact_where_tensorrt_scales_it(
    form: str, dtype: ir.DataType, tmp_path: Path
) -> None:
    path = tmp_path / "g.onnx"
    if form in ("fused", "normed"):
        path, graph, _ = (fused if form == "fused" else normed)(path)
    else:
        path, graph, _ = separate(path, form == "bias")
    model, left = folded(path, graph, dtype)
    assert not left
    exact = model_runner(read_model(path, graph), tmp_path)(inputs())["y"]
    got = model_runner(model, tmp_path)(inputs())["y"]
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)
    unfolded = read_model(path, graph)
    for node in unfolded.graph:
        if node.op_type == "Attention":
            scale = rounded_scale(WIDTH, dtype)
            node.attributes["scale"] = ir.AttrFloat32("scale", scale)
    wrong = model_runner(unfolded, tmp_path)(inputs())["y"]
    assert np.abs(wrong - exact).max() > 30 * np.abs(got - exact).max()


def test_keys_and_values_of_the_same_product_keep_their_weights(tmp_path: Path) -> None:
    path, graph, weights = fused(tmp_path / "llm.onnx")
    out = tmp_path / "out.onnx"
    rewrite(recipe("bf16"), graph, path, out, runtime=TENSORRT_RTX)
    (got,) = products_of(out)
    factors = np.ones(weights["qkv"].shape[1], np.float32)
    factors[: HEADS * WIDTH] = WIDTH**-0.5 / rounded_scale(WIDTH, BF16)
    expected = (weights["qkv"] * factors).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))


def products_of(path: Path) -> list[np.ndarray]:
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    names = [node.input[1] for node in model.graph.node if node.op_type == "MatMul"]
    return [ir.serde.deserialize_tensor(stored[name]).numpy() for name in names]


def test_quantised_weights_have_the_factor_in_their_scales(tmp_path: Path) -> None:
    path, graph, _ = fused(tmp_path / "llm.onnx")
    rewrite(recipe("int8"), graph, path, tmp_path / "out.onnx", runtime=TENSORRT_RTX)
    model = onnx.load(tmp_path / "out.onnx")
    assert {node.op_type for node in model.graph.node} >= {"DequantizeLinear"}
    (scales,) = [t for t in model.graph.initializer if t.name.endswith(".scales")]
    queries = ir.serde.deserialize_tensor(scales).numpy()[: HEADS * WIDTH].astype(np.float64)
    weight = drawn("qkv", CHANNELS, (HEADS + 2 * KEY_HEADS) * WIDTH) / 8
    plain = np.abs(weight).max(0)[: HEADS * WIDTH] / 127
    factor = WIDTH**-0.5 / rounded_scale(WIDTH, FP16)
    assert np.median(queries / plain) == pytest.approx(factor, abs=1e-4)


def test_a_projection_that_serves_keys_too_is_left_as_it_is(tmp_path: Path) -> None:
    path, graph, _ = separate(tmp_path / "g.onnx", bias=False, shared=True)
    model, left = folded(path, graph, BF16)
    assert left == ["attention"]
    assert not any(name.endswith(".scaled") for name in model.graph.initializers)


def test_attention_in_float32_and_cpu_targets_keep_their_weights(tmp_path: Path) -> None:
    path, graph, _ = separate(tmp_path / "g.onnx", bias=True)
    for name, runtime in (("fp32", TENSORRT_RTX), ("fp32", "cpu")):
        rewrite(recipe(name), graph, path, tmp_path / "out.onnx", runtime=runtime)
        model = onnx.load(tmp_path / "out.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            assert not tensor.name.endswith(".scaled")


def test_folding_takes_the_error_out_of_the_simulation(tmp_path: Path) -> None:
    """In bfloat16, with weights that it holds exactly: logits of several tens, whose scale is
    0.287 % off without folding."""
    errors = {}
    for name in ("folded", "plain"):
        folder = tmp_path / name
        folder.mkdir()
        path, graph, _ = fused(folder / "llm.onnx")
        out = folder / "out.onnx"
        if name == "folded":
            rewrite(recipe("bf16"), graph, path, out, runtime=TENSORRT_RTX)
        else:
            _rewrite_without_folding(path, graph, out)
        exact = model_runner(read_model(path, graph), folder)(inputs())["y"]
        got = model_runner(emulated(out), folder)(inputs())["y"]
        errors[name] = float(np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)))
    assert errors["folded"] < errors["plain"]


def _rewrite_without_folding(path: Path, graph: Graph, out: Path) -> None:
    import sys

    module = sys.modules["mmi_deploy.targets.precision.rewrite"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fold_scales", lambda *_: [])
        rewrite(recipe("bf16"), graph, path, out, runtime=TENSORRT_RTX)


@pytest.mark.parametrize(("name", "wanted"), [("llm", F32), ("denoise_step", BF16)])
def test_attention_beyond_float16_has_the_type_that_its_graph_fuses(
    name: str, wanted: ir.DataType, tmp_path: Path
) -> None:
    """float32 in the language model, bfloat16 elsewhere; what reads it is float16 again."""
    path, graph, _ = separate(tmp_path / "g.onnx", bias=False)
    graph = Graph(name, graph.inputs, graph.outputs, graph.ranges)
    out = tmp_path / "out.onnx"
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "attended"
    model.graph.node.append(helper.make_node("Identity", ["attended"], ["y"], name="last"))
    onnx.save(model, path)
    ranges = Ranges({"x": 1.0}, {"attended": 1e6}, 1)
    rewrite(recipe("fp16"), graph, path, out, runtime=TENSORRT_RTX, ranges=ranges)
    types = _types(onnx.load(out))
    node = next(n for n in onnx.load(out).graph.node if n.op_type == "Attention")
    assert {types[one] for one in (*node.input, *node.output)} == {wanted.value}
    assert types["y"] == FP16.value and types["q1"] == FP16.value


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    values: Sequence[onnx.ValueInfoProto] = [*graph.input, *graph.value_info, *graph.output]
    return {value.name: value.type.tensor_type.elem_type for value in values}


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx-cu13"
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensorrts_parser_computes_the_scale_in_these_steps(dtype: str) -> None:
    """The operations before each product, and their types: a parser that differs needs another
    factor."""
    from deploy.targets.small_engines import attention
    from mmi_deploy.targets.tensorrt_build import open_tensorrt, strongly_typed
    from mmi_plugins.tensorrt.plugin import plugin_for

    plugin = plugin_for(TENSORRT_RTX, "sm89")
    trt = open_tensorrt(plugin, TENSORRT_RTX, "sm89")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(strongly_typed(trt))
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse(plugin.copy(attention(dtype)).SerializeToString())
    steps = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind, out = layer.type.name, layer.get_output(0).dtype.name
        if kind == "UNARY":
            layer.__class__ = trt.IUnaryLayer
            steps.append((layer.op.name, out))
        elif kind in ("CAST", "ELEMENTWISE", "ATTENTION_INPUT"):
            steps.append((kind, out))
    short = {"bfloat16": "BF16", "float16": "HALF"}[dtype]
    per_side = ["CAST", "SQRT", "RECIP", "SQRT", "ELEMENTWISE"]
    assert steps == [(step, short) for step in [*per_side, *per_side, "ATTENTION_INPUT"]]
