"""Mean squares of the inputs of a graph's products, measured on calibration inputs.

An input channel whose activations are large passes on the rounding of its weights enlarged. The
mean square of every channel is all that `activation_aware` needs to know of the activations.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmi_deploy.errors import BundleError, EngineError
from mmi_deploy.runtime.onnxruntime.run_graph import model_runner
from mmi_deploy.system.files import write_file
from mmi_deploy.targets.precision.constants import Constants
from mmi_deploy.targets.precision.weight_only import Product, products

Arrays = Mapping[str, NDArray[Any]]

_SUFFIX = ".mean_square"

# Digits of a number in the file.
_DIGITS = 6


@dataclass(frozen=True)
class Moments:
    """Mean squares of one graph. squares: name of a product's input -> mean square per channel.
    rows: number of rows, of all calibration inputs together, that each is a mean of."""

    squares: Mapping[str, list[float]]
    rows: int

    def save(self, path: Path) -> None:
        write_file(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> Moments:
        """Read the moments that `save` wrote. Raises `BundleError` for any other file."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise BundleError(f"{path} holds no moments: {error}") from None

    def of(self, product: Product) -> NDArray[np.float64]:
        """Mean squares [in] of the input of `product`. Raises `BundleError` where they were not
        measured, or for another width."""
        value = product.node.inputs[0]
        found = self.squares.get(str(value.name)) if value is not None else None
        if found is None or len(found) != product.rows:
            raise BundleError(
                f"the calibration has no activations of {product.name}",
                expected=f"mean squares of {product.rows} channels",
                got="none" if found is None else len(found),
                fix="remove its cached moments and build again",
            )
        return np.asarray(found, np.float64)


def measure_moments(model: ir.Model, folder: Path, runs: Iterable[Arrays]) -> Moments:
    """Run a portable graph on each of `runs` and measure its moments.

    folder: where its weights are. Adds outputs to `model`. Raises `EngineError` where ONNX Runtime
    cannot run it, or without a run.
    """
    graph = model.graph
    tape = ir.tape.Tape()
    outputs: dict[str, ir.Value] = {}
    for product in products(graph, Constants(graph)):
        value = product.node.inputs[0]
        if value is None or str(value.name) in outputs:
            continue
        shape = tape.op("Constant", [], {"value_ints": [-1, product.rows]})
        axes = tape.op("Constant", [], {"value_ints": [0]})
        flat = tape.op("Reshape", [tape.op("Mul", [value, value]), shape])
        output = tape.op("ReduceSum", [flat, axes], {"keepdims": 0})
        output.name = f"{value.name}{_SUFFIX}"
        output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([product.rows])
        count = tape.op("Shape", [flat], {"start": 0, "end": 1})
        count.name = f"{output.name}.rows"
        count.type, count.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        graph.outputs.extend([output, count])
        outputs[str(value.name)] = output
    graph.extend(tape.nodes)
    names = [str(output.name) for output in outputs.values()]
    run = model_runner(model, folder, [*names, *(f"{name}.rows" for name in names)])
    sums = {name: np.zeros(0) for name in outputs}
    rows = dict.fromkeys(outputs, 0)
    for inputs in runs:
        found = run(inputs)
        for name, output in outputs.items():
            total = found[str(output.name)].astype(np.float64)
            sums[name] = sums[name] + total if sums[name].size else total
            rows[name] += int(found[f"{output.name}.rows"][0])
    if not all(rows.values()):
        raise EngineError(f"{graph.name} has no inputs to measure moments on")
    squares = {
        name: [float(f"{number:.{_DIGITS}g}") for number in total / rows[name]]
        for name, total in sums.items()
    }
    return Moments(squares, max(rows.values(), default=0))
