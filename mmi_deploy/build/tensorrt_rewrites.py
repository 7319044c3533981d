"""What TensorRT's compiler cannot do, said in what it can: one named rewrite for each, exact, and
done on TensorRT's own copy of a graph alone. Weights are not read."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import TensorProto, helper

BFLOAT16 = TensorProto.BFLOAT16


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` after all rewrites."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for rewrite in REWRITES:
        rewrite(copy)
    return copy


def deconvolution_in_float32(model: onnx.ModelProto) -> None:
    """ConvTranspose between casts where it would be in bfloat16: TensorRT-RTX 1.7 knows it in
    float16 and float32 only ("Could not infer output types for operation: deconv")."""
    bfloat16 = _bfloat16_values(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "ConvTranspose" or node.domain or node.input[0] not in bfloat16:
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if name:
                node.input[index] = wide = f"{name}.{node.name}.float32"
                nodes.append(_cast(name, wide, TensorProto.FLOAT))
        narrow, node.output[0] = node.output[0], f"{node.output[0]}.float32"
        nodes += [node, _cast(node.output[0], narrow, BFLOAT16)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


REWRITES: tuple[Callable[[onnx.ModelProto], None], ...] = (deconvolution_in_float32,)
"""In the order in which they are made."""


def _cast(source: str, out: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [out], name=f"{out}.cast", to=to)


def _bfloat16_values(model: onnx.ModelProto) -> set[str]:
    """Names of values that are known to be bfloat16."""
    if not any(node.op_type == "ConvTranspose" for node in model.graph.node):
        return set()
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    return {value.name for value in values if value.type.tensor_type.elem_type == BFLOAT16} | {
        tensor.name for tensor in graph.initializer if tensor.data_type == BFLOAT16
    }
