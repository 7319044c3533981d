"""Quantisation sensitivity: the error of a graph when one weight at a time is quantised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.errors import ConfigError
from mmi_deploy.parity import PRECISION_TOLERANCES, compare_outputs
from mmi_deploy.runtime.onnxruntime.run_graph import Run, model_runner
from mmi_deploy.spec.graphs import Graph
from mmi_deploy.system.progress import Progress, silent
from mmi_deploy.targets.precision.constants import Constants
from mmi_deploy.targets.precision.quantise import quantise, scheme_for_rows
from mmi_deploy.targets.precision.recipes import RECIPES, Recipe, Scheme, recipe
from mmi_deploy.targets.precision.rewrite import read_model
from mmi_deploy.targets.precision.weight_only import Product, products
from mmi_deploy.targets.sample_inputs import Arrays, record

# Recorded inputs per measurement: the last ones, whose KV cache is full.
_RUNS = 3


@dataclass(frozen=True)
class WeightSensitivity:
    """Sensitivity of one weight [rows, columns], quantised as `dtype` in blocks of `block` rows.
    error: relative RMS error of the graph's results."""

    name: str
    rows: int
    columns: int
    dtype: str
    block: int
    error: float


def sensitivity(
    bundle: Bundle,
    graph: str = "llm",
    precision: str = "int4",
    progress: Progress = silent,
) -> list[WeightSensitivity]:
    """Measure the sensitivity of every weight of `graph`, most sensitive first.

    precision: recipe whose scheme is applied, also to weights that the recipe overrides. Errors are
    those of the logits, latents or pixels; of all outputs in a graph without these. Raises
    `ConfigError` for an unknown graph and for a recipe that quantises nothing.
    """
    if graph not in bundle.graphs:
        raise ConfigError(f"there is no graph {graph!r}", expected=" or ".join(bundle.graphs))
    scheme, tolerance = _scheme(recipe(precision)), PRECISION_TOLERANCES[precision]
    contract, path = bundle.graphs[graph], bundle.graph_file(graph)
    model = read_model(path, contract)
    constants = Constants(model.graph)
    found = products(model.graph, constants)
    if not found:
        raise ConfigError(f"{graph} has no matrix product with a weight")
    runs = record(bundle)[graph][-_RUNS:]
    weights = {_input_of(model.graph, product): product for product in found}
    run = model_runner(model, path.parent)
    plain: Arrays = {name: _weight(product, constants) for name, product in weights.items()}
    results = [_results(contract, run, {**inputs, **plain}) for inputs in runs]
    layers = []
    for index, (name, product) in enumerate(weights.items()):
        progress("quantising one weight at a time", index, len(weights), detail=product.name)
        chosen = scheme_for_rows(scheme, product.rows)
        changed = quantise(plain[name], chosen).dequantised()
        error = max(
            compare_outputs(
                _results(contract, run, {**inputs, **plain, name: changed}), wanted, tolerance
            ).relative
            for inputs, wanted in zip(runs, results, strict=True)
        )
        layers.append(
            WeightSensitivity(
                product.name, product.rows, product.columns, chosen.dtype, chosen.block, error
            )
        )
    return sorted(layers, key=lambda layer: -layer.error)


def _scheme(chosen: Recipe) -> Scheme:
    for weights in chosen.weights.values():
        return weights.scheme
    able = [name for name, other in RECIPES.items() if other.weights]
    raise ConfigError(
        f"precision {chosen.name} quantises no weights", fix=f"choose {' or '.join(able)}"
    )


def _input_of(graph: ir.Graph, product: Product) -> str:
    """Turn the weight of a product into a graph input, so that one session serves all weights."""
    value = ir.Value(
        name=f"{product.name}.weight",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([product.rows, product.columns]),
    )
    graph.inputs.append(value)
    product.node.replace_input_with(1, value)
    return str(value.name)


def _weight(product: Product, constants: Constants) -> np.ndarray:
    return np.ascontiguousarray(product.weight(constants), np.float32)


def _results(contract: Graph, run: Run, inputs: Arrays) -> Arrays:
    outputs = run(inputs)
    names: Sequence[str] = [t.name for t in contract.outputs if not t.activation]
    return {name: outputs[name] for name in names or outputs}
