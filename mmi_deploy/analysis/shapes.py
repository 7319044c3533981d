"""Shape inference: the shape of every value of an ONNX graph at given input sizes.

One walk in the order of the file. ONNX's own inference gives the output shapes of a node from the
types of its inputs and from shape arithmetic, which is evaluated on the way (a dozen integers at a
time). Weights are not read: external data is never opened.

Model-local functions are not expanded: operators of other domains have a rule here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, TypeProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import InferenceError, infer_node_outputs

from mmi_deploy.errors import BundleError
from mmi_deploy.spec.graphs import MMFS_DOMAIN, MMFS_OPERATOR, Graph

# Origin of a value.
INPUT, WEIGHT, NODE = "input", "weight", "node"

_BITS = {
    TensorProto.BOOL: 8,
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.FLOAT8E4M3FNUZ: 8,
    TensorProto.FLOAT8E5M2: 8,
    TensorProto.FLOAT8E5M2FNUZ: 8,
    TensorProto.FLOAT8E8M0: 8,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.INT32: 32,
    TensorProto.FLOAT: 32,
    TensorProto.INT64: 64,
    TensorProto.DOUBLE: 64,
}

# Most elements of an array that is evaluated: shapes, axes, scales of a Resize.
_MAX_FOLDED = 1024

# ONNX operators without a shape rule (function bodies); output 0 has the shape of input 0.
_SHAPE_OF_INPUT = {"GroupNormalization", "Gelu", "Swish"}


@dataclass(frozen=True)
class Value:
    """A tensor of the graph. constant: depends on weights alone, not on sizes. data: its elements,
    if they are few and follow from weights and sizes."""

    name: str
    type: int
    shape: tuple[int, ...]
    origin: str
    constant: bool = False
    data: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bits(self) -> int:
        """Bits of one element in the file's type."""
        return _BITS[self.type]

    @property
    def bytes(self) -> int:
        """Bytes in the file's type; 4-bit elements are packed."""
        return -(-self.elements * self.bits // 8)


@dataclass(frozen=True)
class Step:
    """One node with its sized inputs (None for an omitted optional input) and outputs."""

    node: NodeProto
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]

    @property
    def operator(self) -> str:
        """`MatMul`, or with its domain: `mmi.MultiImageDeformableAttention`."""
        return f"{self.node.domain}.{self.node.op_type}" if self.node.domain else self.node.op_type

    @cached_property
    def attributes(self) -> Mapping[str, object]:
        return {
            attribute.name: onnx.helper.get_attribute_value(attribute)
            for attribute in self.node.attribute
            if attribute.type != AttributeProto.GRAPH
        }

    def attribute(self, name: str, default: int) -> int:
        found = self.attributes.get(name, default)
        assert isinstance(found, int), f"{self.node.name}.{name} is {found!r}"
        return found

    def ints(self, name: str) -> tuple[int, ...]:
        """List attribute, empty if absent."""
        found = self.attributes.get(name, ())
        assert isinstance(found, list | tuple)
        return tuple(found)

    def input(self, index: int) -> Value:
        """Required input."""
        value = self.inputs[index]
        assert value is not None, f"{self.operator} {self.node.name} lacks input {index}"
        return value


@dataclass(frozen=True)
class SizedGraph:
    """A graph at one choice of sizes."""

    name: str
    inputs: tuple[Value, ...]
    weights: tuple[Value, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Value, ...]


def read_graph(path: Path) -> ModelProto:
    """Read an ONNX file without its external weights. Raises `BundleError`."""
    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path}: {error}", fix="export it again") from None
    except Exception as error:  # protobuf's DecodeError is a ValueError in some versions only
        raise BundleError(f"{path} is not an ONNX file: {error}", fix="export it again") from None


def sized(model: ModelProto, graph: Graph, sizes: Mapping[str, int]) -> SizedGraph:
    """Infer the shape of every value of `model` at `sizes` of the dynamic dimensions.

    graph: the contract of `model`. Raises `BundleError` that names a node whose output shape cannot
    be inferred.
    """
    walk = _ShapeWalk(model)
    expected = {tensor.name: tensor for tensor in graph.inputs}
    weights = {tensor.name for tensor in model.graph.initializer}
    for described in model.graph.input:
        if described.name in weights:
            continue
        if described.name not in expected:
            raise BundleError(
                f"{graph.name} has an unexpected input {described.name}",
                fix="write the bundle again with `mmi export`",
            )
        shape = expected[described.name].resolve(**sizes)
        walk.add(described.name, described.type.tensor_type.elem_type, shape, INPUT)
    steps = tuple(walk.step(node) for node in model.graph.node)
    known = walk.values
    return SizedGraph(
        graph.name,
        tuple(value for value in known.values() if value.origin == INPUT),
        tuple(value for value in known.values() if value.origin == WEIGHT),
        steps,
        tuple(known[output.name] for output in model.graph.output),
    )


