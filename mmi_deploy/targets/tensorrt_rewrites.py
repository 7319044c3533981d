"""ONNX rewrites that work around TensorRT's limits.

One function per limit. Each rewrite is exact and changes only TensorRT's own copy of a graph.
Weights are copied, never computed.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmi_deploy.errors import BundleError

BFLOAT16 = TensorProto.BFLOAT16

# Suffix of the file with concatenated weights.
SIBLINGS = ".siblings"

# Smaller weights are not merged.
MIN_SIBLING_BYTES = 2**20

_CHUNK_BYTES = 2**24


def rewrite_for_tensorrt(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Copy `model` and apply all rewrites. path: the ONNX file of `model`; weights are written
    beside it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for rewrite in REWRITES:
        rewrite(copy, path)
    return copy


def deconvolution_in_float32(model: onnx.ModelProto, path: Path) -> None:
    """Compute bfloat16 ConvTranspose in float32, between casts.

    TensorRT-RTX 1.7 supports ConvTranspose in float16 and float32 only ("Could not infer output
    types for operation: deconv").
    """
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


def grid_sample_by_gathers(model: onnx.ModelProto, path: Path) -> None:
    """Replace bilinear GridSample by a gather of the four corners.

    TensorRT up to 11.1 reads the mode `linear`, its name from opset 20 on, as nearest, and misreads
    strongly typed nodes. Locations and weights are float32, whatever the types of the node. Raises
    `BundleError` for a bilinear node whose sizes are not known, or whose padding mode is not
    `zeros`.
    """
    if not any(_is_bilinear(node) for node in model.graph.node):
        return
    shapes, types = _shapes_and_types(model)
    nodes: list[onnx.NodeProto] = []
    stored: dict[str, TensorProto] = {}
    for node in model.graph.node:
        new = _four_corners(node, shapes, types, stored) if _is_bilinear(node) else [node]
        nodes += [onnx.NodeProto.FromString(one.SerializeToString()) for one in new]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(stored.values())


def _is_bilinear(node: onnx.NodeProto) -> bool:
    mode = {a.name: helper.get_attribute_value(a) for a in node.attribute}.get("mode", b"linear")
    return node.op_type == "GridSample" and not node.domain and mode in (b"linear", b"bilinear")


def _four_corners(
    node: onnx.NodeProto,
    shapes: Mapping[str, Sequence[int | None]],
    types: Mapping[str, int],
    stored: dict[str, TensorProto],
) -> list[onnx.NodeProto]:
    """Image [b, c, height, width] and grid [b, rows, columns, 2], as x and y from -1 to 1, to
    [b, c, rows, columns]. In shape comments `points` is rows * columns."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    (image, grid), (result,) = node.input, node.output
    _, channels, height, width = [*shapes.get(image, ()), *[None] * 4][:4]
    rows, columns = [*shapes.get(grid, ()), *[None] * 4][1:3]
    if (
        given.get("padding_mode", b"zeros") != b"zeros"
        or (channels is None or height is None or width is None)
        or (rows is None and columns is None)
    ):
        raise BundleError(
            f"GridSample {node.name} cannot be computed by gathers, and TensorRT misreads it",
            expected="padding mode zeros, and a known number of channels, height, width and points",
            got=f"{given.get('padding_mode', b'zeros').decode()}, image {shapes.get(image)}, "
            f"grid {shapes.get(grid)}",
        )
    # -1 and 1 are the centres of the outermost cells, or their outer edges.
    aligned = given.get("align_corners", 0)
    sides = np.array([width, height], np.float32)
    half = (sides - 1) / 2 if aligned else sides / 2
    last, corners = sides - 1, np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32)
    nodes: list[onnx.NodeProto] = []

    def constant(value: np.ndarray) -> str:
        name = f"{result}.constant.{len(stored)}"
        stored[name] = numpy_helper.from_array(value, name)
        return name

    def op(kind: str, *inputs: str, out: str = "", **attributes: int | list[int]) -> str:
        name = out or f"{result}.{len(nodes)}.{kind}"
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def integers(*values: int) -> str:
        return constant(np.array(values, np.int64))

    def in_float32(value: str, of: str) -> str:
        known = types.get(of) == TensorProto.FLOAT
        return value if known else op("Cast", value, to=TensorProto.FLOAT)

    scaled = op("Mul", in_float32(grid, grid), constant(half))
    at = op(
        "Unsqueeze", op("Add", scaled, constant(last / 2)), integers(3)
    )  # [b, rows, columns, 1, 2]
    low = op("Floor", at)
    share = op("Abs", op("Sub", constant(1 - corners), op("Sub", at, low)))
    cell = op("Add", low, constant(corners))  # [b, rows, columns, 4, 2]
    nearest = op("Min", op("Max", cell, constant(np.zeros(2, np.float32))), constant(last))
    inside = op("Cast", op("Equal", cell, nearest), to=TensorProto.FLOAT)
    axis = integers(-1)
    weight = op("ReduceProd", op("Mul", share, inside), axis, keepdims=0)  # [b, rows, columns, 4]
    stride = constant(np.array([1, width], np.float32))
    number = op("ReduceSum", op("Mul", nearest, stride), axis, keepdims=0)
    column = integers(0, -1, 1)
    index = op("Reshape", op("Cast", number, to=TensorProto.INT64), column)  # [b, points * 4, 1]
    flat = op("Reshape", image, integers(0, channels, height * width))
    cells = op("Transpose", flat, perm=[0, 2, 1])  # [b, height * width, c]
    found = in_float32(op("GatherND", cells, index, batch_dims=1), image)  # [b, points * 4, c]
    weighted = op("Mul", found, op("Reshape", weight, column))
    apart = op("Reshape", weighted, integers(0, -1, 4, channels))
    samples = op("Transpose", op("ReduceSum", apart, integers(2), keepdims=0), perm=[0, 2, 1])
    if types.get(image) != TensorProto.FLOAT:
        samples = op("CastLike", samples, image)
    places = (rows or -1, columns or -1)
    op("Reshape", samples, integers(0, channels, *places), out=result)
    return nodes


