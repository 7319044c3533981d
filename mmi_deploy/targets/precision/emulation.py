"""Emulate fp16 and bf16 graphs on the CPU by rounding after every operator.

ONNX Runtime has no CPU kernels for bfloat16. A graph that was rewritten for a GPU is converted back
to float32, and each of its fp16 or bf16 tensors is rounded where it is produced. Tensor cores do
the same: they accumulate in float32 and round at the end; only the order of the sums differs.

Some attention kernels keep logits in float32, others in float16. Here logits are float32, but
infinite beyond the float16 range: a graph that is correct only with float32 logits gives
infinities. The scale of logits is that of TensorRT, which rounds it (`attention_scale.py`).
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from mmi_deploy.targets.precision.attention_scale import rounded_scale
from mmi_deploy.targets.precision.ranges import attention_scale
from mmi_deploy.targets.precision.recipes import FLOAT16, MAX_FINITE

_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
_F32 = ir.TensorType(ir.DataType.FLOAT)
_INFINITY = float("inf")


def emulated(path: Path, rounded_scales: bool = True) -> ir.Model:
    """Convert the graph of `path` to float32 with the rounding of its types. Inputs and outputs are
    float32. rounded_scales: attention scales its logits as TensorRT does, else exactly."""
    model = ir.from_proto(onnx.load(path, load_external_data=False))
    ir.external_data.set_base_dir(model.graph, path.parent)
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Attention" or node.outputs[0].dtype not in _NARROW:
            continue
        if rounded_scales and "scale" not in node.attributes:
            scale = rounded_scale(int(node.inputs[0].shape[-1]), node.outputs[0].dtype)
            node.attributes["scale"] = ir.AttrFloat32("scale", scale)
        if node.outputs[0].dtype == ir.DataType.FLOAT16:
            _overflowing_attention(graph, node)
    outputs = {value: str(value.name) for value in graph.outputs if value.dtype in _NARROW}
    for node in list(graph):
        if node.op_type == "ConstantOfShape" and node.outputs[0].dtype in _NARROW:
            number = float(node.attributes["value"].as_tensor().numpy().reshape(-1)[0])
            node.attributes["value"] = ir.AttrTensor(
                "value", ir.tensor([number], ir.DataType.FLOAT)
            )
        if node.op_type == "Cast" and node.outputs[0].dtype in _NARROW:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        for value in node.outputs:
            if value.dtype in _NARROW:
                _round(graph, value)
    for value in (*graph.inputs, *graph.initializers.values()):
        if value.dtype in _NARROW:
            _round(graph, value, stored=value.const_value is not None)
    for value, name in outputs.items():
        index = list(graph.outputs).index(value)
        value.name = f"{name}.exact"
        rounded = next(user for user, _ in value.uses()).outputs[0]
        back = next(user for user, _ in rounded.uses()).outputs[0]
        back.name = name
        graph.outputs[index] = back
    passes.NameFixPass()(model)
    return model


def _round(graph: ir.Graph, value: ir.Value, stored: bool = False) -> None:
    """Insert casts after `value`, so that its readers get float32 rounded to its type. stored: the
    value is an initialiser, which is rounded already."""
    narrow, readers = value.dtype, list(value.uses())
    assert narrow is not None
    if not stored:
        value.type = _F32
    name, steps, last = str(value.name), [], value
    for suffix, dtype in ((".rounded", narrow), (".back", ir.DataType.FLOAT)):
        if stored and dtype == narrow:
            continue
        output = ir.Value(name=name + suffix, type=ir.TensorType(dtype), shape=value.shape)
        steps.append(
            ir.node("Cast", [last], {"to": dtype}, outputs=[output], name=f"{name}{suffix}.cast")
        )
        last = output
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], steps)
    else:
        graph.insert_after(producer, steps)
    for reader, position in readers:
        reader.replace_input_with(position, last)


def _overflowing_attention(graph: ir.Graph, node: ir.Node) -> None:
    """Replace an Attention on [b, h, t, d] by operators in float32, with infinite logits where they
    exceed the float16 range."""
    query, key, value = node.inputs[:3]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    assert query is not None and key is not None and value is not None
    assert query.shape is not None and key.shape is not None and value.shape is not None
    assert len(query.shape) == 4, "attention is exported on [b, h, t, d]"
    heads, groups = int(query.shape[1]), int(key.shape[1])
    width = int(query.shape[3])
    tape = ir.tape.Tape()

    def wide(tensor: ir.Value) -> ir.Value:
        return tape.op("Cast", [tensor], {"to": ir.DataType.FLOAT})

    def number(constant: float) -> ir.Value:
        return tape.op("Constant", [], {"value_float": constant})

    def per_head(tensor: ir.Value, channels: int) -> ir.Value:
        """[b, g, c, d] -> [b, h, c, d], in float32"""
        tensor = wide(tensor)
        if heads == groups:
            return tensor
        axis = tape.op("Constant", [], {"value_ints": [2]})
        tiled = tape.op(
            "Concat", [tape.op("Unsqueeze", [tensor, axis])] * (heads // groups), {"axis": 2}
        )
        shape = tape.op("Constant", [], {"value_ints": [0, heads, -1, channels]})
        return tape.op("Reshape", [tiled, shape])

    turned = tape.op("Transpose", [per_head(key, width)], {"perm": [0, 1, 3, 2]})
    scaled = tape.op("Mul", [wide(query), number(attention_scale(node))])
    logits = tape.op("MatMul", [scaled, turned])
    outside = tape.op("Greater", [tape.op("Abs", [logits]), number(MAX_FINITE[FLOAT16])])
    logits = tape.op("Where", [outside, tape.op("Mul", [logits, number(_INFINITY)]), logits])
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        logits = tape.op("Where", [mask, logits, number(-_INFINITY)])
    elif mask is not None:
        logits = tape.op("Add", [logits, wide(mask)])
    weights = tape.op("Softmax", [logits], {"axis": -1})
    attended = tape.op("MatMul", [weights, per_head(value, int(value.shape[3]))])
    output = tape.op("Cast", [attended], {"to": ir.DataType.FLOAT16})
    for step in tape.nodes:
        for made in step.outputs:
            if made.type is None:
                made.type = _F32
    output.type, output.shape = node.outputs[0].type, node.outputs[0].shape
    outside.type = ir.TensorType(ir.DataType.BOOL)
    old = node.outputs[0]
    output.name = old.name
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, [old], [output])
