"""Weight-only products of TensorRT's copy as nodes of our plugin: the same numbers, in one node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exports import SHIPPED, Exported
from mmi_deploy.errors import EngineError
from mmi_deploy.spec.backends import TENSORRT_RTX
from mmi_deploy.targets.plan_rules import facts_of
from mmi_deploy.targets.precision import recipe, rewrite
from mmi_plugins.gemv.operator import DOMAIN, NAME, TOLERANCES
from mmi_plugins.onnxruntime import library as onnxruntime_library
from mmi_plugins.tensorrt.build_only_products import check_shapes, checked_fields
from mmi_plugins.tensorrt.graph import PLUGIN_NAMESPACE
from mmi_plugins.tensorrt.weight_only import PRODUCTS, weight_only_products

ort = pytest.importorskip("onnxruntime")
needs_library = pytest.mark.skipif(
    onnxruntime_library.compiler() is None, reason="there is no C++ compiler"
)
ELEMENTS = {
    "float16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
    "float32": (TensorProto.FLOAT, np.dtype(np.float32)),
}


def stored(name: str, dtype: int, dims: tuple[int, ...], data: bytes) -> TensorProto:
    return TensorProto(name=name, data_type=dtype, dims=dims, raw_data=data)


def graph(
    folder: Path, format_: str, block: int = 0, dtype: str = "float16", inputs: int = 160
) -> tuple[Path, np.ndarray]:
    """A file of two products of x [b, t, inputs] with one weight [inputs, 40] behind
    DequantizeLinear; and that weight, float64."""
    rng = np.random.default_rng(0)
    element, kind = ELEMENTS[dtype]
    if format_ == "float8":
        numbers = rng.normal(size=(inputs, 40)).astype(ml_dtypes.float8_e4m3fn)
        weight = stored("w", TensorProto.FLOAT8E4M3FN, numbers.shape, numbers.tobytes())
    elif format_ == "int8":
        numbers = rng.integers(-128, 128, (inputs, 40)).astype(np.int8)
        weight = stored("w", TensorProto.INT8, numbers.shape, numbers.tobytes())
    else:
        numbers = rng.integers(-8, 8, (inputs, 40)).astype(np.int8)
        flat = numbers.reshape(-1, 2).astype(np.uint8) & 15
        packed = (flat[:, 0] | flat[:, 1] << 4).astype(np.uint8)
        weight = stored("w", TensorProto.INT4, numbers.shape, packed.tobytes())
    shape = (inputs // block, 40) if block else (40,)
    scales = rng.uniform(0.01, 0.1, shape).astype(kind)
    options = {"axis": 0, "block_size": block} if block else {"axis": 1}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["dequantised"], **options),
        helper.make_node("MatMul", ["x", "dequantised"], ["y"], name="first"),
        helper.make_node("Neg", ["x"], ["n"]),
        helper.make_node("MatMul", ["n", "dequantised"], ["z"], name="second"),
    ]
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "products",
        [value("x", element, ["b", "t", inputs])],
        [value(name, element, ["b", "t", 40]) for name in "yz"],
        [weight, stored("s", element, shape, scales.tobytes())],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    path = folder / "graph.onnx"
    onnx.save(model, path, save_as_external_data=True, location="graph.data", size_threshold=0)
    wide = scales.astype(np.float64)
    return path, numbers.astype(np.float64) * (np.repeat(wide, block, 0) if block else wide)


def load(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def run(model: onnx.ModelProto, folder: Path, x: np.ndarray) -> list[np.ndarray]:
    """Outputs of a graph with our nodes, by the CPU kernels of our library."""
    for node in model.graph.node:
        kept = [a for a in node.attribute if a.name != PLUGIN_NAMESPACE]
        del node.attribute[:]
        node.attribute.extend(kept)
    onnx.save(model, folder / "plugin.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(
        str(onnxruntime_library.find() or onnxruntime_library.build())
    )
    session = ort.InferenceSession(folder / "plugin.onnx", options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x})  # type: ignore[no-any-return]


@needs_library
@pytest.mark.parametrize(("format_", "block"), [("int8", 0), ("float8", 0), ("int4", 32)])
@pytest.mark.parametrize("rows", [1, 11])
def test_the_rewritten_graph_agrees_with_float64(
    format_: str, block: int, rows: int, tmp_path: Path
) -> None:
    path, weight = graph(tmp_path, format_, block)
    model = weight_only_products(load(path), path)
    assert [node.op_type for node in model.graph.node] == [NAME, "Neg", NAME]
    assert [node.name for node in model.graph.node if node.domain] == ["first", "second"]
    x = np.random.default_rng(1).normal(size=(1, rows, 160)).astype(np.float16)
    y, z = run(model, tmp_path, x)
    expected = x.astype(np.float64) @ weight
    error = np.sqrt(((y - expected) ** 2).mean() / (expected**2).mean())
    assert y.shape == (1, rows, 40) and error <= TOLERANCES["float16"]
    np.testing.assert_array_equal(z, -y)


def test_a_shared_weight_is_packed_once_and_the_old_one_is_dropped(tmp_path: Path) -> None:
    path, _ = graph(tmp_path, "int4", 32, "bfloat16")
    model = weight_only_products(load(path), path)
    assert [tensor.name for tensor in model.graph.initializer] == ["w.packed", "s.packed"]
    weight, scales = model.graph.initializer
    assert list(weight.dims) == [3, 2, 256] and weight.data_type == TensorProto.INT32
    assert list(scales.dims) == [3, 2, 8, 4, 2] and scales.data_type == TensorProto.BFLOAT16
    assert path.with_suffix(PRODUCTS).stat().st_size == 3 * 2 * 256 * 4 + 3 * 2 * 8 * 4 * 2 * 2
    assert {i.domain: i.version for i in model.opset_import} == {"": 24, DOMAIN: 1}
    assert facts_of(model).plugins == ("first", "second")


@pytest.mark.parametrize(
    ("format_", "block", "dtype", "inputs"),
    [("int8", 0, "float16", 48), ("int4", 16, "float16", 160), ("int8", 0, "float32", 160)],
)
def test_a_product_that_no_kernel_takes_stays_as_it_is(
    format_: str, block: int, dtype: str, inputs: int, tmp_path: Path
) -> None:
    path, _ = graph(tmp_path, format_, block, dtype, inputs)
    model = load(path)
    assert weight_only_products(model, path) == model
    assert not path.with_suffix(PRODUCTS).exists()


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "mixed"])
def test_every_product_of_the_language_model_has_the_numbers_of_its_recipe(
    precision: str, exported_once: Callable[[str], Exported], tmp_path: Path
) -> None:
    """Node by node: same inputs and outputs, and outputs of a single node that are those of the
    recipe's weight in float64."""
    exported, path = exported_once(SHIPPED), tmp_path / "llm.onnx"
    bundle = exported.bundle
    rewrite(recipe(precision), bundle.graphs["llm"], bundle.graph_file("llm"), path,
            runtime=TENSORRT_RTX)  # fmt: skip
    before = load(path)
    after = weight_only_products(before, path)
    old = {node.output[0]: node for node in before.graph.node}
    numbers = {tensor.name: tensor for tensor in before.graph.initializer}
    packed = {tensor.name: tensor for tensor in after.graph.initializer}
    ours = [node for node in after.graph.node if node.op_type == NAME]
    assert len(ours) == sum(node.op_type == "DequantizeLinear" for node in before.graph.node) > 20
    rest = [node for node in after.graph.node if node.op_type != NAME]
    taken = {node.output[0] for node in ours}
    same = [n for n in before.graph.node if n.output[0] not in taken]
    assert rest == [node for node in same if node.op_type != "DequantizeLinear"]
    rng = np.random.default_rng(0)
    for node in ours:
        product = old[node.output[0]]
        assert product.input[0] == node.input[0]
        w, s = (numpy_helper.to_array(numbers[name], str(tmp_path))
                for name in old[product.input[1]].input)  # fmt: skip
        block = len(w) // len(s) if s.ndim == 2 else 0
        scales = s.astype(np.float64)
        weight = w.astype(np.float64) * (np.repeat(scales, block, 0) if block else scales)
        x = rng.normal(size=(2, len(w))).astype(np.float16)
        value = helper.make_tensor_value_info
        single = helper.make_graph(
            [helper.make_node(NAME, ["x", *node.input[1:]], ["y"], domain=DOMAIN)],
            "single",
            [value("x", TensorProto.FLOAT16, x.shape)],
            [value("y", TensorProto.FLOAT16, None)],
            [packed[name] for name in node.input[1:]],
        )
        single.node[0].attribute.extend(node.attribute)
        model = helper.make_model(single, opset_imports=after.opset_import, ir_version=10)
        (y,) = run(model, tmp_path, x)
        expected = x.astype(np.float64) @ weight
        error = np.sqrt(((y - expected) ** 2).mean() / (expected**2).mean())
        assert error <= TOLERANCES["float16"], node.name


