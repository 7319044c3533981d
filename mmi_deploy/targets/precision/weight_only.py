"""Weight-only quantisation of matrix products, in the form that each runtime supports.

TensorRT fuses a DequantizeLinear in front of the product, with a scale per channel or per block of
rows. ONNX Runtime has one operator for both, MatMulNBits, on transposed weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir

from mmi_deploy.errors import BundleError
from mmi_deploy.spec.backends import BACKENDS
from mmi_deploy.targets.precision.constants import NUMPY, Array, Constants, check_finite, read
from mmi_deploy.targets.precision.quantise import Quantised, pack_blocks, quantise, scheme_for_rows
from mmi_deploy.targets.precision.recipes import BITS, FP8, INT4, INT8, Scheme, Weights

_STORED = {
    INT8: ir.DataType.INT8,
    INT4: ir.DataType.INT4,
    FP8: ir.DataType.FLOAT8E4M3FN,
}


# Block on the CPU for a scheme with one scale per channel: MatMulNBits supports blocks only.
CPU_BLOCK = 32

# On float32 activations MatMulNBits quantises them to int8 as well, block by block, and multiplies
# integers.
ACCURACY_LEVEL = 4

CPU_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Product:
    """A MatMul with a constant weight [rows, columns]. transposed: stored as [columns, rows]."""

    node: ir.Node
    name: str
    stored: ir.Value
    rows: int
    columns: int
    transposed: bool

    def weight(self, constants: Constants) -> Array:
        """Stored weight as [in, out]. Raises `WeightsError` if it is not finite."""
        values = read(constants.tensor(self.stored))
        check_finite(values, self.name)
        return values.T if self.transposed else values


def products(graph: ir.Graph, constants: Constants) -> list[Product]:
    """Every MatMul of an activation and a constant weight, in the order of the graph."""
    found = []
    for node in graph:
        value = node.inputs[1] if node.op_type == "MatMul" else None
        transposed = False
        if value is not None and value not in constants:
            transpose = value.producer()
            transposed = (
                transpose is not None
                and transpose.op_type == "Transpose"
                and transpose.attributes.get_ints("perm", (1, 0)) == (1, 0)
            )
            value = transpose.inputs[0] if transposed and transpose is not None else None
        if value is None or value not in constants or node.inputs[0] in constants:
            continue
        shape = constants.tensor(value).shape
        if len(shape) != 2:
            continue
        rows, columns = (int(side) for side in (reversed(shape) if transposed else shape))
        found.append(Product(node, constants.name(value), value, rows, columns, transposed))
    return found


def scheme_on(runtime: str, scheme: Scheme, rows: int) -> Scheme | None:
    """Scheme of a weight with `rows` rows on a backend, its block a divisor of `rows`. None where
    the backend supports blocks only and none fits."""
    blocks = BACKENDS[runtime].block_scales
    found = scheme_for_rows(
        Scheme(scheme.dtype, scheme.block or CPU_BLOCK) if blocks else scheme, rows
    )
    return None if blocks and not found.block else found


def quantise_products(
    graph: ir.Graph,
    constants: Constants,
    weights: Weights,
    runtime: str,
    importance: Mapping[ir.Node, Array] = MappingProxyType({}),
) -> None:
    """Quantise the weights of `graph` by their schemes. Raises `BundleError` if there are none.

    importance: mean squares [in] of the activations of products, as `quantise` takes them.
    """
    quantised = False
    latest = _LastQuantised(constants, importance)
    for product in products(graph, constants):
        scheme = weights.of(product.name, product.rows * product.columns)
        if scheme is None:
            continue
        scheme = scheme_on(runtime, scheme, product.rows)
        if scheme is None:
            continue
        store = _as_matmul_nbits if BACKENDS[runtime].block_scales else _behind_dequantise
        store(graph, constants, product, scheme, latest)
        quantised = True
    if not quantised:
        raise BundleError(
            f"{graph.name} has no matrix product to quantise",
            expected=f"weights of {weights.min_elements} elements or more",
            fix="choose --precision fp16, or fp32 on the CPU",
        )


def _behind_dequantise(
    graph: ir.Graph, constants: Constants, product: Product, scheme: Scheme, latest: _LastQuantised
) -> None:
    node = product.node
    output = node.inputs[1]
    assert output is not None
    dtype = output.dtype
    numbers = constants.make(
        product.stored,
        f"{product.name}.{scheme.dtype}",
        _STORED[scheme.dtype],
        (product.rows, product.columns),
        lambda: latest(product, scheme, dtype).numbers,
    )
    shape = (product.rows // scheme.block,) if scheme.block else ()
    scales = constants.make(
        product.stored,
        f"{product.name}.{scheme.dtype}.scales",
        dtype,
        (*shape, product.columns),
        lambda: latest(product, scheme, dtype).scales,
    )
    attributes = {"axis": 0, "block_size": scheme.block} if scheme.block else {"axis": 1}
    dequantised = ir.Value(
        name=f"{product.name}.dequantised",
        type=ir.TensorType(dtype),
        shape=ir.Shape([product.rows, product.columns]),
    )
    step = ir.node(
        "DequantizeLinear",
        [numbers, scales],
        attributes,
        outputs=[dequantised],
        name=f"{dequantised.name}.dequantise",
    )
    graph.insert_before(node, step)
    node.replace_input_with(1, dequantised)


def _as_matmul_nbits(
    graph: ir.Graph, constants: Constants, product: Product, scheme: Scheme, latest: _LastQuantised
) -> None:
    node, bits = product.node, BITS[scheme.dtype]
    activation = node.inputs[0]
    assert activation is not None and activation.dtype is not None
    dtype = activation.dtype  # of the scales too
    blocks = product.rows // scheme.block
    name = f"{product.name}.{scheme.dtype}"
    numbers = constants.make(
        product.stored,
        name,
        ir.DataType.UINT8,
        (product.columns, blocks, scheme.block * bits // 8),
        lambda: pack_blocks(latest(product, scheme, dtype), bits)[0],
    )
    scales = constants.make(
        product.stored,
        f"{name}.scales",
        dtype,
        (product.columns * blocks,),
        lambda: pack_blocks(latest(product, scheme, dtype), bits)[1],
    )
    old = node.outputs[0]
    step = ir.node(
        "MatMulNBits",
        [node.inputs[0], numbers, scales],
        {
            "K": product.rows,
            "N": product.columns,
            "bits": bits,
            "block_size": scheme.block,
            **({"accuracy_level": ACCURACY_LEVEL} if dtype == ir.DataType.FLOAT else {}),
        },
        domain=CPU_DOMAIN,
        name=f"{product.name}.product",
    )
    ir.convenience.replace_nodes_and_values(graph, node, [node], [step], [old], step.outputs)
    graph.opset_imports[CPU_DOMAIN] = 1


class _LastQuantised:
    """Cache of the weight that was quantised last. Its numbers and scales are written one after the
    other, so one entry is enough and memory stays bounded."""

    def __init__(self, constants: Constants, importance: Mapping[ir.Node, Array]) -> None:
        self._constants, self._importance = constants, importance
        self._of: Product | None = None
        self._found: Quantised | None = None

    def __call__(self, product: Product, scheme: Scheme, dtype: ir.DataType) -> Quantised:
        if self._found is None or self._of is not product:
            self._found = None
            weight, by = product.weight(self._constants), self._importance.get(product.node)
            self._found = quantise(weight, scheme, NUMPY[dtype], by)
            self._of = product
        return self._found
