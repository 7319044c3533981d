"""Outputs of the portable graphs saved on one machine and compared with engines on another.

The machine with the GPU then runs engines alone: the float32 model need not fit in its memory. The
file is JSON that Polygraphy reads (`RunResults`: one runner per graph, one iteration per case), and
its field `mmi` says of which bundle it is. It is read without Polygraphy, whose reader decodes
further types: numbers alone are taken from it, and nothing in it is executed.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.bundle.bundle import Bundle, tool_versions
from mmi_deploy.bundle.manifest import TargetManifest
from mmi_deploy.errors import BundleError
from mmi_deploy.parity import Proof, compare_outputs, precision_tolerance
from mmi_deploy.runtime.onnxruntime.run_graph import runner
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.graphs import Graph
from mmi_deploy.system.files import write_new_file
from mmi_deploy.targets.polygraphy.bundle_files import stored_samples
from mmi_deploy.targets.sample_inputs import Arrays, dynamic_sizes, fits
from mmi_deploy.targets.verify_target import (
    CACHES,
    Progress,
    checked_precision,
    run_engine,
    written,
)

SAVE = "mmi verify BUNDLE --save-outputs FILE"
COMPARED_WITH_SAVED = (
    "outputs of the portable graph in ONNX Runtime, saved on another machine, recorded and random "
    "inputs, root mean square"
)

# Suffix of the spans [start, length] of the changed entries of the caches, which alone are saved.
_SPANS = ".spans"

_TYPE = "polygraphy_class"


@dataclass(frozen=True)
class SavedCase:
    """Outputs of one run, as `written` gives them. inputs: checksum of the inputs."""

    inputs: str
    outputs: Arrays


def save_outputs(
    bundle: Bundle, path: Path, progress: Progress = lambda what, done, total: None
) -> int:
    """Run every portable graph on the bundle's inputs and write the new file `path`; returns the
    number of runs. Raises `BundleError` for a bundle without inputs, `EngineError` for a graph that
    cannot be run."""
    runners: list[str] = []
    cases: dict[str, list[dict[str, object]]] = {}
    for done, (name, graph) in enumerate(bundle.graphs.items()):
        progress(f"running {name}", done, len(bundle.graphs))
        run = runner(bundle.graph_file(name))
        iterations = []
        cases[name] = []
        for sample in stored_samples(bundle, graph):
            outputs = written(graph, sample.inputs, run(sample.inputs))
            iterations.append(json.dumps(_iteration(name, _sparse(outputs))))
            sizes = dynamic_sizes(graph, sample.inputs)
            cases[name].append({"sizes": sizes, "inputs": checksum(sample.inputs)})
        runners.append(f"[{json.dumps(name)}, [{', '.join(iterations)}]]")
        del run  # the next graph may take as much memory
    about = {"bundle": bundle.identity, "versions": tool_versions(), "cases": cases}
    text = f'{{"mmi": {json.dumps(about)},\n"lst": [{", ".join(runners)}],\n'
    write_new_file(path, f'{text}"{_TYPE}": "RunResults"}}\n')
    return sum(map(len, cases.values()))


def checksum(inputs: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of names, types, shapes and values."""
    found = hashlib.sha256()
    for name, array in sorted(inputs.items()):
        found.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def read_outputs(path: Path, bundle: Bundle) -> dict[str, list[SavedCase]]:
    """Read the saved outputs of each graph of `bundle`. Raises `BundleError` for a file of another
    bundle, or one that `save_outputs` did not write."""
    try:
        found = json.loads(path.read_bytes())
        about = found["mmi"]
        if about["bundle"] != bundle.identity:
            raise BundleError(
                f"{path} was saved for another bundle than {bundle.folder}",
                expected=bundle.identity,
                got=f"{about['bundle']!s:.64}",
                fix=f"save it for this one with `{SAVE}`, or copy the bundle that it was saved for",
            )
        saved = {}
        for name, iterations in found["lst"]:
            pairs = zip(about["cases"][name], iterations, strict=True)
            graph = bundle.graphs[name]
            saved[name] = [_saved_case(graph, case, iteration) for case, iteration in pairs]
        return saved
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, LookupError, RecursionError, AttributeError) as error:
        raise BundleError(
            f"{path} is damaged or is not a file of saved outputs ({error!s:.80})",
            fix=f"write it again with `{SAVE}`",
        ) from None


