"""ONNX rewrites for operators that ONNX Runtime's CUDA provider has no kernel of.

Each rewrite is exact. Without it the operator would run on the CPU, between two copies.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

# Slice takes it for the end of an axis.
_END = np.iinfo(np.int64).max


def rewrite_for_cuda(model: onnx.ModelProto) -> None:
    """Apply all rewrites to `model`, in place. Its values must have types (`infer_shapes`)."""
    pooling_as_maximum(model)


def pooling_as_maximum(model: onnx.ModelProto) -> None:
    """Replace each MaxPool by the maximum of strided slices, one per cell of its window.

    The provider registers the version of opset 12 as the last one, and ONNX Runtime 1.31 to 1.32
    takes it for no later version: the graphs have that of opset 22.
    """
    types = {value.name: value.type.tensor_type for value in _values(model.graph)}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "MaxPool" and not node.domain and _is_plain(node):
            nodes += _maximum(model.graph, node, types[node.input[0]].elem_type)
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _values(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    return [*graph.input, *graph.value_info, *graph.output]


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {field.name: helper.get_attribute_value(field) for field in node.attribute}


def _is_plain(node: onnx.NodeProto) -> bool:
    """Test for a window without gaps, placed by pads, of which only values are wanted."""
    found = _attributes(node)
    dilations = found.get("dilations", [1])
    assert isinstance(dilations, list)
    return (
        set(dilations) == {1}
        and found.get("ceil_mode", 0) == 0
        and found.get("auto_pad", b"NOTSET") == b"NOTSET"
        and len(node.output) == 1
    )


def _maximum(graph: onnx.GraphProto, node: onnx.NodeProto, kind: int) -> list[onnx.NodeProto]:
    found = _attributes(node)
    window = found["kernel_shape"]
    assert isinstance(window, list)
    rank = len(window)
    strides, pads = found.get("strides", [1] * rank), found.get("pads", [0] * (2 * rank))
    assert isinstance(strides, list) and isinstance(pads, list)
    axes = list(range(2, 2 + rank))

    def constant(name: str, values: np.ndarray) -> str:
        full = f"{node.output[0]}.{name}"
        graph.initializer.append(numpy_helper.from_array(values, full))
        return full

    least = np.array(-np.inf, helper.tensor_dtype_to_np_dtype(kind))
    padded = f"{node.output[0]}.padded"
    around = [0, 0, *pads[:rank], 0, 0, *pads[rank:]]
    made = [
        helper.make_node(
            "Pad",
            [
                node.input[0],
                constant("pads", np.array(around, np.int64)),
                constant("least", least),
            ],
            [padded],
            f"{node.name}.pad",
        )
    ]
    along = constant("axes", np.array(axes, np.int64))
    steps = constant("steps", np.array(strides, np.int64))
    cells = []
    for cell in np.ndindex(*window):
        # The last window begins where its last cell is inside: each cell ends as far before that.
        behind = [side - 1 - place for side, place in zip(window, cell, strict=True)]
        ends = [-count if count else _END for count in behind]
        word = "_".join(map(str, cell))
        cells.append(f"{node.output[0]}.{word}")
        made.append(
            helper.make_node(
                "Slice",
                [
                    padded,
                    constant(f"starts_{word}", np.array(cell, np.int64)),
                    constant(f"ends_{word}", np.array(ends, np.int64)),
                    along,
                    steps,
                ],
                [cells[-1]],
                f"{node.name}.{word}",
            )
        )
    return [*made, helper.make_node("Max", cells, [node.output[0]], f"{node.name}.max")]
