"""Fold the rounding error of TensorRT's attention scale into the query projections.

The exported Attention has no `scale`, so that TensorRT's importer computes its default from the
head width by Sqrt, Reciprocal and Sqrt, in the type of the activations, and multiplies queries and
keys by the result. Each step rounds: for 128 channels the product is 0.287 % too small in bfloat16
and 0.04 % too large in float16, the same in every layer. A `scale` of its own does not help, as its
root is rounded too; and queries scaled beforehand, with `scale` 1, make TensorRT-RTX 1.7.1 copy the
whole KV cache in every layer and token. So the weights of the query projection are multiplied by
exact over rounded scale, before they are rounded to the target's type.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmi_deploy.targets.precision.constants import NUMPY, Constants, read
from mmi_deploy.targets.precision.types import F32, NodeTypes

# Markers of the columns of a projection, in the shape of a value.
_Columns = NDArray[np.int64]


def rounded_scale(width: int, dtype: ir.DataType) -> float:
    """Scale of the logits that TensorRT computes for heads of `width` channels in `dtype`."""
    kind = NUMPY[dtype]

    def rounded(number: float) -> float:
        return float(np.asarray(number, kind).astype(np.float64))

    root = rounded(math.sqrt(rounded(width)))
    per_side = rounded(math.sqrt(rounded(1 / root)))
    return per_side * per_side


def fold_scales(graph: ir.Graph, constants: Constants, typed: NodeTypes) -> list[str]:
    """Fold the error of every 16-bit Attention of `graph` into what makes its queries: the weight
    of a norm of their own, or their projection.

    typed: the type that each node will compute in. Returns the names of attentions whose queries
    come from neither; they keep the error.
    """
    left = []
    for node in list(graph):
        if node.op_type != "Attention" or "scale" in node.attributes or typed.of(node) == F32:
            continue
        query = node.inputs[0]
        assert query is not None and query.shape is not None
        width = int(query.shape[-1])
        factor = width**-0.5 / rounded_scale(width, typed.of(node))
        if factor == 1 or _scale_norm(query, constants, factor):
            continue
        if not _scale_projection(query, constants, factor):
            left.append(str(node.name))
    return left


def _scale_norm(query: ir.Value, constants: Constants, factor: float) -> bool:
    """Multiply the weight of the norm that makes `query`, and nothing else, by `factor`. Changes
    nothing and returns False where there is none: what is behind a norm cannot scale it."""
    value = query
    while True:
        node = value.producer()
        if node is None or _used_elsewhere(value):
            return False
        if node.op_type == "RMSNormalization" and node.inputs[1] in constants:
            replace_constant(node, 1, constants, np.asarray(factor, np.float32))
            return True
        if node.op_type not in _WHOLE or node.inputs[0] is None:
            return False
        value = node.inputs[0]


@dataclass(frozen=True)
class ProjectedColumns:
    """A value that is made of columns of one product. weight, bias: (node, input) that reads the
    constant; columns: those of the value's channels, in order; width: all columns of the product;
    mixed: channels of one head are mixed on the way."""

    weight: tuple[ir.Node, int]
    bias: tuple[ir.Node, int] | None
    columns: _Columns
    width: int
    mixed: bool


def product_columns(value: ir.Value, constants: Constants) -> ProjectedColumns | None:
    """The product that makes `value` through nodes that only move numbers; None where there is
    none, or another node reads something on the way."""
    path = _path(value, constants)
    if path is None:
        return None
    product, bias, after = path
    columns = _columns(product.outputs[0], after)
    weight = weight_of(product, constants)
    if columns is None or weight is None:
        return None
    place = None
    if bias is not None:
        place = bias, next(i for i, of in enumerate(bias.inputs) if of in constants)
    width = int(product.outputs[0].shape[-1])
    mixed = any(node.op_type == "RotaryEmbedding" for node, _ in after)
    return ProjectedColumns(weight, place, columns.reshape(-1), width, mixed)


def _scale_projection(query: ir.Value, constants: Constants, factor: float) -> bool:
    """Multiply what makes `query` by `factor`: columns of the weight, and of the bias, of one
    product. Changes nothing and returns False where they serve something else too."""
    found = product_columns(query, constants)
    if found is None:
        return False
    factors = np.ones(found.width, np.float32)
    factors[np.unique(found.columns)] = factor
    node, place = found.weight
    by = factors[:, None] if node.op_type == "Transpose" else factors
    replace_constant(node, place, constants, by)
    if found.bias is not None:
        replace_constant(*found.bias, constants, factors)
    return True


def _path(
    query: ir.Value, constants: Constants
) -> tuple[ir.Node, ir.Node | None, list[tuple[ir.Node, int]]] | None:
    """The MatMul behind `query`, the Add of its bias, and the nodes between them and `query`, with
    the output that is followed; None where another node reads something on the way."""
    after: list[tuple[ir.Node, int]] = []
    bias, value = None, query
    while True:
        node = value.producer()
        if node is None or _used_elsewhere(value):
            return None
        if node.op_type == "MatMul":
            weighted = node.inputs[1] is not None and weight_of(node, constants) is not None
            return (node, bias, after[::-1]) if weighted else None
        if node.op_type == "Add" and bias is None:
            constant = [v for v in node.inputs if v in constants]
            if len(constant) != 1:
                return None
            bias = node
            value = next(v for v in node.inputs if v not in constants)
            continue
        if node.op_type not in _FOLLOWED or node.inputs[0] is None:
            return None
        after.append((node, list(node.outputs).index(value)))
        value = node.inputs[0]


def _used_elsewhere(value: ir.Value) -> bool:
    readers = [reader for reader, _ in value.uses() if reader.op_type != "Shape"]
    return len(readers) != 1 or value.is_graph_output()


def _columns(start: ir.Value, after: list[tuple[ir.Node, int]]) -> _Columns | None:
    """Columns of the product `start` that arrive at the end of `after`: numbers are sent through
    the nodes. None for shapes that do not say it."""
    if start.shape is None:
        return None
    shape = _ones(start)
    found: _Columns | None = np.broadcast_to(np.arange(shape[-1]), shape)
    for node, index in after:
        assert found is not None
        found = _FOLLOWED[node.op_type](found, node, index)
        if found is None:
            return None
    return found


def _ones(value: ir.Value) -> tuple[int, ...]:
    """Shape with a 1 for each dynamic dimension."""
    return tuple(side if isinstance(side, int) else 1 for side in value.shape or ())


def _reshaped(found: _Columns, node: ir.Node, index: int) -> _Columns | None:
    if node.outputs[0].shape is None:
        return None
    shape = _ones(node.outputs[0])
    return found.reshape(shape) if math.prod(shape) == found.size else None


def _transposed(found: _Columns, node: ir.Node, index: int) -> _Columns | None:
    return found.transpose(node.attributes.get_ints("perm", tuple(range(found.ndim))[::-1]))


def _split(found: _Columns, node: ir.Node, index: int) -> _Columns | None:
    axis = node.attributes.get_int("axis", 0)
    sides = [output.shape and output.shape[axis] for output in node.outputs]
    if not all(isinstance(side, int) for side in sides):
        return None
    ends: list[Any] = np.cumsum(sides).tolist()
    return np.split(found, ends[:-1], axis)[index]


def _unchanged(found: _Columns, node: ir.Node, index: int) -> _Columns | None:
    # RotaryEmbedding mixes channels of one head, and whole heads are queries.
    return found


# Operators that keep all channels of their first input.
_WHOLE = ("Reshape", "Transpose", "RotaryEmbedding")

_FOLLOWED: dict[str, Callable[[_Columns, ir.Node, int], _Columns | None]] = {
    "Reshape": _reshaped,
    "Transpose": _transposed,
    "Split": _split,
    "RotaryEmbedding": _unchanged,
    "Expand": _unchanged,
}


def weight_of(product: ir.Node, constants: Constants) -> tuple[ir.Node, int] | None:
    """The node that reads the constant weight of `product`, and at which input: the product, or a
    Transpose before it."""
    value = product.inputs[1]
    assert value is not None
    if value in constants:
        return product, 1
    node = value.producer()
    alone = node is not None and node.op_type == "Transpose" and not _used_elsewhere(value)
    return (node, 0) if node is not None and alone and node.inputs[0] in constants else None


def replace_constant(
    node: ir.Node, place: int, constants: Constants, factors: NDArray[np.float32]
) -> None:
    """Read at input `place` of `node` its constant times `factors`, in float32."""
    value = node.inputs[place]
    assert value is not None
    tensor, name = constants.tensor(value), f"{constants.name(value)}.scaled"
    scaled = constants.add(
        name, F32, tensor.shape, lambda: read(tensor).astype(np.float32) * factors
    )
    node.replace_input_with(place, scaled)
