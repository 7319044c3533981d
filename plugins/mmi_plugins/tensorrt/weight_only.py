"""Weight-only products of TensorRT's copy of a graph as nodes of our plugin.

A product whose weight is behind a DequantizeLinear becomes one `mmi::WeightOnlyMatMul` with the
same numbers and scales in the plugin's order: nothing is computed, so the node is the product that
was compared with the portable graph. The packed weights go to a file beside the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmi_plugins.gemv.operator import DOMAIN, NAME, VERSION, attributes, unsupported_reason
from mmi_plugins.gemv.packing import pack_scales, pack_weight
from mmi_plugins.tensorrt.graph import PLUGIN_NAMESPACE

# Suffix of the file with packed weights.
PRODUCTS = ".products"

_FORMATS = {
    TensorProto.INT8: "int8",
    TensorProto.FLOAT8E4M3FN: "float8_e4m3fn",
    TensorProto.INT4: "int4",
}
_ACTIVATIONS = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

# Alignment of a weight in its file, for memory-mapped reads.
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Product:
    """A MatMul and the DequantizeLinear of its weight."""

    node: onnx.NodeProto
    dequantise: onnx.NodeProto
    numbers: TensorProto
    scales: TensorProto
    block: int

    @property
    def format(self) -> str:
        return _FORMATS[self.numbers.data_type]


def weight_only_products(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """A copy of `model`, the ONNX file at `path`, whose weight-only products are the plugin's.

    Those that no kernel takes (`unsupported_reason`) stay as they are, as do all nodes of a graph
    without any. Numbers are read, packed and written one weight at a time.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    found = {id(product.node): product for product in _products(copy)}
    if not found:
        return copy
    packed: dict[str, TensorProto] = {}
    with path.with_suffix(PRODUCTS).open("wb") as file:
        for product in found.values():
            if product.numbers.name not in packed:
                packed[product.numbers.name] = _packed_weight(product, path.parent, file)
            if product.scales.name not in packed:
                packed[product.scales.name] = _packed_scales(product, path.parent, file)
    nodes = [
        _plugin_node(found[id(node)], packed) if id(node) in found else node
        for node in copy.graph.node
    ]
    read = {name for node in nodes for name in node.input}
    read |= {output.name for output in copy.graph.output}
    kept = [
        onnx.NodeProto.FromString(node.SerializeToString())
        for node in nodes
        if node.op_type != "DequantizeLinear" or node.output[0] in read
    ]
    read = {name for node in kept for name in node.input}
    stored = [tensor for tensor in copy.graph.initializer if tensor.name in read]
    stored = [TensorProto.FromString(tensor.SerializeToString()) for tensor in stored]
    del copy.graph.node[:], copy.graph.initializer[:]
    copy.graph.node.extend(kept)
    copy.graph.initializer.extend([*stored, *packed.values()])
    if all(imported.domain != DOMAIN for imported in copy.opset_import):
        copy.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return copy


def _products(model: onnx.ModelProto) -> Iterator[_Product]:
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    dequantise = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        step = dequantise.get(node.input[1]) if node.op_type == "MatMul" else None
        if step is None or len(step.input) != 2:
            continue
        numbers, scales = (stored.get(name) for name in step.input)
        if numbers is None or scales is None or len(numbers.dims) != 2:
            continue
        given = {a.name: helper.get_attribute_value(a) for a in step.attribute}
        block, axis = int(given.get("block_size", 0)), int(given.get("axis", 1))
        inputs, outputs = numbers.dims
        fits = axis == (0 if block else 1) and len(scales.dims) == (2 if block else 1)
        if (
            fits
            and numbers.data_type in _FORMATS
            and scales.data_type in _ACTIVATIONS
            and unsupported_reason(_FORMATS[numbers.data_type], inputs, outputs, block) is None
        ):
            yield _Product(node, step, numbers, scales, block)


def _plugin_node(product: _Product, packed: dict[str, TensorProto]) -> onnx.NodeProto:
    inputs = [packed[tensor.name].name for tensor in (product.numbers, product.scales)]
    return helper.make_node(
        NAME,
        [product.node.input[0], *inputs],
        list(product.node.output),
        name=product.node.name,
        domain=DOMAIN,
        **{PLUGIN_NAMESPACE: DOMAIN},
        **attributes(product.format, product.numbers.dims[1], product.block),
    )


def _packed_weight(product: _Product, folder: Path, file: BinaryIO) -> TensorProto:
    numbers = numpy_helper.to_array(product.numbers, str(folder))
    if product.format == "int4":
        numbers = numbers.astype(np.int8)
    packed = pack_weight(product.format, numbers)
    return _written(f"{product.numbers.name}.packed", TensorProto.INT32, packed, file)


def _packed_scales(product: _Product, folder: Path, file: BinaryIO) -> TensorProto:
    scales = numpy_helper.to_array(product.scales, str(folder))
    packed = np.ascontiguousarray(pack_scales(scales, product.numbers.dims[0]))
    name = f"{product.scales.name}.packed"
    return _written(name, product.scales.data_type, packed, file)


def _written(name: str, dtype: int, array: np.ndarray, file: BinaryIO) -> TensorProto:
    """An initialiser whose bytes are appended to `file`."""
    file.write(bytes(-file.tell() % _ALIGNMENT))
    start = file.tell()
    file.write(array.tobytes())
    tensor = TensorProto(
        name=name, data_type=dtype, dims=array.shape, data_location=TensorProto.EXTERNAL
    )
    where = {"location": Path(file.name).name, "offset": start, "length": array.nbytes}
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
