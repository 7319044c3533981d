"""Rewrites for TensorRT's compiler: exact, on its own copy, weights unread."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmi_deploy.build.tensorrt_rewrites import rewritten


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
def test_a_bfloat16_deconvolution_is_computed_in_float32(bias: bool) -> None:
    """TensorRT-RTX 1.7.1 stops at it; ONNX Runtime has no such kernel either, so what comes out is
    compared with NumPy: products of the rounded numbers, rounded once."""
    model = rewritten(deconvolution(TensorProto.BFLOAT16, bias))
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


def test_what_tensorrt_knows_stays_and_the_original_too() -> None:
    single = deconvolution(TensorProto.FLOAT)
    assert rewritten(single) == single
    narrow = deconvolution(TensorProto.BFLOAT16)
    before = narrow.SerializeToString()
    assert rewritten(narrow) != narrow and narrow.SerializeToString() == before
