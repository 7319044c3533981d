"""Matrix products whose weight is stored in few bits, as the target's runtime wants them.

TensorRT reads a DequantizeLinear in front of the product, with a scale per channel or per block of
rows; ONNX Runtime has one operator for both, MatMulNBits, on weights turned round.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from mmi_deploy.errors import BundleError
from mmi_deploy.spec.backends import BACKENDS
from mmi_deploy.targets.precision.constants import NUMPY, Array, Constants, check_finite, read
from mmi_deploy.targets.precision.quantise import Quantised, fitting, packed_blocks, quantise
from mmi_deploy.targets.precision.recipes import BITS, FP8, INT4, INT8, Scheme, Weights

_STORED = {
    INT8: ir.DataType.INT8,
    INT4: ir.DataType.INT4,
    FP8: ir.DataType.FLOAT8E4M3FN,
}


# Rows that share a scale on the CPU where the scheme has one for all: MatMulNBits knows blocks.
CPU_BLOCK = 32

# MatMulNBits rounds activations to int8 too, block by block, and multiplies integers.
ACCURACY_LEVEL = 4

CPU_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Product:
    """A MatMul with a weight: stored under `name` as [in, out], or turned round if `turned`."""

    node: ir.Node
    name: str
    stored: ir.Value
    rows: int
    columns: int
    turned: bool

    def weight(self, constants: Constants) -> Array:
        """The weight as it is stored, [in, out]; raises `WeightsError` if it is not finite."""
        values = read(constants.tensor(self.stored))
        check_finite(values, self.name)
        return values.T if self.turned else values


def products(graph: ir.Graph, constants: Constants) -> list[Product]:
    """Every matrix product of a running value and a constant weight, in order."""
    found = []
    for node in graph:
        value = node.inputs[1] if node.op_type == "MatMul" else None
        turned = False
        if value is not None and value not in constants:
            turn = value.producer()
            turned = (
                turn is not None
                and turn.op_type == "Transpose"
                and turn.attributes.get_ints("perm", (1, 0)) == (1, 0)
            )
            value = turn.inputs[0] if turned and turn is not None else None
        if value is None or value not in constants or node.inputs[0] in constants:
            continue
        shape = constants.tensor(value).shape
        if len(shape) != 2:
            continue
        rows, columns = (int(side) for side in (reversed(shape) if turned else shape))
        found.append(Product(node, constants.name(value), value, rows, columns, turned))
    return found


def scheme_on(runtime: str, scheme: Scheme, rows: int) -> Scheme | None:
    """The scheme of a weight with `rows` rows on a backend: with blocks that divide them. None
    where the backend knows blocks alone, and none fits."""
    blocks = BACKENDS[runtime].block_scales
    found = fitting(Scheme(scheme.dtype, scheme.block or CPU_BLOCK) if blocks else scheme, rows)
    return None if blocks and not found.block else found


def quantise_products(
    graph: ir.Graph, constants: Constants, weights: Weights, runtime: str
) -> None:
    """Store the weights of `graph` by their schemes. Raises `BundleError` when there is no product
    at all to quantise."""
    quantised = False
    latest = _Latest(constants)
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
            expected=f"weights of {weights.least} numbers or more",
            fix="choose --precision fp16, or fp32 on the CPU",
        )


def _behind_dequantise(
    graph: ir.Graph, constants: Constants, product: Product, scheme: Scheme, latest: _Latest
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
    restored = ir.Value(
        name=f"{product.name}.restored",
        type=ir.TensorType(dtype),
        shape=ir.Shape([product.rows, product.columns]),
    )
    step = ir.node(
        "DequantizeLinear",
        [numbers, scales],
        attributes,
        outputs=[restored],
        name=f"{restored.name}.dequantise",
    )
    graph.insert_before(node, step)
    node.replace_input_with(1, restored)


def _as_matmul_nbits(
    graph: ir.Graph, constants: Constants, product: Product, scheme: Scheme, latest: _Latest
) -> None:
    node, bits = product.node, BITS[scheme.dtype]
    blocks = product.rows // scheme.block
    name = f"{product.name}.{scheme.dtype}"
    numbers = constants.make(
        product.stored,
        name,
        ir.DataType.UINT8,
        (product.columns, blocks, scheme.block * bits // 8),
        lambda: packed_blocks(latest(product, scheme, ir.DataType.FLOAT), bits)[0],
    )
    scales = constants.make(
        product.stored,
        f"{name}.scales",
        ir.DataType.FLOAT,
        (product.columns * blocks,),
        lambda: packed_blocks(latest(product, scheme, ir.DataType.FLOAT), bits)[1],
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
            "accuracy_level": ACCURACY_LEVEL,
        },
        domain=CPU_DOMAIN,
        name=f"{product.name}.product",
    )
    ir.convenience.replace_nodes_and_values(graph, node, [node], [step], [old], step.outputs)
    graph.opset_imports[CPU_DOMAIN] = 1


class _Latest:
    """The weight that was quantised last: its numbers and scales are written one after the other,
    and nothing is kept for longer."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._of: Product | None = None
        self._found: Quantised | None = None

    def __call__(self, product: Product, scheme: Scheme, dtype: ir.DataType) -> Quantised:
        if self._found is None or self._of is not product:
            self._found = None
            self._found = quantise(product.weight(self._constants), scheme, NUMPY[dtype])
            self._of = product
        return self._found
