"""ONNX rewrites for ONNX Runtime's CUDA provider.

Each rewrite is exact. MaxPool has no kernel, and would run on the CPU between two copies. Split and
Concat of unequal parts copy a table of pointers from the host in every run; a CUDA graph would
record that copy, and read the table after its memory has been used for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Slice takes it for the end of an axis.
_END = np.iinfo(np.int64).max

# Element types that Pad has kernels for.
_PADDED = (TensorProto.FLOAT, TensorProto.FLOAT16)


def rewrite_for_cuda(model: onnx.ModelProto, recorded: bool) -> None:
    """Apply the rewrites to `model`, in place. Its values must have types (`infer_shapes`).

    recorded: its runs are recorded as CUDA graphs.
    """
    pooling_as_maximum(model)
    if recorded:
        splits_as_slices(model)
        joins_as_sums(model)


def splits_as_slices(model: onnx.ModelProto) -> None:
    """Replace each Split into unequal parts by one Slice per part."""
    shapes = _shapes(model.graph)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        axis, sizes = _parts(node, "Split", node.output, shapes)
        if len({*sizes}) < 2:
            nodes.append(node)
            continue
        ends = np.cumsum(np.array(sizes, np.int64))
        for name, size, end in zip(node.output, sizes, ends, strict=True):
            limits = {"starts": end - size, "ends": end, "axes": axis}
            given = [
                _constant(model.graph, f"{name}.{word}", np.array([value], np.int64))
                for word, value in limits.items()
            ]
            nodes.append(helper.make_node("Slice", [node.input[0], *given], [name], name))
    _replace(model, nodes)


def joins_as_sums(model: onnx.ModelProto) -> None:
    """Replace each Concat of unequal parts by the sum of the parts, each between zeros."""
    shapes, types = _shapes(model.graph), _types(model.graph)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        axis, sizes = _parts(node, "Concat", node.input, shapes)
        if len({*sizes}) < 2 or types.get(node.output[0]) not in _PADDED:
            nodes.append(node)
            continue
        (result,), rank = node.output, len(shapes[node.output[0]])
        ends = np.cumsum(np.array(sizes, np.int64))
        parts = []
        for index, (name, size, end) in enumerate(zip(node.input, sizes, ends, strict=True)):
            pads = np.zeros((2, rank), np.int64)
            pads[:, axis] = end - size, ends[-1] - end
            parts.append(f"{result}.part_{index}")
            given = _constant(model.graph, f"{parts[-1]}.pads", pads.reshape(-1))
            nodes.append(helper.make_node("Pad", [name, given], [parts[-1]], parts[-1]))
        nodes.append(helper.make_node("Sum", parts, [result], f"{node.name}.sum"))
    _replace(model, nodes)


def pooling_as_maximum(model: onnx.ModelProto) -> None:
    """Replace each MaxPool by the maximum of strided slices, one per cell of its window.

    The provider registers the version of opset 12 as the last one, and ONNX Runtime 1.31 to 1.32
    takes it for no later version: the graphs have that of opset 22.
    """
    types = _types(model.graph)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "MaxPool" and not node.domain and _is_plain(node):
            nodes += _maximum(model.graph, node, types[node.input[0]])
        else:
            nodes.append(node)
    _replace(model, nodes)


def _replace(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _constant(graph: onnx.GraphProto, name: str, values: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def _shapes(graph: onnx.GraphProto) -> Mapping[str, list[int | None]]:
    """Value -> sides, None where a side is dynamic."""
    found: dict[str, list[int | None]] = {t.name: [*t.dims] for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            sides = value.type.tensor_type.shape.dim
            found[value.name] = [s.dim_value if s.HasField("dim_value") else None for s in sides]
    return found


def _parts(
    node: onnx.NodeProto,
    operator: str,
    names: Sequence[str],
    shapes: Mapping[str, list[int | None]],
) -> tuple[int, list[int]]:
    """Axis of a Split or Concat, and the sizes of its parts; none for another operator, and where a
    size is dynamic or unknown."""
    if node.op_type != operator or node.domain:
        return 0, []
    axis = _attributes(node).get("axis", 0)
    assert isinstance(axis, int)
    sizes = [shapes[name][axis] for name in names if shapes.get(name)]
    known = [size for size in sizes if size is not None]
    return axis, known if len(known) == len(names) else []


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
        return _constant(graph, f"{node.output[0]}.{name}", values)

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
