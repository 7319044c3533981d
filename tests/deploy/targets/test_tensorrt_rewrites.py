"""Rewrites for TensorRT's compiler: exact, on its own copy, weights unread."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmi_deploy.errors import BundleError
from mmi_deploy.targets.tensorrt_rewrites import SIBLINGS, rewrite_for_tensorrt


def deconvolution(dtype: int, bias: bool = True) -> onnx.ModelProto:
    """Casts to `dtype` around a ConvTranspose of kernel and stride 2, as in the ViT-Adapter."""
    draw = np.random.default_rng(0)
    kind = {TensorProto.FLOAT: np.float32, TensorProto.BFLOAT16: ml_dtypes.bfloat16}[dtype]
    weights = [
        numpy_helper.from_array(draw.standard_normal((4, 3, 2, 2)).astype(kind), "weight"),
        numpy_helper.from_array(draw.standard_normal(3).astype(kind), "bias"),
    ]
    inputs = ["narrow", "weight", "bias"] if bias else ["narrow", "weight"]
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=dtype),
        helper.make_node("ConvTranspose", inputs, ["up"], name="up_node", strides=[2, 2]),
        helper.make_node("Cast", ["up"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "up",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 10, 10])],
        weights if bias else weights[:1],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


@pytest.mark.parametrize("bias", [True, False])
def test_a_bfloat16_deconvolution_is_computed_in_float32(bias: bool, tmp_path: Path) -> None:
    """TensorRT-RTX 1.7.1 stops at it; ONNX Runtime has no such kernel either, so what comes out is
    compared with NumPy: products of the rounded numbers, rounded once."""
    model = rewrite_for_tensorrt(deconvolution(TensorProto.BFLOAT16, bias), tmp_path / "up.onnx")
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    types = {value.name: value.type.tensor_type.elem_type for value in inferred}
    (node,) = [node for node in model.graph.node if node.op_type == "ConvTranspose"]
    assert {types[name] for name in [*node.input, *node.output]} == {TensorProto.FLOAT}
    assert types["up"] == TensorProto.BFLOAT16

    x = np.random.default_rng(1).standard_normal((2, 4, 5, 5)).astype(np.float32)
    weight = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float32)
    narrow = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = np.einsum("nihw,iokl->nohkwl", narrow, weight).reshape(2, 3, 10, 10)
    if bias:
        row = numpy_helper.to_array(model.graph.initializer[1]).astype(np.float32)
        expected = expected + row[:, None, None]
    expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, {"x": x})
    np.testing.assert_allclose(got, expected, rtol=2**-7, atol=1e-6)
    assert np.mean(got == expected) > 0.99


def test_what_tensorrt_knows_stays_and_the_original_too(tmp_path: Path) -> None:
    path = tmp_path / "up.onnx"
    single = deconvolution(TensorProto.FLOAT)
    assert rewrite_for_tensorrt(single, path) == single
    narrow = deconvolution(TensorProto.BFLOAT16)
    before = narrow.SerializeToString()
    assert rewrite_for_tensorrt(narrow, path) != narrow and narrow.SerializeToString() == before
    assert not list(tmp_path.iterdir())


WIDTH = 512  # a weight [WIDTH, WIDTH] of float32 is 1 MiB: worth putting together


def attention_products(path: Path, rows: tuple[int, ...]) -> onnx.ModelProto:
    """x [b, t, WIDTH] times weights [rows, WIDTH] stored as PyTorch stores them, in `path`."""
    draw = np.random.default_rng(0)
    nodes, outputs, weights = [], [], []
    with path.with_suffix(".safetensors").open("wb") as file:
        file.write(b"header")
        for index, count in enumerate(rows):
            data = draw.standard_normal((count, WIDTH)).astype(np.float32)
            weight = TensorProto(
                name=f"w{index}",
                data_type=TensorProto.FLOAT,
                dims=data.shape,
                data_location=TensorProto.EXTERNAL,
            )
            where = {"location": path.with_suffix(".safetensors").name, "offset": file.tell()}
            for key, value in (where | {"length": data.nbytes}).items():
                weight.external_data.add(key=key, value=str(value))
            file.write(data.tobytes())
            weights.append(weight)
            nodes.append(helper.make_node("Transpose", [f"w{index}"], [f"t{index}"], perm=[1, 0]))
            nodes.append(helper.make_node("MatMul", ["x", f"t{index}"], [f"y{index}"]))
            outputs.append(
                helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, ["b", "t", count])
            )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", WIDTH])
    graph = helper.make_graph(nodes, "qkv", [x], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def run(path: Path, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def test_products_of_one_tensor_become_one_with_the_same_results(tmp_path: Path) -> None:
    path = tmp_path / "qkv.onnx"
    model = attention_products(path, (WIDTH, WIDTH, WIDTH, 2 * WIDTH))
    onnx.save(model, path)
    x = np.random.default_rng(1).standard_normal((2, 3, WIDTH)).astype(np.float32)
    before = run(path, x)
    onnx.save(rewrite_for_tensorrt(model, path), path)
    onnx.checker.check_model(path, full_check=True)
    after = onnx.load(path, load_external_data=False).graph
    assert [node.op_type for node in after.node].count("MatMul") == 2, "the wider one is alone"
    assert path.with_suffix(SIBLINGS).stat().st_size == 3 * 4 * WIDTH**2
    shapes = {tensor.name: list(tensor.dims) for tensor in after.initializer}
    assert shapes["w0.siblings"] == [3 * WIDTH, WIDTH] and "w1" not in shapes
    for got, wanted in zip(run(path, x), before, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_small_or_single_products_stay(tmp_path: Path) -> None:
    path = tmp_path / "qkv.onnx"
    for rows in ((64, 64), (WIDTH,), (WIDTH, 2 * WIDTH)):
        model = attention_products(path, rows)
        assert rewrite_for_tensorrt(model, path) == model


def test_weights_that_end_too_soon_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "qkv.onnx"
    model = attention_products(path, (WIDTH, WIDTH))
    weights = path.with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BundleError, match="qkv.safetensors is too short for w1"):
        rewrite_for_tensorrt(model, path)
