"""Bytes of the values of a portable graph in a target, by recipe.

The recipes of `mmi_deploy.targets.precision` as arithmetic: nothing is rewritten. For a graph that
has been rewritten already, `as_in_file` counts the file's own types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import TensorProto

from mmi_deploy.analysis.flop_rules import MMFS
from mmi_deploy.analysis.shapes import SizedGraph, Value
from mmi_deploy.spec.graphs import Graph
from mmi_deploy.spec.mmfs_operator import FLOAT32_INPUTS
from mmi_deploy.targets.precision.recipes import BITS, FLOAT32, Recipe, Scheme, quantised_bytes
from mmi_deploy.targets.precision.weight_only import scheme_on

# Types that a recipe may change.
_FLOATS = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}

_PRODUCTS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class Storage:
    """Storage of the values of one graph. activations: their type, None for the file's. compute:
    type of matrix products. weights: name -> bytes, scales of quantised weights included. kept:
    inputs and outputs that keep the file's type in every recipe."""

    name: str
    activations: str | None
    compute: str
    weights: Mapping[str, int]
    kept: frozenset[str]

    def bytes(self, value: Value) -> int:
        """Bytes of `value` in the target's memory."""
        if value.name in self.weights:
            return self.weights[value.name]
        if self.activations is None or value.type not in _FLOATS or value.name in self.kept:
            return value.bytes
        return value.elements * BITS[self.activations] // 8


def as_in_file(graph: SizedGraph) -> Storage:
    """Storage in the file's own types. compute: the type of the first matrix product."""
    products = (step for step in graph.steps if step.operator in _PRODUCTS)
    types = (_FLOATS.get(step.outputs[0].type) for step in products)
    return Storage("as exported", None, next(filter(None, types), FLOAT32), {}, frozenset())


def storage_of(graph: SizedGraph, contract: Graph, recipe: Recipe, runtime: str) -> Storage:
    """Storage of `graph` with `recipe` on `runtime`. Raises `ConfigError` where it is refused."""
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
    graph: SizedGraph, recipe: Recipe, runtime: str
) -> dict[str, tuple[tuple[int, int], Scheme]]:
    """Quantised weights: name -> shape [in, out] in the product, and scheme."""
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


def multiplied(graph: SizedGraph) -> dict[str, tuple[int, int]]:
    """Two-dimensional weights of matrix products -> [in, out], also behind Cast and Transpose."""
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


def _always_float32(graph: SizedGraph) -> set[str]:
    """Weights that MMFS reads in float32 in every recipe: tables, reference points, null value."""
    return {
        value.name
        for step in graph.steps
        if step.operator == MMFS
        for value in (step.inputs[index] for index in FLOAT32_INPUTS)
        if value is not None and value.constant
    }
