"""Emulate a GPU precision on the CPU: its graphs in float32, rounded after every operator."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.runtime.backend import HostBackend
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions, OnnxRuntimeEngine
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.backends import TENSORRT
from mmi_deploy.spec.graphs import Graph
from mmi_deploy.targets.calibration import moments_of, needs_moments
from mmi_deploy.targets.precision import measure_ranges, recipe, rewrite
from mmi_deploy.targets.precision.emulation import emulated
from mmi_deploy.targets.precision.recipes import FLOAT32
from mmi_deploy.targets.precision.rewrite import read_model
from mmi_deploy.targets.sample_inputs import samples_of


def emulated_runtime(bundle: Bundle, precision: str, folder: Path, threads: int = 0) -> Runtime:
    """Open `bundle` on emulated graphs of a GPU recipe, which are written into `folder`.

    Raises `MmiError` for an unknown recipe or a bundle that cannot be rewritten or run.
    """
    chosen = recipe(precision)
    samples = samples_of(bundle) if chosen.activations != FLOAT32 else {}
    for name, graph in bundle.graphs.items():
        portable, out = bundle.graph_file(name), folder / f"{name}.onnx"
        ranges = moments = None
        if needs_moments(name, chosen):
            moments = moments_of(bundle, name, samples[name])
        if runs := [sample.inputs for sample in samples.get(name, []) if sample.recorded]:
            ranges = measure_ranges(read_model(portable, graph), portable.parent, runs)
        rewrite(chosen, graph, portable, out, runtime=TENSORRT, ranges=ranges, moments=moments)
        onnx.save(ir.to_proto(emulated(out)), out)

    def load(graph: Graph) -> Engine:
        return OnnxRuntimeEngine(folder / f"{graph.name}.onnx", graph, OnnxOptions(threads))

    tokenizer = Tokenizer.open(bundle.tokenizer, bundle.config.tokens)
    backend = HostBackend(bundle.graphs, bundle.limits, load)
    return Runtime(bundle.config, tokenizer, backend, bundle.schedule, bundle.schedules)