# --- the build-only plugin's checks --------------------------------------------------------------


def fields(**changed: Any) -> dict[str, np.ndarray]:
    arrays = {"format": 2, "out": 40, "block": 64} | changed
    return {name: np.array([number], np.int32) for name, number in arrays.items()}


def test_right_fields_and_shapes_pass() -> None:
    kept = checked_fields(fields(), needs_version=False)
    check_shapes([[None, None, 320], [3, 3, 256], [3, 3, 8, 2, 2]], kept)
    check_shapes([[5, 128], [3, 1, 512], [40]], checked_fields(fields(format=0, block=0), False))
    assert checked_fields({**fields(), "plugin_version": np.array([1], np.int32)}, True) == kept


@pytest.mark.parametrize(
    ("given", "needs_version", "reason"),
    [
        (fields(block=16), False, "a block of int4 is not 32, 64 or 128"),
        (fields(format=0), False, "int8 and float8 have no blocks"),
        (fields(format=3), False, "the weight is neither int8, float8 nor int4"),
        (fields(out=0), False, "there are no output channels"),
        ({"format": np.array([0], np.int32)}, False, "attribute out; expected one int32; got 0"),
        (fields(), True, "other fields; expected version 1.*Build the engine again"),
    ],
)
def test_wrong_fields_are_refused(
    given: dict[str, np.ndarray], needs_version: bool, reason: str
) -> None:
    with pytest.raises(EngineError, match=reason):
        checked_fields(given, needs_version)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ([[1, 160], [3, 2, 256], [3, 2, 8, 2, 2]], "not a multiple of the block"),
        ([[1, 320], [3, 2, 256], [3, 3, 8, 2, 2]], r"weight; expected \[3, 3, 256\]; got"),
        ([[1, 320], [3, 3, 256], [40]], r"scales; expected \[3, 3, 8, 2, 2\]; got \[40\]"),
        ([[1, None], [3, 3, 256], [3, 3, 8, 2, 2]], "input channels are not known"),
        ([[1, 320], [3, 3, 256]], "number of inputs; expected 3; got 2"),
    ],
)
def test_wrong_shapes_are_refused(shapes: list[list[int | None]], reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        check_shapes(shapes, checked_fields(fields(), needs_version=False))