@dataclass(frozen=True)
class _Product:
    """A MatMul whose weight is an initialiser [out, in] behind a Transpose."""

    node: onnx.NodeProto
    transpose: onnx.NodeProto
    weight: TensorProto


def merge_sibling_products(model: onnx.ModelProto, path: Path) -> None:
    """Merge products of one tensor with large weights of one shape (query, key, value; gate, up).

    The weights are concatenated; the results are slices of the merged product. TensorRT fuses such
    products itself, but then holds their weights twice during the build: two thirds of a LLaMA. The
    results are gathered from an axis of their own, since TensorRT splits the product at a plain
    Split.
    """
    groups = _sibling_groups(model)
    ranks = _ranks(model) if groups else {}
    groups = [products for products in groups if products[0].node.input[0] in ranks]
    if not groups:
        return
    made: dict[int, list[onnx.NodeProto]] = {}
    dropped: set[int] = set()
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    with path.with_suffix(SIBLINGS).open("wb") as file:
        for products in groups:
            weights = [product.weight for product in products]
            merged = _concatenated(weights, path, file)
            made[id(products[0].node)] = _merged_product(products, merged.name, ranks)
            dropped |= {id(node) for one in products for node in (one.node, one.transpose)}
            for weight in weights:
                del stored[weight.name]
            stored[merged.name] = merged
            _index_constants(len(products), weights[0].dims[0], ranks[products[0].node.input[0]],
                             stored)  # fmt: skip
    nodes = [
        new
        for node in model.graph.node
        for new in made.get(id(node), [] if id(node) in dropped else [node])
    ]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    initialisers = list(stored.values())
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(initialisers)


def _sibling_groups(model: onnx.ModelProto) -> list[list[_Product]]:
    weights = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        and len(tensor.dims) == 2
        and _length(tensor) >= MIN_SIBLING_BYTES
    }
    uses = Counter(name for node in model.graph.node for name in node.input)
    transposes = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] in weights and uses[node.input[0]] == 1
    }
    groups: dict[tuple[object, ...], list[_Product]] = defaultdict(list)
    for node in model.graph.node:
        transpose = transposes.get(node.input[1]) if node.op_type == "MatMul" else None
        if transpose is None or uses[node.input[1]] != 1:
            continue
        weight = weights[transpose.input[0]]
        key = (node.input[0], tuple(weight.dims), weight.data_type)
        groups[key].append(_Product(node, transpose, weight))
    return [products for products in groups.values() if len(products) > 1]


