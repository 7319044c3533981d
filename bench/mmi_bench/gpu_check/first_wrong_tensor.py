"""First wrong tensor of each graph that failed its comparison, found by engines in which all
tensors are outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.parity import Proof, precision_tolerance
from mmi_deploy.runtime.onnxruntime.run_graph import Run
from mmi_deploy.runtime.tensorrt.backend import TensorRtBackend
from mmi_deploy.runtime.tensorrt.engine import TensorRtEngine
from mmi_deploy.spec.graphs import Graph, Tensor
from mmi_deploy.spec.target import Target
from mmi_deploy.system.files import cache_folder
from mmi_deploy.system.progress import silent
from mmi_deploy.system.temporary_folder import temporary_folder
from mmi_deploy.targets.calibration import Calibration
from mmi_deploy.targets.polygraphy.bisection import MarkedRun, Shape, bisect, mark_outputs
from mmi_deploy.targets.polygraphy.bundle_files import stored_samples
from mmi_deploy.targets.precision import recipe, rewrite
from mmi_deploy.targets.tensorrt_build import Job, Plugin
from mmi_deploy.targets.tensorrt_process import build_in_process
from mmi_deploy.targets.tensorrt_rewrites import rewrite_for_tensorrt
from mmi_deploy.targets.verify_target import engine_outputs

# Element types of marked tensors -> names in the contract.
_NAMES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}


def find_first_wrong_tensors(
    bundle: Bundle,
    target: Target,
    proofs: Sequence[Proof],
    folder: Path,
    run: Callable[[Graph], MarkedRun],
) -> list[str]:
    """Bisect every graph of `target` whose proof failed; returns a line for each.

    folder: gets a folder per graph with the part that shows the error. run: opens the graph of a
    typed contract where it fails, as `engine_runner` does on a GPU.
    """
    chosen, lines = recipe(target.precision), []
    tolerance = precision_tolerance(target.precision, recorded=True)
    calibration = Calibration(bundle, cache_folder() / "ranges")
    engines = bundle.folder / "engines"
    engines.mkdir(exist_ok=True)
    for proof in (proof for proof in proofs if not proof.passed):
        name = proof.graph
        graph, portable = bundle.graphs[name], bundle.graph_file(name)
        inputs = next(iter(stored_samples(bundle, graph))).inputs
        with temporary_folder(engines, ".bisect-") as work:
            path = work / f"{name}.onnx"
            known = calibration.known_ranges(name), calibration.known_moments(name)
            typed = rewrite(
                chosen, graph, portable, path,
                runtime=target.runtime, ranges=known[0], moments=known[1],
            )  # fmt: skip
            found = bisect(portable, path, inputs, tolerance, folder / name, run(typed))
        where = f"; the part that shows it is in {folder.name}/{name}" if found.tensor else ""
        lines.append(f"{name}: {found.line()}{where}")
    return lines


def engine_runner(
    graph: Graph,
    target: Target,
    backend: TensorRtBackend,
    plugin: Plugin,
    build: Callable[[Job, Any], Any] = build_in_process,
) -> MarkedRun:
    """Return a function that builds an engine with all tensors as outputs and runs it on the GPU of
    `backend`. graph: typed contract. The engine is built for the shapes of one run."""

    def open_marked(path: Path, shapes: Mapping[str, Shape]) -> Run:
        def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            source = path.with_name(f"{graph.name}.marked.onnx")
            model, types = mark_outputs(path, shapes)
            for value in model.graph.input:
                dims = value.type.tensor_type.shape.dim
                for dim, side in zip(dims, inputs[value.name].shape, strict=True):
                    dim.dim_value = side
            onnx.save(model, source)
            onnx.save(rewrite_for_tensorrt(plugin.copy(model), source), source)
            contract = Graph(
                graph.name,
                tuple(
                    Tensor(t.name, t.dtype, inputs[t.name].shape, t.min, t.below)
                    for t in graph.inputs
                ),
                tuple(Tensor(name, _NAMES[types[name]], shapes[name]) for name in shapes),
                {},
                {new: old for new, old in graph.in_place.items() if new in shapes},
            )
            engine_file = source.with_suffix(".engine")
            architecture = str(target.architecture)
            job = Job(graph.name, target.runtime, architecture, source, engine_file, (), plugin)
            build(job, silent)
            engine = TensorRtEngine(
                engine_file,
                contract,
                backend.tensorrt,
                backend.memory,
                backend.workspace,
                fix=f"mmi build --graph {graph.name}",
                record=False,
            )
            try:
                return engine_outputs(engine, inputs)
            finally:
                engine.close()

        return run

    return open_marked
