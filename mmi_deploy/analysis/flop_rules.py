"""FLOP rules: one per operator; an operator without a rule is an error.

A rule gives three counts for one node at concrete sizes: *matrix* FLOPs (products on tensor cores:
a multiply-add is 2), *vector* FLOPs (everything else: an addition, multiplication, comparison,
exponential, root or division is 1), and elements of each input that it reads, for operators that
read a part of it. Views (Reshape) cost nothing.

Letters: b batch, k keys, q queries, n encoded images, m image slots, s feature cells, l levels,
h heads, p points, d channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

from mmi_deploy.analysis.shapes import Step
from mmi_deploy.errors import BundleError
from mmi_deploy.spec.graphs import MMFS_DOMAIN, MMFS_OPERATOR

MMFS = f"{MMFS_DOMAIN}.{MMFS_OPERATOR}"


@dataclass(frozen=True)
class Work:
    """Work of one node. matrix, vector: FLOPs. touched: input index -> distinct elements read, for
    inputs read in part. written: elements of all outputs that are written, None for all."""

    matrix: int = 0
    vector: int = 0
    touched: Mapping[int, int] = field(default_factory=dict)
    written: int | None = None


Rule = Callable[[Step], Work]

# Operators that only change the shape.
VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Constant", "Size"}

# Operator -> index of the input whose buffer is its output.
IN_PLACE = {"TensorScatter": 0}


def work(step: Step) -> Work:
    """Work of `step`. Raises `BundleError` for an operator without a rule."""
    if step.operator in VIEWS:
        return Work(touched={index: 0 for index in range(len(step.inputs))}, written=0)
    rule = RULES.get(step.operator)
    if rule is None:
        raise BundleError(
            f"no FLOP rule for operator {step.operator} (node {step.node.name!r})",
            fix="add one to mmi_deploy/analysis/flop_rules.py",
        )
    return rule(step)


def _out(step: Step) -> int:
    return step.outputs[0].elements


def _per_output(count: int) -> Rule:
    """`count` vector FLOPs per element of the output."""
    return lambda step: Work(vector=count * _out(step))


def _per_input(count: int) -> Rule:
    return lambda step: Work(vector=count * step.input(0).elements)


def _copies(step: Step) -> Work:
    """Copy all inputs: no FLOPs."""
    return Work()


def _takes(step: Step) -> Work:
    """Copy a part of input 0: reads as many elements as it writes."""
    return Work(touched={0: sum(value.elements for value in step.outputs)})


def _among(step: Step) -> Work:
    """Elementwise minimum, maximum or sum of several inputs."""
    return Work(vector=(len(step.inputs) - 1) * _out(step))


def _mat_mul(step: Step) -> Work:
    return Work(matrix=2 * _out(step) * step.input(0).shape[-1])


def _gemm(step: Step) -> Work:
    inner = step.input(0).shape[0 if step.attribute("transA", 0) else 1]
    bias = _out(step) if len(step.inputs) > 2 else 0
    return Work(matrix=2 * _out(step) * inner, vector=bias)


def _conv(step: Step) -> Work:
    weight = step.input(1).shape  # [out, in / group, *kernel]
    bias = _out(step) if len(step.inputs) > 2 and step.inputs[2] is not None else 0
    return Work(matrix=2 * _out(step) * prod(weight[1:]), vector=bias)


def _conv_transpose(step: Step) -> Work:
    weight = step.input(1).shape  # [in, out / group, *kernel]
    bias = _out(step) if len(step.inputs) > 2 and step.inputs[2] is not None else 0
    return Work(matrix=2 * step.input(0).elements * prod(weight[1:]), vector=bias)


def _attention(step: Step) -> Work:
    """Q K^T, softmax and the product with V, over all k keys, masked ones included."""
    query, key, value = step.input(0), step.input(1), step.input(2)
    if len(query.shape) == 4:
        b, h, q, d = query.shape
        keys, out_width = key.shape[2], value.shape[3]
    else:  # [b, q, h * d]
        b, q, width = query.shape
        h = step.attribute("q_num_heads", 1)
        groups = step.attribute("kv_num_heads", h)
        d, out_width = width // h, value.shape[2] // groups
        keys = key.shape[1]
    scores = b * h * q * keys
    masked = len(step.inputs) > 3 and step.inputs[3] is not None
    return Work(matrix=2 * scores * (d + out_width), vector=(_SOFTMAX + 1 + masked) * scores)


def _mat_mul_n_bits(step: Step) -> Work:
    """ONNX Runtime's product with a block-quantised weight: dequantise (2 per weight) and
    multiply."""
    inner, columns = step.attribute("K", 0), step.attribute("N", 0)
    return Work(matrix=2 * _out(step) * inner, vector=2 * inner * columns)


def _rotary(step: Step) -> Work:
    return Work(vector=3 * _out(step))


def _grid_sample(step: Step) -> Work:
    """Per location 2 products, 2 sums, 2 floors, 4 differences, 4 corner weights; per channel 4
    multiply-adds."""
    b, channels, *cells = step.outputs[0].shape
    locations = b * prod(cells)
    return Work(
        vector=locations * (14 + 8 * channels),
        touched={0: 4 * locations * channels},
    )


def _resize(step: Step) -> Work:
    mode = step.attributes.get("mode", b"nearest")
    taps = {b"nearest": 0, b"linear": 4, b"cubic": 16}[mode if isinstance(mode, bytes) else b""]
    return Work(vector=2 * taps * _out(step))


def _max_pool(step: Step) -> Work:
    return Work(vector=prod(step.ints("kernel_shape")) * _out(step))


def _scatter(step: Step) -> Work:
    """In-place TensorScatter: the new rows are read and written, the rest of the cache is not."""
    update = step.input(1).elements
    return Work(touched={0: 0}, written=update)


def _mmfs(step: Step) -> Work:
    """MMFS by its definition (docs/mmfs_kernel.md), with all m images counted as visible.

    Per (b, q, m, h, p): the offset plus its table row, over the base grid, plus the reference, x
    and y (6). Per (b, q, m, h, l, p): the logit plus its table row and its share of the softmax
    (6); the pixel (4), its floor and remainders (6), the four corner weights (4) and their product
    with the softmax weight (4); then 4 multiply-adds for each of d channels. At the end d divisions
    per (b, q, h), and with a null slot d multiply-adds more.

    A cell that several samples read is fetched once at best, and rows of a batch may share their
    images, as both branches of guidance do. So the elements read are the corners of all samples or
    all cells of m images, whichever is less.
    """
    value, offsets, logits = step.input(0), step.input(2), step.input(3)
    n, cells, h, d = value.shape  # [n, s, h, d]
    b, q, _, levels, points = logits.shape  # [b, q, h, l, p]
    images = step.input(1).shape[1]
    per_image = b * q * images * h * points
    samples = per_image * levels
    end = d * (3 if step.attribute("null_slot", 0) else 1)
    vector = 6 * per_image + samples * (_SOFTMAX + 1 + 18 + 8 * d) + b * q * h * end
    pool = min(n, images) * cells * h * d
    assert offsets.elements == b * q * h * points * 2
    return Work(vector=vector, touched={0: min(4 * samples * d, pool)})


# Per element: maximum, difference, exponential, sum, division.
_SOFTMAX = 5

# Per element: mean, difference, square, mean, product with 1 / deviation, scale, shift.
_LAYER_NORM = 7

# Per element: square, mean, product with 1 / root, scale.
_RMS_NORM = 4

# Vector FLOPs per element of the output.
_ELEMENTWISE = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Relu", "Sqrt", "Exp", "Abs"), 1),
    **dict.fromkeys(("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"), 1),
    **dict.fromkeys(("And", "Or", "Not", "Where", "Cos", "Sin", "Floor", "Round"), 1),
    **dict.fromkeys(("Clip", "Reciprocal", "Erf", "Tanh", "Mod"), 2),
    "Sigmoid": 4,  # negate, exponential, add, divide
    "Swish": 5,
    "QuickGelu": 6,
    "Gelu": 5,  # x / sqrt 2, erf, + 1, * x, / 2
    "Softmax": _SOFTMAX,
    "LayerNormalization": _LAYER_NORM,
    "GroupNormalization": _LAYER_NORM,
    "InstanceNormalization": _LAYER_NORM,
    "RMSNormalization": _RMS_NORM,
    "QuantizeLinear": 4,  # divide, round, shift, clip
    "DequantizeLinear": 2,  # shift, scale
}

# Operator -> rule. Operators of other domains than ONNX's have the domain as a prefix.
RULES: dict[str, Rule] = {
    **{name: _per_output(count) for name, count in _ELEMENTWISE.items()},
    **{name: _per_input(1) for name in ("ReduceSum", "ReduceMax", "ReduceMean", "ReduceMin")},
    **{name: _among for name in ("Max", "Min", "Sum")},
    **{name: _copies for name in ("Cast", "CastLike", "Concat", "Transpose", "Expand", "Pad")},
    **{name: _copies for name in ("Range", "ConstantOfShape", "DepthToSpace", "SpaceToDepth")},
    **{name: _takes for name in ("Slice", "Split", "Gather", "GatherND", "GatherElements")},
    "MatMul": _mat_mul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
    "GridSample": _grid_sample,
    "Resize": _resize,
    "MaxPool": _max_pool,
    "TensorScatter": _scatter,
    MMFS: _mmfs,
    "com.microsoft.MatMulNBits": _mat_mul_n_bits,
}
