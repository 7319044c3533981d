"""Model-local ONNX function of `mmi::MultiImageDeformableAttention` version 1: standard operators.

Every exported file that uses the operator contains this function, so any ONNX runtime can run it;
a registered kernel or plugin of that name replaces it. The computation is Eq. (4) of the paper over
a pool of encoded images:

    location = reference + (offsets + offset_table[r]) / base_grid         the same on every level
    pixel    = location * (width, height) - 0.5                            bilinear, zero outside
    weight   = softmax over visible (m, l, p) of logits + logit_table[r]   r = image_position
    output   = sum of weight * value[image_slot] at pixel

with one more logit of 0 and value `null_value` where `null_slot` is 1. Without the null slot, a
query without a visible image gives 0. A slot or a position outside the pool or the tables counts as
hidden.

With few points, the function gathers their four corners from the pool. With many, it copies the
images and uses GridSample, which takes a quarter of the memory per point.

Letters: b batch, q queries, m image slots, l levels, h heads, p points, d channels per head,
n encoded images, s feature cells, r table rows. An axis of 1 is for broadcasting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.tape import Tape

from mmi_deploy.spec.graphs import MMFS_DOMAIN, MMFS_OPERATOR, OPSET
from mmi_deploy.spec.mmfs_operator import INPUT_SHAPES

INPUTS = tuple(INPUT_SHAPES)
ATTRIBUTES = {
    "level_heights": ir.AttributeType.INTS,
    "level_widths": ir.AttributeType.INTS,
    "base_grid": ir.AttributeType.FLOAT,
    "null_slot": ir.AttributeType.INT,
}

# Points times channels up to which corners are gathered, at 16 bytes each. About here GridSample
# becomes as fast, although it copies and transposes the images.
MAX_GATHERED = 2**24

# Logit of the slot that takes the weight of a query without a visible image: below every real
# logit, above the -inf of a hidden image, so that the softmax is never NaN.
_UNSEEN = -3.0e38


class _Operators:
    """ONNX graph builder: `op.Add(a, 1.0)` records a node and returns its output; numbers become
    constants."""

    def __init__(self, name: str) -> None:
        self._name, self._tape = name, Tape()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._tape.nodes

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        def record(*inputs: object, **attributes: Any) -> ir.Value:
            return self._record(op_type, [self._value(value) for value in inputs], attributes, 1)[0]

        return record

    def attribute(self, name: str, field: str) -> ir.Value:
        """The function's own attribute `name` as a tensor."""
        reference = ir.RefAttr(field, name, ATTRIBUTES[name])
        return self._record("Constant", [], {field: reference}, 1)[0]

    def shape(self, *sides: object) -> ir.Value:
        """A shape as a 1-D tensor; each side is an int or a 1-D tensor."""
        return self.Concat(*([side] if isinstance(side, int) else side for side in sides), axis=0)

    def split(
        self, value: ir.Value, axis: int, parts: int, sizes: ir.Value | None = None
    ) -> Sequence[ir.Value]:
        """Split along `axis` into `parts` pieces, of equal size by default."""
        if sizes is None:
            return self._record("Split", [value], {"axis": axis, "num_outputs": parts}, parts)
        return self._record("Split", [value, sizes], {"axis": axis}, parts)

    def _value(self, value: object) -> ir.Value:
        if isinstance(value, ir.Value):
            return value
        numbers = value if isinstance(value, list) else [value]
        kind = "float" if isinstance(numbers[0], float) else "int"
        field = f"value_{kind}s" if isinstance(value, list) else f"value_{kind}"
        return self._record("Constant", [], {field: value}, 1)[0]

    def _record(
        self, op_type: str, inputs: Sequence[ir.Value], attributes: dict[str, Any], count: int
    ) -> Sequence[ir.Value]:
        first = len(self._tape.nodes)
        names = [f"{self._name}.{first}.{op_type}.{index}" for index in range(count)]
        outputs = [ir.Value(name=name) for name in names]
        return self._tape.op_multi_out(op_type, inputs, attributes, outputs=outputs)


