"""How many bytes a target spends on what a portable graph holds: the recipes of
`mmi_deploy.build.precision`, as arithmetic.

Nothing is rewritten here. For a graph that a recipe has been applied to already, `AS_IN_FILE`
counts the file's own types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import TensorProto

from mmi_deploy.build.precision.recipes import FLOAT32, INT4, Recipe, Scheme
from mmi_deploy.build.shapes import Sized, Value
from mmi_deploy.graphs import Graph

BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "float8_e4m3fn": 8, INT4: 4}

_FLOATS = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
"""The types that a recipe may change."""

MATRIX_PRODUCTS = ("MatMul", "Gemm")
"""Operators whose weights a recipe may quantise."""


@dataclass(frozen=True)
class Storage:
    """Bytes of the values of one graph. activations: the type of activations, None for the file's.
    schemes: weight name -> how it is quantised. compute: the type in which products are taken.
    kept: inputs and outputs that stay in the file's type whatever the recipe."""

    name: str
    activations: str | None
    compute: str
    schemes: Mapping[str, Scheme]
    kept: frozenset[str]

    def bytes(self, value: Value) -> int:
        """Of a value in the target's memory, scales of quantised weights included."""
        if self.activations is None or value.type not in _FLOATS or value.name in self.kept:
            return value.bytes
        scheme = self.schemes.get(value.name)
        wide = BITS[self.activations]
        if scheme is None:
            return value.elements * wide // 8
        return quantised_bytes(value.shape, scheme, wide)


def quantised_bytes(shape: tuple[int, ...], scheme: Scheme, scale_bits: int) -> int:
    """A weight [in, out] with a scale for every block of rows (0: all rows) of every column. The
    schemes are symmetric: there are no zero points."""
    rows, columns = shape[0], shape[-1]
    blocks = -(-rows // scheme.block) if scheme.block else 1
    packed = -(-rows * columns * BITS[scheme.dtype] // 8)
    return packed + blocks * columns * scale_bits // 8


def as_in_file(graph: Sized) -> Storage:
    """The types that the file itself has; products are taken in the type of the first of them."""
    products = (step for step in graph.steps if step.operator in (*MATRIX_PRODUCTS, "Conv"))
    types = (_FLOATS.get(step.outputs[0].type) for step in products)
    return Storage("as exported", None, next(filter(None, types), FLOAT32), {}, frozenset())


def storage_of(graph: Sized, contract: Graph, recipe: Recipe, runtime: str) -> Storage:
    """What `recipe` makes of `graph` on `runtime`; raises `ConfigError` where it makes nothing."""
    activations = recipe.activations_on(runtime)
    wanted = recipe.weights.get(graph.name)
    schemes = {}
    if wanted is not None:
        for weight in matrix_weights(graph):
            scheme = wanted.of(weight.name, weight.elements)
            if scheme is not None:
                schemes[weight.name] = scheme
    kept = frozenset(
        tensor.name for tensor in (*contract.inputs, *contract.outputs) if not tensor.activation
    )
    return Storage(recipe.name, activations, activations, schemes, kept)


def matrix_weights(graph: Sized) -> list[Value]:
    """Two-dimensional weights that some product multiplies by, through casts and transposes too."""
    source = {value.name: value for value in graph.weights}
    found: dict[str, Value] = {}
    for step in graph.steps:
        if step.operator in ("Cast", "Transpose") and step.input(0).name in source:
            source[step.outputs[0].name] = source[step.input(0).name]
        elif step.operator in MATRIX_PRODUCTS:
            weight = source.get(step.input(1).name)
            if weight is not None and len(weight.shape) == 2:
                found[weight.name] = weight
    return list(found.values())
