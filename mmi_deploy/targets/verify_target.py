"""Proof that a rewritten graph computes what the portable one does: both run in ONNX Runtime on the
same inputs, recorded ones and random ones, and the error is compared with what its type allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.bundle.manifest import Case
from mmi_deploy.errors import BundleError
from mmi_deploy.runtime.onnxruntime.run_graph import model_runner, runner
from mmi_deploy.spec.graphs import Graph
from mmi_deploy.targets.precision.emulation import simulated
from mmi_deploy.targets.precision.recipes import FLOAT32, Recipe
from mmi_deploy.targets.sample_inputs import Arrays, Sample

TOLERANCE = {
    "fp32": 1e-5,
    "fp16": 1e-2,
    "bf16": 6e-2,
    "int8": 6e-2,
    "fp8": 1.5e-1,
    "int4": 5e-1,
    "int4-128": 5e-1,
    "mixed": 5e-1,
}
"""Greatest root mean square of the error over that of the output, by recipe, on recorded inputs.

fp32: the same sums in another order. fp16: 2^-11 a rounding, through some hundred of them in a row
that partly cancel. bf16: the same with 2^-8. int8, one scale a channel or 32 rows: 0.5 % of a
weight, on the CPU as much of an activation again. fp8: 3 bits of fraction, 2 % of a weight. int4:
8 % of a weight. All but fp32 leave room for models whose activations are less even than those of
the tiny one, up to twice what SmolLM2-135M shows: see docs/precision.md. What an error of that size
means is measured on tasks."""

UNSTEADY = 5.0
"""How much greater the error may be on random tokens. They are no text, and here and there one puts
the model on an edge from which any rounding pushes it off. An error as great as the output, which
tells nothing, is never allowed."""

COMPARED_WITH = "the portable graph in ONNX Runtime, recorded and random inputs, root mean square"
SIMULATED = f"{COMPARED_WITH}; simulated: rounded to the type after every operator, float32 sums"


@dataclass(frozen=True)
class Proof:
    """What a graph was compared with, and how each comparison went."""

    graph: str
    compared_with: str
    cases: tuple[Case, ...]

    @property
    def error(self) -> float:
        return max(case.error for case in self.cases)

    def check(self, recipe: str) -> None:
        """Raise `BundleError` for the first case that failed."""
        for case in self.cases:
            if not case.passed:
                raise BundleError(
                    f"{self.graph} in {recipe} is too far from the portable graph at {case.sizes}",
                    expected=f"a relative error of at most {case.tolerance:g}",
                    got=f"{case.error:.3g}",
                    fix="choose a higher precision, or measure ranges on documents like yours",
                )


_CACHES = "caches"


def prove(
    recipe: Recipe,
    graph: Graph,
    portable: Path,
    rewritten: Path,
    runtime: str,
    samples: Sequence[Sample],
) -> Proof:
    """Compare `rewritten`, made for `runtime`, with the `portable` file of `graph`.

    Narrow activations are simulated: ONNX Runtime's CPU kernels for them are few, and between those
    that it replaces it leaves out the roundings. One file is loaded at a time.
    """
    simulate = recipe.activations_on(runtime) != FLOAT32
    run = runner(portable)
    wanted = [_written(graph, sample.inputs, run(sample.inputs)) for sample in samples]
    del run
    run = model_runner(simulated(rewritten), rewritten.parent) if simulate else runner(rewritten)
    cases = []
    for sample, expected in zip(samples, wanted, strict=True):
        error = relative_error(_written(graph, sample.inputs, run(sample.inputs)), expected)
        allowed = TOLERANCE[recipe.name]
        tolerance = allowed if sample.recorded else min(UNSTEADY * allowed, 0.99)
        sizes = _sizes_of(graph, sample.inputs)
        cases.append(Case(sizes=sizes, error=error, tolerance=tolerance))
    return Proof(graph.name, SIMULATED if simulate else COMPARED_WITH, tuple(cases))


def relative_error(got: Mapping[str, NDArray[Any]], wanted: Mapping[str, NDArray[Any]]) -> float:
    """The greatest of all outputs' root mean square errors, over that of the output; infinite when
    anything is not finite."""
    worst = 0.0
    for name, value in wanted.items():
        difference = got[name].astype(np.float64) - value
        scale = float(np.sqrt(np.mean(np.square(value, dtype=np.float64)))) or 1.0
        error = float(np.sqrt(np.mean(np.square(difference)))) / scale
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst


def _written(graph: Graph, inputs: Arrays, outputs: Arrays) -> Arrays:
    """Outputs. Those in place are taken as one, since each of them went into the others already;
    and of them only what is new, which the rest would drown."""
    found = {name: value for name, value in outputs.items() if name not in graph.in_place}
    new = [outputs[name] - inputs[old] for name, old in graph.in_place.items()]
    if new:
        found[_CACHES] = np.concatenate([value.reshape(-1) for value in new])
    return found


def _sizes_of(graph: Graph, inputs: Arrays) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in graph.inputs:
        for side, found in zip(tensor.shape, inputs[tensor.name].shape, strict=True):
            if isinstance(side, str) and side.isalpha():
                sizes.setdefault(side, found)
    return sizes