def _merged_product(
    products: list[_Product], weight: str, ranks: dict[str, int]
) -> list[onnx.NodeProto]:
    source, rank = products[0].node.input[0], ranks[products[0].node.input[0]]
    out = products[0].weight.dims[0]
    turned, product, apart = (f"{weight}.{part}" for part in ("transposed", "product", "apart"))
    nodes = [
        helper.make_node("Transpose", [weight], [turned], name=turned, perm=[1, 0]),
        helper.make_node("MatMul", [source, turned], [product], name=product),
        helper.make_node("Reshape", [product, _shape_name(len(products), out, rank)], [apart],
                         name=apart),
    ]  # fmt: skip
    for index, one in enumerate(products):
        result, name = one.node.output[0], f"{apart}.{index}"
        inputs = [apart, f"siblings.index.{index}"]
        nodes.append(helper.make_node("Gather", inputs, [result], name=name, axis=rank - 1))
    return nodes


def _index_constants(count: int, out: int, rank: int, stored: dict[str, TensorProto]) -> None:
    """Add the small initialisers that `_merged_product` refers to."""
    name = _shape_name(count, out, rank)
    shape = np.array(
        [0] * (rank - 1) + [count, out], np.int64
    )  # Reshape copies a dimension given as 0
    stored[name] = numpy_helper.from_array(shape, name)
    for index in range(count):
        name = f"siblings.index.{index}"
        stored[name] = numpy_helper.from_array(np.array(index, np.int64), name)


def _shape_name(count: int, out: int, rank: int) -> str:
    return f"siblings.shape.{rank}.{count}.{out}"


def _concatenated(weights: list[TensorProto], path: Path, file: BinaryIO) -> TensorProto:
    """Concatenate the rows of `weights` into one initialiser, copying their bytes to `file` in
    chunks."""
    start = file.tell()
    for weight in weights:
        for piece in _file_chunks(weight, path.parent):
            file.write(piece)
    rows, columns = weights[0].dims
    merged = TensorProto(
        name=f"{weights[0].name}.siblings",
        data_type=weights[0].data_type,
        dims=[rows * len(weights), columns],
        data_location=TensorProto.EXTERNAL,
    )
    where = {"location": Path(file.name).name, "offset": start, "length": file.tell() - start}
    for key, value in where.items():
        merged.external_data.add(key=key, value=str(value))
    return merged


def _file_chunks(weight: TensorProto, folder: Path) -> Iterator[bytes]:
    where = {entry.key: entry.value for entry in weight.external_data}
    left = _length(weight)
    with (folder / where["location"]).open("rb") as file:
        file.seek(int(where.get("offset", 0)))
        while left:
            piece = file.read(min(left, _CHUNK_BYTES))
            if not piece:
                raise BundleError(f"{folder / where['location']} is too short for {weight.name}")
            left -= len(piece)
            yield piece


def _length(weight: TensorProto) -> int:
    return math.prod(weight.dims) * helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in [*graph.input, *graph.value_info]
        if value.type.tensor_type.HasField("shape")
    }


def _shapes_and_types(
    model: onnx.ModelProto,
) -> tuple[dict[str, list[int | None]], dict[str, int]]:
    """Shape (None for a dynamic dimension) and element type of every value, as far as inferred."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes: dict[str, list[int | None]] = {t.name: list(t.dims) for t in graph.initializer}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        tensor = value.type.tensor_type
        types[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            dims = tensor.shape.dim
            shapes[value.name] = [d.dim_value if d.HasField("dim_value") else None for d in dims]
    return shapes, types


# All rewrites, in the order in which they are applied.
REWRITES: tuple[Callable[[onnx.ModelProto, Path], None], ...] = (
    deconvolution_in_float32,
    grid_sample_by_gathers,
    merge_sibling_products,
)


def _cast(source: str, out: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [out], name=f"{out}.cast", to=to)


def _bfloat16_values(model: onnx.ModelProto) -> set[str]:
    """Names of bfloat16 values, by shape inference; empty for a graph without ConvTranspose."""
    if not any(node.op_type == "ConvTranspose" for node in model.graph.node):
        return set()
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    return {value.name for value in values if value.type.tensor_type.elem_type == BFLOAT16} | {
        tensor.name for tensor in graph.initializer if tensor.data_type == BFLOAT16
    }
