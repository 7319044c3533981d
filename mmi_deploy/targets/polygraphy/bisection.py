"""First wrong tensor of a rewritten graph, and the smallest graph that shows the error.

All tensors that the rewritten graph has in common with the portable one become outputs of both, and
are compared in the order in which the rewritten graph computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.external_data_helper import uses_external_data

from mmi_deploy.errors import BundleError
from mmi_deploy.parity import Tolerance, compare
from mmi_deploy.runtime.onnxruntime.run_graph import Run, model_runner
from mmi_deploy.system.files import write_file
from mmi_deploy.targets.polygraphy import load_data
from mmi_deploy.targets.polygraphy.bundle_files import packed

Shape = tuple[int, ...]

# Opens a graph file with the tensors of these names and shapes as its only outputs: in ONNX
# Runtime, or as an engine.
MarkedRun = Callable[[Path, Mapping[str, Shape]], Run]

REDUCED = "reduced"

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class Bisection:
    """Result of `bisect`. compared: tensors in common. tensor: the first one whose error is beyond
    the tolerance, with the node that computes it; empty where none is. error: its relative error,
    infinite where the tensors cannot be compared."""

    compared: int
    tensor: str = ""
    node: str = ""
    operator: str = ""
    error: float = 0.0

    def line(self) -> str:
        """One line for a report."""
        if not self.tensor:
            return (
                f"none of {self.compared} tensors is beyond the tolerance once all are outputs: "
                "the error comes with a fusion, or is the sum of many"
            )
        return (
            f"the first of {self.compared} tensors beyond the tolerance is {self.tensor}, of "
            f"{self.operator} {self.node}: relative error {self.error:.3g}"
        )


def bisect(
    portable: Path,
    rewritten: Path,
    inputs: Mapping[str, NDArray[Any]],
    tolerance: Tolerance,
    folder: Path,
    run: MarkedRun | None = None,
) -> Bisection:
    """Find the first tensor of `rewritten` that differs from that of `portable` in ONNX Runtime.

    inputs: one run, in the types of the portable graph. run: opens `rewritten` where it fails; None
    for ONNX Runtime. folder: new folder for the reduced graph, its inputs and their loader; not
    made where no tensor is wrong. Raises `BundleError` for graphs without a tensor in common.
    """
    whole = _inferred(rewritten)
    names = _common(whole, _inferred(portable))
    if not names:
        raise BundleError(f"{rewritten} has no tensor in common with {portable}")
    expected = marked_runner(portable, names)(inputs)
    shapes = {name: expected[name].shape for name in names}
    got = (run or marked_runner)(rewritten, shapes)(_typed(whole, inputs))
    good: set[str] = set()
    for name in names:
        comparison = compare(name, got[name].astype(np.float32), expected[name], tolerance)
        if comparison.verdict != "FAIL":
            good.add(name)
            continue
        node = next(node for node in whole.graph.node if name in node.output)
        _write_reduced(whole, rewritten.parent, name, good, {**expected, **inputs}, folder)
        error = comparison.relative
        return Bisection(len(names), name, node.name, node.op_type, error)
    return Bisection(len(names))


def marked_runner(path: Path, names: Iterable[str]) -> Run:
    """Open a graph in ONNX Runtime with the tensors `names` as its only outputs."""
    model, _ = mark_outputs(path, names)
    return model_runner(ir.from_proto(model), path.parent, list(names))


def mark_outputs(path: Path, names: Iterable[str]) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Graph with the tensors `names` as its only outputs, its weights not read; and the element
    type of every tensor."""
    model = _inferred(path)
    types = _types(model)
    del model.graph.output[:]
    for name in names:
        model.graph.output.append(helper.make_tensor_value_info(name, types[name], None))
    return model, types


def _inferred(path: Path) -> onnx.ModelProto:
    """Structure of a graph with the type of every tensor; weights are not read."""
    model = onnx.load(path, load_external_data=False)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=False)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor by name."""
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _common(model: onnx.ModelProto, other: onnx.ModelProto) -> list[str]:
    """Floating-point tensors that nodes of both models compute, in the order of `model`."""
    types, others = _types(model), _types(other)
    computed = {name for node in other.graph.node for name in node.output}
    return [
        name
        for node in model.graph.node
        for name in node.output
        if name in computed and types.get(name) in _FLOATS and others.get(name) in _FLOATS
    ]


def _typed(model: onnx.ModelProto, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Inputs cast to the types of the model's own."""
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    return {
        name: array.astype(helper.tensor_dtype_to_np_dtype(types[name]))
        for name, array in inputs.items()
    }


def _write_reduced(
    model: onnx.ModelProto,
    weights: Path,
    output: str,
    good: set[str],
    values: Mapping[str, NDArray[Any]],
    folder: Path,
) -> None:
    """Write the part of `model` between tensors that are right and `output`, with their values as
    its inputs. Inputs are float32 or integers, cast inside to the types of the graph."""
    nodes, starts = _between(model, output, good)
    types = _types(model)
    graph, inputs, casts = model.graph, [], []
    for name in starts:
        floating = types[name] in _FLOATS and types[name] != TensorProto.FLOAT
        given = f"{name}.given" if floating else name
        dtype = TensorProto.FLOAT if floating else types[name]
        inputs.append(helper.make_tensor_value_info(given, dtype, values[name].shape))
        if floating:
            casts.append(helper.make_node("Cast", [given], [name], to=types[name]))
    used = {name for node in nodes for name in node.input}
    held = [_inline(tensor, weights) for tensor in graph.initializer if tensor.name in used]
    result = helper.make_tensor_value_info(output, types[output], None)
    reduced = onnx.ModelProto()
    reduced.CopyFrom(model)
    reduced.graph.CopyFrom(helper.make_graph([*casts, *nodes], REDUCED, inputs, [result], held))
    folder.mkdir(parents=True)
    onnx.save(
        reduced, folder / f"{REDUCED}.onnx", save_as_external_data=True, location=f"{REDUCED}.data"
    )
    arrays = {value.name: values[value.name.removesuffix(".given")] for value in inputs}
    write_file(folder / f"{REDUCED}.npz", packed(arrays))
    write_file(folder / "load_data.py", Path(load_data.__file__).read_bytes())


def _inline(tensor: onnx.TensorProto, folder: Path) -> onnx.TensorProto:
    """The tensor with its values inside. ONNX would refuse to read them from a file with hard
    links, which rewritten graphs share with the portable ones."""
    if not uses_external_data(tensor):
        return tensor
    where = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / where["location"]).open("rb") as file:
        file.seek(int(where.get("offset", 0)))
        data = file.read(int(where["length"]) if "length" in where else -1)
    return onnx.TensorProto(
        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=data
    )


def _between(
    model: onnx.ModelProto, output: str, good: Iterable[str]
) -> tuple[list[onnx.NodeProto], list[str]]:
    """Nodes that compute `output` from tensors in `good` and inputs of the model, in order, and the
    names of these tensors."""
    known = {*good, *(value.name for value in model.graph.input)}
    held = {tensor.name for tensor in model.graph.initializer}
    needed, nodes, starts = {output}, [], []
    for node in reversed(model.graph.node):
        if not needed.intersection(node.output):
            continue
        nodes.append(node)
        for name in filter(None, node.input):
            if name in known:
                starts.append(name)
            elif name not in held:
                needed.add(name)
    return nodes[::-1], list(dict.fromkeys(starts))
