"""Assign a float type to every node of a graph, and insert the casts between them.

Every node on floats computes either in the type of activations or in float32; all of its inputs
have that type, as strongly typed builders require. These nodes compute in float32:

* nodes between a float32 input or output of the contract and the first or last operator with
  weights, a norm or attention: the sampler's update, the time table, scaled pixels, the bias of the
  logits;
* operators that the recipe names, and the sampling locations of GridSample up to their product;
* nodes that write or read a tensor that the range check found (`ranges.py`);
* nodes without weights between two of these.

Attention may have a type of its own in place of float32, for those that the range check found.

Norms compute their statistics in float32 by ONNX's rule (`stash_type`), attention its softmax.
Tables and null value of MMFS are float32 by the definition of the operator.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from mmi_deploy.errors import BundleError
from mmi_deploy.spec.graphs import MMFS_OPERATOR
from mmi_deploy.spec.mmfs_operator import FLOAT32_INPUTS
from mmi_deploy.targets.precision.constants import FLOATS, Constants

F32 = ir.DataType.FLOAT

# Operators with weights -> least number of dimensions of a constant that counts as a weight.
_PRODUCTS = {"MatMul": 2, "Gemm": 2, "Conv": 2, "ConvTranspose": 2, "Einsum": 2}

# Operators that reset the type: their inputs need not have the type of their outputs.
_BARRIERS = {
    "Attention",
    "LayerNormalization",
    "RMSNormalization",
    "GroupNormalization",
    MMFS_OPERATOR,
}

# Operator -> inputs that are float32 whatever type the node computes in.
_ALWAYS_FLOAT32 = {
    MMFS_OPERATOR: set(FLOAT32_INPUTS),
    "Resize": {1, 2},  # roi and scales
}

# Operator -> input with sampling locations: rounding them moves the samples.
_COORDINATES = {"GridSample": 1}

# Operators with float inputs of any type and no float output.
_ANY = {"Shape", "Size", "IsNaN", "IsInf"}


class NodeTypes:
    """The type that each node of `graph` computes in: float32 or `activations`."""

    def __init__(
        self,
        graph: ir.Graph,
        constants: Constants,
        activations: ir.DataType,
        fp32_operators: Collection[str],
        fp32_outputs: Collection[str] = (),
        low_inputs: Collection[str] = (),
        wide_attention: ir.DataType = F32,
    ) -> None:
        """fp32_outputs: names of values whose nodes stay in float32. low_inputs: inputs of the
        graph that have the lower type. wide_attention: type of an Attention that does not compute
        in the lower type."""
        self._graph, self._constants, self._low = graph, constants, activations
        self._low_inputs = set(low_inputs)
        self._wide_attention = wide_attention
        self._islands = self._fixed_islands(fp32_operators, fp32_outputs)
        self._types: dict[ir.Node, ir.DataType | None] = {}
        for node in graph:
            if any(
                attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()
            ):
                raise BundleError(
                    f"{graph.name} holds a {node.op_type} with a subgraph, which has no rule for "
                    "its precision",
                    fix="export it again with `mmi export`",
                )
            self._types[node] = self._first_type(node)
        for node in reversed(list(graph)):
            if self._types[node] is None:
                self._types[node] = self._readers_type(node)

    def of(self, node: ir.Node) -> ir.DataType:
        """Type that `node` computes in."""
        found = self._types[node]
        assert found is not None
        return found

    def typed_inputs(self, node: ir.Node) -> list[tuple[int, ir.Value, ir.DataType]]:
        """(position, value, required type) of every float input of `node`."""
        if node.op_type in _ANY or node.op_type == "Cast":
            return []
        fixed = _ALWAYS_FLOAT32.get(node.op_type, set())
        return [
            (position, value, F32 if position in fixed else self.of(node))
            for position, value in enumerate(node.inputs)
            if value is not None and value.dtype in FLOATS
        ]

    def _fixed_islands(self, operators: Collection[str], outputs: Collection[str]) -> set[ir.Node]:
        islands = {
            node
            for node in self._graph
            if node.op_type in operators or any(value.name in outputs for value in node.outputs)
        }
        behind = [
            node.inputs[_COORDINATES[node.op_type]]
            for node in self._graph
            if node.op_type in _COORDINATES
        ]
        behind += [
            value
            for value in self._graph.outputs
            if value.dtype in FLOATS and value.name not in self._low_inputs
        ]
        while behind:
            value = behind.pop()
            node = value.producer() if value is not None else None
            if node is None or node in islands or self._resets_type(node):
                continue
            islands.add(node)
            behind.extend(
                value for value in node.inputs if value is not None and value.dtype in FLOATS
            )
        return islands

    def _resets_type(self, node: ir.Node) -> bool:
        return node.op_type in _BARRIERS or self._has_weights(node)

    def _has_weights(self, node: ir.Node) -> bool:
        least = _PRODUCTS.get(node.op_type)
        return least is not None and any(
            value is not None and self.is_constant(value) and len(value.shape or ()) >= least
            for value in node.inputs
        )

    def is_constant(self, value: ir.Value) -> bool:
        """Return True if `value` is a constant, also behind Transpose, Reshape or Identity."""
        if value in self._constants:
            return True
        node = value.producer()
        return (
            node is not None
            and node.op_type in {"Transpose", "Reshape", "Identity"}
            and node.inputs[0] is not None
            and self.is_constant(node.inputs[0])
        )

    def _first_type(self, node: ir.Node) -> ir.DataType | None:
        """Type by the inputs of `node`. None where the readers decide: no input has a float type
        yet, only constants and integers."""
        if node in self._islands:
            return self._wide_attention if node.op_type == "Attention" else F32
        found = {
            self._type_of(value)
            for value in node.inputs
            if value is not None and value.dtype in FLOATS
        }
        if found & {self._low, self._wide_attention} - {F32} or self._resets_type(node):
            return self._low
        return F32 if F32 in found or (node.op_type == "Cast" and not found) else None

    def _type_of(self, value: ir.Value) -> ir.DataType | None:
        if value in self._constants:
            return None
        node = value.producer()
        if node is None:
            return self._low if value.name in self._low_inputs else F32
        return self._types[node]

    def _readers_type(self, node: ir.Node) -> ir.DataType:
        """Type by the readers: the lower one if any reader has it, so that large tables are stored
        in it."""
        for value in node.outputs:
            if value.is_graph_output() and value.name in self._low_inputs:
                return self._low
            for reader, _ in value.uses():
                if self._types[reader] == self._low:
                    return self._low
        return F32


def insert_casts(graph: ir.Graph, constants: Constants, typed: NodeTypes) -> None:
    """Cast the inputs of every node to its type."""
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    nodes = list(graph)
    before: dict[ir.Value, ir.DataType] = {}
    for node in nodes:
        for value in node.outputs:
            if value.dtype in FLOATS and value not in constants:
                before[value] = typed.of(node)
    for value, dtype in before.items():
        value.type = ir.TensorType(dtype)
    for node in nodes:
        if node.op_type == "ConstantOfShape" and node.outputs[0].dtype in FLOATS:
            _retype_fill(node, typed.of(node))
        if node.op_type == "Cast" and node.outputs[0] in before:
            _retype_cast(node, typed.of(node))
        for position, value, wanted in typed.typed_inputs(node):
            if value in constants:
                node.replace_input_with(position, constants.as_type(value, wanted))
            elif value.dtype != wanted:
                node.replace_input_with(position, cast(graph, value, wanted, casts))


def cast(
    graph: ir.Graph,
    value: ir.Value,
    wanted: ir.DataType,
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
) -> ir.Value:
    """Cast `value` to another type; all readers share one Cast, right behind `value`."""
    key = (value, wanted)
    if key not in casts:
        output = ir.Value(
            name=f"{value.name}.{wanted.name.lower()}",
            type=ir.TensorType(wanted),
            shape=value.shape,
        )
        node = ir.node(
            "Cast", [value], {"to": wanted}, outputs=[output], name=f"{output.name}.cast"
        )
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], node)
        else:
            graph.insert_after(producer, node)
        casts[key] = output
    return casts[key]


def _retype_fill(node: ir.Node, dtype: ir.DataType) -> None:
    fill = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else None
    number = 0.0 if fill is None else float(fill.reshape(-1)[0])
    node.attributes["value"] = ir.AttrTensor("value", ir.tensor([number], dtype=dtype))


def _retype_cast(node: ir.Node, dtype: ir.DataType) -> None:
    """Retarget the Cast of a 16-bit constant; drop it where its readers compute in 16 bits."""
    value, output = node.inputs[0], node.outputs[0]
    assert value is not None
    if value.dtype == dtype and not output.is_graph_output():
        output.replace_all_uses_with(value)
        return
    node.attributes["to"] = ir.AttrInt64("to", dtype)