@dataclass(frozen=True)
class _Points:
    """Locations and softmax weights of every sampling point, and sizes.

    Sizes come from the attributes and from `null_value`, whose shape is static in every file, so
    that runtimes fold them into constants at load time.
    """

    reference: ir.Value  # [2, 1, q|1, 1, 1, 1] in [0, 1], x first
    moved: ir.Value  # [2, b, q, h, m, p] offset from `reference`, in cells of the base grid
    base_grid: ir.Value  # cells of the base grid along a side
    weight: ir.Value  # [b, q, h, m, l, p]
    value: ir.Value  # [n, s, h, d]
    slot: ir.Value  # [b, m], clamped to the pool
    heights: ir.Value  # [l]
    widths: ir.Value  # [l]
    cells: ir.Value  # [l]
    heads: ir.Value  # [1] = h
    head_width: ir.Value  # [1] = d
    queries: ir.Value  # [1] = q
    levels: int


@cache
def mmfs_function(levels: int, most_gathered: int = MAX_GATHERED) -> onnx.FunctionProto:
    """The FunctionProto for graphs whose MMFS layers read `levels` levels."""
    inputs = {name: ir.Value(name=name) for name in INPUTS}
    op = _Operators("body")
    points, unseen = _points(op, inputs, levels)
    seen = op.If(
        op.LessOrEqual(op.Mul(op.Size(points.weight), points.head_width), most_gathered),
        then_branch=_branch("gather", _gather, points),
        else_branch=_branch("sample", _grid_sample, points),
    )
    null_slot = op.Cast(op.attribute("null_slot", "value_int"), to=ir.DataType.FLOAT)
    total = op.Add(seen, op.Mul(unseen, op.Mul(null_slot, inputs["null_value"])))  # [b, q, h, d]
    output = op.CastLike(op.Reshape(total, op.shape(0, 0, -1)), inputs["logits"])  # [b, q, h*d]
    output.name = "output"
    opsets = {"": OPSET}
    graph = ir.Graph(
        [*inputs.values()], [output], nodes=op.nodes, opset_imports=opsets, name="body"
    )
    attributes = [ir.Attr(name, kind, None) for name, kind in ATTRIBUTES.items()]
    return ir.to_proto(ir.Function(MMFS_DOMAIN, MMFS_OPERATOR, graph=graph, attributes=attributes))


def _branch(
    name: str, sample: Callable[[_Operators, _Points], ir.Value], points: _Points
) -> ir.Graph:
    op = _Operators(name)
    output = sample(op, points)
    return ir.Graph([], [output], nodes=op.nodes, name=name)


