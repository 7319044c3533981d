"""Range check: measure activation ranges, and find the tensors that overflow float16.

The portable graph runs in ONNX Runtime with the peak magnitude of every float tensor as an extra
output. The logits of Attention are internal to the operator; the norms of its queries and keys
bound them. They are bounded after the scale: TensorRT multiplies queries and keys by its root
before their product, so that no kernel forms unscaled logits, which are what overflows float16 in
the U-Net of Stable Diffusion 2.1 elsewhere and makes its pictures black.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmi_deploy.errors import BundleError, EngineError
from mmi_deploy.runtime.onnxruntime.run_graph import model_runner
from mmi_deploy.system.files import write_file
from mmi_deploy.targets.precision.constants import FLOATS, INFINITE

Arrays = Mapping[str, NDArray[Any]]

_PEAKS, _LOGITS = "mmi.peaks", "mmi.logits"
_ATTENTION = "Attention"


@dataclass(frozen=True)
class Ranges:
    """Activation ranges of one graph. peaks: tensor -> peak magnitude. scaled_logits: output of an
    Attention -> bound of its logits. runs: number of calibration inputs."""

    peaks: Mapping[str, float]
    scaled_logits: Mapping[str, float]
    runs: int

    def save(self, path: Path) -> None:
        write_file(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Ranges:
        """Read the ranges that `save` wrote. Raises `BundleError` for any other file."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise BundleError(f"{path} holds no ranges: {error}") from None

    def beyond(self, greatest: float, margin: float) -> set[str]:
        """Tensors that exceed `greatest` on inputs `margin` times as large, and outputs of
        attentions whose logits do."""
        found = {**self.peaks}
        for name, bound in self.scaled_logits.items():
            found[name] = max(bound, found.get(name, 0.0))
        return {name for name, peak in found.items() if not peak * margin <= greatest}


def islands(graph: ir.Graph, beyond: Collection[str]) -> set[str]:
    """Outputs of all nodes that write or read one of the tensors `beyond`: they stay in float32."""
    names = set(beyond)
    for node in graph:
        touched = (*node.inputs, *node.outputs)
        if any(value is not None and value.name in beyond for value in touched):
            names |= {str(value.name) for value in node.outputs}
    return names


def attention_scale(node: ir.Node) -> float:
    """Scale of the logits of an Attention on [b, h, t, d]."""
    query = node.inputs[0]
    assert query is not None and query.shape is not None
    return float(node.attributes.get_float("scale", int(query.shape[-1]) ** -0.5))


def measure_ranges(model: ir.Model, folder: Path, runs: Iterable[Arrays]) -> Ranges:
    """Run a portable graph on each of `runs` and measure its activation ranges.

    folder: where its weights are. Adds outputs to `model`. Raises `EngineError` where ONNX Runtime
    cannot run it.
    """
    names, attentions = _add_peak_outputs(model.graph)
    run = model_runner(model, folder, [_PEAKS, _LOGITS])
    peaks, logits, count = np.zeros(len(names)), np.zeros(len(attentions)), 0
    for inputs in runs:
        found = run(inputs)
        peaks = np.maximum(peaks, found[_PEAKS])
        logits = np.maximum(logits, found[_LOGITS])
        count += 1
    if not count:
        raise EngineError(f"{model.graph.name} has no inputs to measure ranges on")
    return Ranges(
        dict(zip(names, peaks.tolist(), strict=True)),
        dict(zip(attentions, logits.tolist(), strict=True)),
        count,
    )


def _add_peak_outputs(graph: ir.Graph) -> tuple[list[str], list[str]]:
    """Add the outputs `_PEAKS` and `_LOGITS`. Returns the tensors and attentions that their
    elements stand for, in order."""
    tape = ir.tape.Tape()
    shape = tape.op("Constant", [], {"value_ints": [1]})
    limit = tape.op("Constant", [], {"value_float": INFINITE})
    zero = tape.op("Constant", [], {"value_float": 0.0})

    def peak(value: ir.Value) -> ir.Value:
        size = tape.op("Abs", [value])
        size = tape.op("Where", [tape.op("Less", [size, limit]), size, zero])
        return tape.op("Reshape", [tape.op("ReduceMax", [size], {"keepdims": 0}), shape])

    def longest(value: ir.Value) -> ir.Value:
        norms = tape.op("ReduceL2", [value, tape.op("Constant", [], {"value_ints": [-1]})])
        return peak(norms)

    tensors = [value for value in graph.inputs if value.dtype in FLOATS]
    attentions = []
    for node in graph:
        tensors += [value for value in node.outputs if value.dtype in FLOATS]
        if node.op_type == _ATTENTION:
            attentions.append(node)
    bounds = []
    for node in attentions:
        query, key = node.inputs[:2]
        scale = tape.op("Constant", [], {"value_float": attention_scale(node)})
        longest_query = tape.op("Mul", [longest(query), scale])
        bounds.append(tape.op("Mul", [longest_query, longest(key)]))
    for name, values in ((_PEAKS, [peak(value) for value in tensors]), (_LOGITS, bounds)):
        if values:
            output = tape.op("Concat", values, {"axis": 0})
        else:
            output = tape.op("Constant", [], {"value_floats": ir.AttrFloat32s("value_floats", [])})
        output.name = name
        output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([len(values)])
        graph.outputs.append(output)
    graph.extend(tape.nodes)
    return [str(value.name) for value in tensors], [
        str(node.outputs[0].name) for node in attentions
    ]
