"""Any precision on a CPU: numbers are rounded to their type after every operator, sums are float32.

ONNX Runtime has no kernels for bfloat16 on the CPU. A graph that was rewritten for a GPU is turned
back into float32, with each of its narrow tensors rounded where it is made. That is what tensor
cores do, which add up in float32 and round at the end; only the order of the sums differs.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
_F32 = ir.TensorType(ir.DataType.FLOAT)


def simulated(path: Path) -> ir.Model:
    """The graph of `path` in float32, rounding as it would; inputs and outputs are float32."""
    model = ir.from_proto(onnx.load(path, load_external_data=False))
    ir.external_data.set_base_dir(model.graph, path.parent)
    graph = model.graph
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
    return model


def _round(graph: ir.Graph, value: ir.Value, stored: bool = False) -> None:
    """Let all who read `value` read it rounded to its type, as float32. A stored one is rounded
    already."""
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