def _points(op: _Operators, inputs: dict[str, ir.Value], levels: int) -> tuple[_Points, ir.Value]:
    """Locations and weights of every point, and the weight of the null slot, [b, q, h, 1]."""
    value, logits = inputs["value"], inputs["logits"]
    row, in_table = _within(op, inputs["image_position"], inputs["offset_table"])  # [b, q|1, m]
    slot, in_pool = _within(op, inputs["image_slot"], value)  # [b, m]
    visible = op.And(op.And(in_table, op.Greater(row, 0)), op.Unsqueeze(in_pool, [1]))

    moved = op.Transpose(op.Cast(inputs["offsets"], to=ir.DataType.FLOAT), perm=[4, 0, 1, 2, 3])
    rows = op.Transpose(op.Gather(inputs["offset_table"], row), perm=[5, 0, 1, 3, 2, 4])
    moved = op.Add(op.Unsqueeze(moved, [4]), rows)  # [2, b, q, h, m, p], x first
    reference = op.Unsqueeze(op.Transpose(inputs["reference"], perm=[1, 0]), [1, 3, 4, 5])

    # Subtract the maximum first: far from 0, adding the table's small numbers would round them off.
    scores = op.Cast(logits, to=ir.DataType.FLOAT)
    zero = op.ReduceMax(scores, [3, 4])  # [b, q, h, 1, 1]
    scores = op.Unsqueeze(op.Sub(scores, zero), [3])  # [b, q, h, 1, l, p]
    rows = op.Transpose(op.Gather(inputs["logit_table"], row), perm=[0, 1, 3, 2, 4, 5])
    scores = op.Where(op.Unsqueeze(visible, [2, 4, 5]), op.Add(scores, rows), float("-inf"))
    null_slot = op.Cast(op.attribute("null_slot", "value_int"), to=ir.DataType.BOOL)
    flat = op.Reshape(scores, op.shape(0, 0, 0, -1))  # [b, q, h, m*l*p]
    null_score = op.Where(null_slot, op.Neg(op.Squeeze(zero, [4])), _UNSEEN)  # [b, q, h, 1]
    null_score = op.Expand(null_score, op.shape(op.Shape(logits, start=0, end=3), 1))
    weights = op.Softmax(op.Concat(flat, null_score, axis=-1), axis=-1)
    cut = op.shape(0, 0, 0, -1, op.Shape(inputs["logit_table"], start=2, end=4))
    weight = op.Reshape(op.Slice(weights, [0], [-1], [-1]), cut)  # [b, q, h, m, l, p]
    unseen = op.Slice(weights, [-1], [2**62], [-1])  # [b, q, h, 1]
    heights, widths = (
        op.attribute(f"level_{side}", "value_ints") for side in ("heights", "widths")
    )
    points = _Points(
        reference=reference,
        moved=moved,
        base_grid=op.attribute("base_grid", "value_float"),
        weight=weight,
        value=value,
        slot=slot,
        heights=heights,
        widths=widths,
        cells=op.Mul(heights, widths),
        heads=op.Shape(inputs["null_value"], start=0, end=1),
        head_width=op.Shape(inputs["null_value"], start=1, end=2),
        queries=op.Shape(logits, start=1, end=2),
        levels=levels,
    )
    return points, unseen


