"""What TensorRT's compiler cannot do or does at a price, said in what it can: one named rewrite for
each, exact, and done on TensorRT's own copy of a graph alone. Weights are moved, never computed."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmi_deploy.errors import BundleError

BFLOAT16 = TensorProto.BFLOAT16

SIBLINGS = ".siblings"
"""Suffix of the file with weights that were put together."""

LARGE = 2**20
"""Bytes of a weight that is worth it."""

_CHUNK = 2**24


def rewritten(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """A copy of `model`, which is or will be the file `path`, after all rewrites. What they write
    lies beside it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for rewrite in REWRITES:
        rewrite(copy, path)
    return copy


def deconvolution_in_float32(model: onnx.ModelProto, path: Path) -> None:
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


@dataclass(frozen=True)
class _Product:
    """A MatMul whose weight is an initialiser [out, in] behind a Transpose."""

    node: onnx.NodeProto
    transpose: onnx.NodeProto
    weight: TensorProto


def siblings_in_one_product(model: onnx.ModelProto, path: Path) -> None:
    """Products of one tensor with large weights of one shape (query, key and value; gate and up)
    become one product with the weights one after another, and views of its result.

    TensorRT does so itself, but holds the weights once more for it while it builds: two thirds of a
    LLaMA. The results lie on an axis of their own, since it takes a plain Split apart again.
    """
    groups = _siblings(model)
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
            merged = _stacked(weights, path, file)
            made[id(products[0].node)] = _one_product(products, merged.name, ranks)
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


def _siblings(model: onnx.ModelProto) -> list[list[_Product]]:
    weights = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        and len(tensor.dims) == 2
        and _length(tensor) >= LARGE
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


def _one_product(
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
    """Small initialisers that `_one_product` names."""
    name = _shape_name(count, out, rank)
    shape = np.array([0] * (rank - 1) + [count, out], np.int64)  # 0: as it was
    stored[name] = numpy_helper.from_array(shape, name)
    for index in range(count):
        name = f"siblings.index.{index}"
        stored[name] = numpy_helper.from_array(np.array(index, np.int64), name)


def _shape_name(count: int, out: int, rank: int) -> str:
    return f"siblings.shape.{rank}.{count}.{out}"


def _stacked(weights: list[TensorProto], path: Path, file: BinaryIO) -> TensorProto:
    """One initialiser of all rows of `weights`; their bytes are copied into `file`, piece by
    piece."""
    start = file.tell()
    for weight in weights:
        for piece in _pieces(weight, path.parent):
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


def _pieces(weight: TensorProto, folder: Path) -> Iterator[bytes]:
    where = {entry.key: entry.value for entry in weight.external_data}
    left = _length(weight)
    with (folder / where["location"]).open("rb") as file:
        file.seek(int(where.get("offset", 0)))
        while left:
            piece = file.read(min(left, _CHUNK))
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


REWRITES: tuple[Callable[[onnx.ModelProto, Path], None], ...] = (
    deconvolution_in_float32,
    siblings_in_one_product,
)
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
