"""How many bytes a target spends on what a portable graph holds: the recipes of
`mmi_deploy.targets.precision`, as arithmetic.

Nothing is rewritten here. For a graph that a recipe has been applied to already, `AS_IN_FILE`
counts the file's own types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import TensorProto

from mmi_deploy.analysis.flop_rules import MMFS
from mmi_deploy.analysis.shapes import Sized, Value
from mmi_deploy.spec.graphs import Graph
from mmi_deploy.spec.mmfs_operator import FLOAT32_INPUTS
from mmi_deploy.targets.precision.recipes import BITS, FLOAT32, Recipe, Scheme, quantised_bytes
from mmi_deploy.targets.precision.weight_only import scheme_on

# The types that a recipe may change.
_FLOATS = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}

_PRODUCTS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class Storage:
    """Bytes of the values of one graph. activations: the type of activations, None for the file's.
    compute: the type in which products are taken. weights: bytes of every weight by name, scales of
    quantised ones included. kept: inputs and outputs that stay in the file's type whatever the
    recipe."""

    name: str
    activations: str | None
    compute: str
    weights: Mapping[str, int]
    kept: frozenset[str]

    def bytes(self, value: Value) -> int:
        """Of a value in the target's memory."""
        if value.name in self.weights:
            return self.weights[value.name]
        if self.activations is None or value.type not in _FLOATS or value.name in self.kept:
            return value.bytes
        return value.elements * BITS[self.activations] // 8


def as_in_file(graph: Sized) -> Storage:
    """The types that the file itself has; products are taken in the type of the first of them."""
    products = (step for step in graph.steps if step.operator in _PRODUCTS)
    types = (_FLOATS.get(step.outputs[0].type) for step in products)
    return Storage("as exported", None, next(filter(None, types), FLOAT32), {}, frozenset())


def storage_of(graph: Sized, contract: Graph, recipe: Recipe, runtime: str) -> Storage:
    """What `recipe` makes of `graph` on `runtime`; raises `ConfigError` where it makes nothing."""
    activations = recipe.activations_on(runtime)
    schemes = _schemes(graph, recipe, runtime)
    single = _always_float32(graph)
    weights = {}
    for weight in graph.weights:
        wide = 32 if weight.name in single else BITS[activations]
        if weight.name in schemes:
            weights[weight.name] = quantised_bytes(*schemes[weight.name], wide)
        elif weight.type in _FLOATS:
            weights[weight.name] = weight.elements * wide // 8
        else:
            weights[weight.name] = weight.bytes
    kept = frozenset(
        tensor.name for tensor in (*contract.inputs, *contract.outputs) if not tensor.activation
    )
    return Storage(recipe.name, activations, activations, weights, kept)


def _schemes(
    graph: Sized, recipe: Recipe, runtime: str
) -> dict[str, tuple[tuple[int, int], Scheme]]:
    """Weight -> its shape [in, out] as it is multiplied, and how it is stored."""
    wanted = recipe.weights.get(graph.name)
    found: dict[str, tuple[tuple[int, int], Scheme]] = {}
    if wanted is None:
        return found
    for name, shape in multiplied(graph).items():
        scheme = wanted.of(name, shape[0] * shape[1])
        if scheme is None:
            continue
        scheme = scheme_on(runtime, scheme, shape[0])
        if scheme is not None:
            found[name] = (shape, scheme)
    return found


def multiplied(graph: Sized) -> dict[str, tuple[int, int]]:
    """Two-dimensional weights of matrix products -> [in, out], through casts and transposes too."""
    source = {value.name: value.name for value in graph.weights}
    found: dict[str, tuple[int, int]] = {}
    for step in graph.steps:
        if step.operator in ("Cast", "Transpose") and step.input(0).name in source:
            source[step.outputs[0].name] = source[step.input(0).name]
        elif step.operator == "MatMul" and step.input(1).name in source:
            shape = step.input(1).shape
            if len(shape) == 2 and not step.input(0).constant:
                found[source[step.input(1).name]] = (shape[0], shape[1])
    return found


def _always_float32(graph: Sized) -> set[str]:
    """Weights that the MMFS operator takes in float32 whatever its type: tables, places, null."""
    return {
        value.name
        for step in graph.steps
        if step.operator == MMFS
        for value in (step.inputs[index] for index in FLOAT32_INPUTS)
        if value is not None and value.constant
    }