def _within(op: _Operators, index: ir.Value, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """`index` clamped to the rows of `rows`, and whether it was inside."""
    given = op.Cast(index, to=ir.DataType.INT64)
    inside = op.Min(op.Max(given, 0), op.Sub(op.Shape(rows, start=0, end=1), 1))
    return inside, op.Equal(inside, given)


def _gather(op: _Operators, points: _Points) -> ir.Value:
    """Weighted sum over the four corners of every point, gathered as rows: [b, q, h, d].

    The axes of coordinates and corners come first, so that every operation runs over long rows of
    points.
    """
    start = op.CumSum(points.cells, 0, exclusive=1)
    start, width = op.Unsqueeze(start, [1]), op.Unsqueeze(points.widths, [1])  # [l, 1]
    sides = op.Concat(op.Unsqueeze(points.widths, [0]), op.Unsqueeze(points.heights, [0]), axis=0)
    sides = op.Cast(sides, to=ir.DataType.FLOAT)
    sides = op.Unsqueeze(sides, [1, 2, 3, 4, 6])  # [2, 1, 1, 1, 1, l, 1]

    # Whole cells and fractions are added separately: on a large level, a float's last bit is too
    # coarse a fraction of a cell.
    start_cell = op.Sub(op.Mul(op.Unsqueeze(points.reference, [5]), sides), 0.5)
    first_cell = op.Floor(start_cell)  # [2, 1, q|1, 1, 1, l, 1]
    moved = op.Mul(op.Unsqueeze(points.moved, [5]), op.Div(sides, points.base_grid))
    cells = op.Floor(moved)  # [2, b, q, h, m, l, p]
    part = op.Add(op.Sub(moved, cells), op.Sub(start_cell, first_cell))
    on = op.Floor(part)
    far = op.Unsqueeze(op.Sub(part, on), [1])  # [2, 1, b, q, h, m, l, p]
    low = op.Unsqueeze(op.Add(op.Add(cells, on), first_cell), [1])
    corner = op.Concat(low, op.Add(low, 1.0), axis=1)  # [2 axes, 2 sides, b, q, h, m, l, p]
    share = op.Concat(op.Sub(1.0, far), far, axis=1)
    inside = op.Min(op.Max(corner, 0.0), op.Unsqueeze(op.Sub(sides, 1.0), [1]))
    share = op.Where(op.Equal(inside, corner), share, 0.0)

    share_x, share_y = op.split(share, 0, 2)  # [1, 2, ...] each
    x, y = op.split(op.Cast(inside, to=ir.DataType.INT64), 0, 2)
    swap = [1, 0, 2, 3, 4, 5, 6, 7]
    weight = op.Mul(op.Mul(op.Transpose(share_y, perm=swap), points.weight), share_x)
    image = op.Mul(points.slot, op.ReduceSum(points.cells))  # first cell of each
    first = op.Add(op.Unsqueeze(image, [1, 2, 4, 5]), start)  # [b, 1, 1, m, l, 1]
    line = op.Add(op.Mul(op.Transpose(y, perm=swap), width), first)  # [2, 1, b, q, h, m, l, p]
    head = op.Unsqueeze(op.Range(0, op.Squeeze(points.heads), 1), [1, 2, 3])  # [h, 1, 1, 1]
    row = op.Add(op.Mul(op.Add(line, x), points.heads), head)  # [2, 2, b, q, h, m, l, p]

    table = op.Reshape(points.value, op.shape(-1, points.head_width))
    row = op.Reshape(row, op.shape(0, 0, 0, 0, 0, -1))  # [2, 2, b, q, h, m*l*p]
    rows = op.Cast(op.Gather(table, row), to=ir.DataType.FLOAT)  # ... of [n*s*h, d], a view
    weight = op.Reshape(weight, op.shape(0, 0, 0, 0, 0, 1, -1))
    return op.ReduceSum(op.MatMul(weight, rows), [0, 1, 5], keepdims=0)


def _grid_sample(op: _Operators, points: _Points) -> ir.Value:
    """Weighted sum with GridSample on every level of the images: [b, q, h, d]."""
    pictures = op.Gather(points.value, points.slot, axis=0)  # [b, m, s, h, d]
    pictures = op.Cast(pictures, to=ir.DataType.FLOAT)
    maps = op.Transpose(pictures, perm=[0, 3, 1, 4, 2])  # [b, h, m, d, s]
    batch, width_d = op.Shape(maps, start=0, end=3), points.head_width
    count = op.ReduceProd(batch)  # [1] = b*h*m
    location = op.Add(points.reference, op.Div(points.moved, points.base_grid))
    grid = op.Transpose(location, perm=[1, 3, 4, 2, 5, 0])  # [b, h, m, q, p, 2]
    grid = op.Sub(op.Mul(grid, 2.0), 1.0)
    grid = op.Reshape(grid, op.shape(count, points.queries, -1, 2))  # [b*h*m, q, p, 2]
    weights = op.split(
        op.Transpose(points.weight, perm=[4, 0, 2, 3, 1, 5]), 0, points.levels
    )  # [1, b, h, m, q, p]
    levels = op.split(maps, -1, points.levels, points.cells)
    heights = op.split(points.heights, 0, points.levels)
    widths = op.split(points.widths, 0, points.levels)
    total: ir.Value | None = None
    for level, weight, height, width in zip(levels, weights, heights, widths, strict=True):
        image = op.Reshape(level, op.shape(count, width_d, height, width))
        # [b*h*m, d, height, width] at [b*h*m, q, p, 2]: [b*h*m, d, q, p]
        found = op.GridSample(image, grid, mode="linear", padding_mode="zeros", align_corners=0)
        share = op.Mul(found, op.Reshape(weight, op.shape(count, 1, points.queries, -1)))
        part = op.ReduceSum(share, [-1], keepdims=0)  # [b*h*m, d, q]
        total = part if total is None else op.Add(total, part)
    seen = op.ReduceSum(
        op.Reshape(total, op.shape(batch, width_d, points.queries)), [2], keepdims=0
    )  # [b, h, d, q]
    return op.Transpose(seen, perm=[0, 3, 1, 2])