class _ShapeWalk:
    def __init__(self, model: ModelProto) -> None:
        self.values: dict[str, Value] = {}
        self.opsets = list(model.opset_import)
        self.versions = {opset.domain: opset.version for opset in model.opset_import}
        self.ir_version = model.ir_version
        self.types: dict[str, TypeProto] = {}
        self.known: dict[str, TensorProto] = {}
        for weight in model.graph.initializer:
            external = weight.data_location == TensorProto.EXTERNAL
            small = not external and prod(weight.dims) <= _MAX_FOLDED
            data = numpy_helper.to_array(weight) if small else None
            self.add(weight.name, weight.data_type, tuple(weight.dims), WEIGHT, data, True)

    def add(
        self,
        name: str,
        type_: int,
        shape: tuple[int, ...],
        origin: str,
        data: np.ndarray | None = None,
        constant: bool = False,
    ) -> Value:
        value = Value(name, type_, shape, origin, constant, data)
        self.values[name] = value
        self.types[name] = onnx.helper.make_tensor_type_proto(type_, shape)
        if data is not None:
            self.known[name] = numpy_helper.from_array(data, name)
        return value

    def step(self, node: NodeProto) -> Step:
        inputs = tuple(self.values[name] if name else None for name in node.input)
        given = [value for value in inputs if value is not None]
        constant = node.op_type != "Shape" and all(value.constant for value in given)
        outputs = self._evaluated(node, given, constant)
        if outputs is None:
            outputs = [
                self.add(name, type_, shape, NODE, None, constant)
                for name, (type_, shape) in self._inferred(node, inputs).items()
            ]
        return Step(node, inputs, tuple(outputs))

    def _evaluated(self, node: NodeProto, given: list[Value], constant: bool) -> list[Value] | None:
        """Evaluate shape arithmetic. Returns None for any other node."""
        if node.op_type == "Shape" and not node.domain:
            shape = given[0].shape
            start, end = (
                next((a.i for a in node.attribute if a.name == name), default)
                for name, default in (("start", 0), ("end", len(shape)))
            )
            data = [np.array(shape[start:end], np.int64)]
        elif node.domain or any(value.data is None for value in given):
            return None
        elif node.op_type in ("ConstantOfShape", "Expand", "Range"):
            return None  # not shape arithmetic, and their results may be large
        else:
            feeds = {value.name: value.data for value in given}
            data = ReferenceEvaluator(node).run(None, feeds)
            if any(array.size > _MAX_FOLDED for array in data):
                return None
        return [
            self.add(
                name,
                onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
                array.shape,
                NODE,
                array,
                constant,
            )
            for name, array in zip(node.output, map(np.asarray, data), strict=True)
        ]

    def _inferred(
        self, node: NodeProto, inputs: tuple[Value | None, ...]
    ) -> dict[str, tuple[int, tuple[int, ...]]]:
        rule = CUSTOM_SHAPES.get((node.domain, node.op_type))
        if rule is not None:
            found = rule(node, inputs)
            return {name: out for name, out in zip(node.output, found, strict=False) if name}
        if node.op_type in _SHAPE_OF_INPUT and not node.domain and inputs[0] is not None:
            return {node.output[0]: (inputs[0].type, inputs[0].shape)}
        names = [name for name in node.input if name]
        try:
            schema = onnx.defs.get_schema(
                node.op_type, self.versions.get(node.domain, 1), node.domain
            )
            types = infer_node_outputs(
                schema,
                node,
                {name: self.types[name] for name in names},
                {name: self.known[name] for name in names if name in self.known},
                opset_imports=self.opsets,
                ir_version=self.ir_version,
            )
        except onnx.defs.SchemaError:
            raise _unknown(node, "no rule for the shape of its outputs") from None
        except InferenceError as error:
            raise _unknown(node, str(error).strip()) from None
        return {name: _concrete(node, types[name]) for name in node.output if name}


def _concrete(node: NodeProto, found: TypeProto) -> tuple[int, tuple[int, ...]]:
    tensor = found.tensor_type
    if not tensor.HasField("shape") or any(
        not dim.HasField("dim_value") for dim in tensor.shape.dim
    ):
        raise _unknown(node, "the shape of its output depends on data")
    return tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim)


def _unknown(node: NodeProto, why: str) -> BundleError:
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return BundleError(f"cannot size {operator} {node.name!r}: {why}")


Shapes = list[tuple[int, tuple[int, ...]]]


def _mmfs(node: NodeProto, inputs: tuple[Value | None, ...]) -> Shapes:
    """value [n, s, h, d], ..., logits [b, q, h, l, p] -> [b, q, h * d]"""
    value, logits = inputs[0], inputs[3]
    assert value is not None and logits is not None
    return [(value.type, (*logits.shape[:2], value.shape[2] * value.shape[3]))]


def _mat_mul_n_bits(node: NodeProto, inputs: tuple[Value | None, ...]) -> Shapes:
    """x [..., K] -> [..., N]"""
    columns = next(attribute.i for attribute in node.attribute if attribute.name == "N")
    assert inputs[0] is not None
    return [(inputs[0].type, (*inputs[0].shape[:-1], columns))]


# (domain, operator) -> element type and shape of each output, for operators of other domains.
CUSTOM_SHAPES: dict[tuple[str, str], Callable[[NodeProto, tuple[Value | None, ...]], Shapes]] = {
    (MMFS_DOMAIN, MMFS_OPERATOR): _mmfs,
    ("com.microsoft", "MatMulNBits"): _mat_mul_n_bits,
}