def compare_saved(
    bundle: Bundle,
    manifest: TargetManifest,
    runtime: Runtime,
    saved: Mapping[str, list[SavedCase]],
    progress: Progress = lambda what, done, total: None,
) -> list[Proof]:
    """Compare every engine of the target opened in `runtime` with the saved outputs, as
    `compare_target` does with portable graphs that run here. Raises `BundleError` for saved outputs
    that lack a graph or that other inputs gave."""
    precision = checked_precision(bundle, manifest)
    proofs = []
    for done, name in enumerate(manifest.graphs):
        progress(f"comparing {name}", done, len(manifest.graphs))
        graph, whole = runtime.graphs[name], bundle.graphs[name]
        comparisons = []
        for sample, case in zip_longest(stored_samples(bundle, whole), saved.get(name, ())):
            if sample is None or case is None or checksum(sample.inputs) != case.inputs:
                raise BundleError(
                    f"the saved outputs of {name} belong to other inputs than this machine draws",
                    fix="save them again with this version of mmi_deploy and numpy: "
                    f"`{SAVE}` there, the same versions here",
                )
            if fits(graph, sample.inputs):
                tolerance = precision_tolerance(precision, sample.recorded)
                got = run_engine(runtime, graph, sample.inputs)
                comparison = compare_outputs(got, case.outputs, tolerance)
                comparisons.append((dynamic_sizes(graph, sample.inputs), comparison))
        proofs.append(Proof(name, COMPARED_WITH_SAVED, tuple(comparisons)))
    return proofs


def _iteration(name: str, outputs: Mapping[str, NDArray[Any]]) -> dict[str, object]:
    """Outputs as Polygraphy writes an `IterationResult`."""
    values = {
        output: {"values": _encoded(array), _TYPE: "LazyArray"} for output, array in outputs.items()
    }
    return {"outputs": values, "runtime": None, "runner_name": name, _TYPE: "IterationResult"}


def _encoded(array: NDArray[Any]) -> dict[str, str]:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=False)
    return {"array": base64.b64encode(data.getvalue()).decode(), _TYPE: "ndarray"}


def _decoded(value: Mapping[str, Any]) -> NDArray[Any]:
    data = base64.b64decode(value["values"]["array"], validate=True)
    version = np.lib.format.read_magic(stream := io.BytesIO(data))
    if version != (1, 0):
        raise ValueError(f"array of version {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in "fi" or prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"array of {dtype} {shape} in {len(data)} bytes")
    stream.seek(0)
    array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _saved_case(graph: Graph, case: Mapping[str, Any], iteration: Mapping[str, Any]) -> SavedCase:
    outputs = {name: _decoded(value) for name, value in iteration["outputs"].items()}
    expected = {tensor.name for tensor in graph.outputs} - set(graph.in_place)
    if graph.in_place:
        expected.add(CACHES)
        shapes = [graph[name].resolve(**case["sizes"]) for name in graph.in_place]
        size = sum(map(prod, shapes))
        outputs[CACHES] = _dense(outputs[CACHES], outputs.pop(CACHES + _SPANS), size)
    if outputs.keys() != expected:
        raise ValueError(f"outputs of {graph.name}: {', '.join(outputs)}")
    return SavedCase(case["inputs"], outputs)


def _sparse(outputs: Arrays) -> Arrays:
    """Replace the changes of the caches by the entries that are not zero, and their spans."""
    if CACHES not in outputs:
        return outputs
    changes = outputs[CACHES]
    edges = np.flatnonzero(np.diff(changes != 0, prepend=False, append=False))
    spans = np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1)
    return {**outputs, CACHES: changes[changes != 0], CACHES + _SPANS: spans}


def _dense(values: NDArray[Any], spans: NDArray[Any], size: int) -> NDArray[Any]:
    starts, lengths = spans[:, 0], spans[:, 1]
    ends = starts + lengths
    inside = spans.size == 0 or (starts[0] >= 0 and ends[-1] <= size)
    if not inside or (lengths <= 0).any() or (starts[1:] <= ends[:-1]).any():
        raise ValueError("spans of the caches overlap or leave them")
    changed = np.zeros(size + 1, np.int8)
    changed[starts], changed[ends] = 1, -1
    dense = np.zeros(size, np.float32)
    dense[np.cumsum(changed[:-1], dtype=np.int8) > 0] = values
    return dense
