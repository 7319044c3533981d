"""Slice of the 13B model: one layer of its language model and its whole U-Net, at full width with
random weights. Kernels depend on sizes, so the tiny model says little about those of the 13B one.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.tensorrt.backend import TensorRtBackend
from mmi_deploy.spec.graphs import graphs
from mmi_deploy.targets.sample_inputs import Arrays, Sample, inputs_at, random_inputs

# Precision -> graphs whose engines are built: the others cost time and have kernels of their kinds.
GRAPHS: Mapping[str, tuple[str, ...]] = {"fp16": ("llm", "denoise_step"), "int8": ("llm",)}

# Free host memory that exporting, building and comparing take: ONNX Runtime holds 8.6 GB of
# weights in float32. Derived, not measured.
HOST_BYTES = 24 * 10**9

PRESET, LAYERS = "released_13b", 1

# Tokens that are timed.
RUNS = 50


def export_slice(folder: Path) -> None:
    """Export the slice as a bundle, in a process of its own. Raises `EngineError` with the last
    line of an export that failed."""
    code = "from mmi_deploy.cli.app import main; main()"
    words = ["export", "--preset", PRESET, "--layers", str(LAYERS), "--random-weights"]
    words += ["--prove", "none", "-o", str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise EngineError(said[-1].removeprefix("mmi: ") if said else "mmi export failed")


def slice_samples(backend: TensorRtBackend) -> dict[str, list[Sample]]:
    """Random inputs of the graphs that have engines: recording a document takes minutes at these
    sizes."""
    draw, wide = np.random.default_rng(0), graphs(backend.bundle.config, backend.limits)
    return {
        name: [Sample(inputs, False) for inputs in random_inputs(wide[name], (), draw)]
        for name in backend.manifest.graphs
    }


def decode_inputs(backend: TensorRtBackend) -> Arrays:
    """Random inputs of `llm` for one token of one document with one image."""
    graph = backend.graphs["llm"]
    sizes = {letter: allowed.min for letter, allowed in graph.ranges.items()}
    return inputs_at(graph, sizes, np.random.default_rng(0))


def seconds_per_run(engine: Engine, inputs: Arrays, runs: int = RUNS) -> float:
    """Median seconds of a run whose large inputs lie on the device, the wait for it included."""
    memory, places = engine.memory, {tensor.name: tensor for tensor in engine.graph.inputs}
    given: dict[str, Any] = {
        name: memory.from_array(array) if places[name].below is None else array
        for name, array in inputs.items()
    }
    outputs = {
        name: buffer for name, buffer in engine.run(given).items()
        if name not in engine.graph.in_place
    }  # fmt: skip
    found = []
    for _ in range(runs + 3):
        start = time.perf_counter()
        engine.run(given, outputs)
        memory.wait()
        found.append(time.perf_counter() - start)
    return float(np.median(found[3:]))  # the first ones are recorded
