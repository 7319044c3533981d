"""Calibration data: recorded inputs, activation ranges, moments, parity results.

Recording runs the whole bundle, so inputs are recorded on first use. Ranges are cached on disk
under the bundle's identity, since every build with fp16 or bf16 activations reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import onnx

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.errors import BundleError, EngineError
from mmi_deploy.parity import Proof
from mmi_deploy.system.progress import Progress, silent
from mmi_deploy.targets.precision import Ranges, Recipe, measure_ranges
from mmi_deploy.targets.precision.moments import Moments, measure_moments
from mmi_deploy.targets.precision.recipes import FLOAT32, MAX_FINITE
from mmi_deploy.targets.precision.rewrite import read_model
from mmi_deploy.targets.sample_inputs import Arrays, Sample, samples_of
from mmi_deploy.targets.verify_target import check_proof, prove

# Peak memory of ONNX Runtime as a multiple of the float32 weights of the graphs that it runs.
RUN_FACTOR = 2.5


@dataclass(frozen=True)
class Calibration:
    """Calibration inputs, activation ranges, moments and parity results of one bundle.

    folder: cache of ranges and moments.
    """

    bundle: Bundle
    folder: Path
    progress: Progress = silent

    @cached_property
    def samples(self) -> dict[str, list[Sample]]:
        """Calibration inputs by graph, recorded and random. Raises what running the bundle
        raises."""
        self.progress("recording inputs")
        return samples_of(self.bundle)

    def ranges(self, graph: str, recipe: Recipe, runtime: str) -> Ranges | None:
        """Activation ranges of one graph, or None where `recipe` computes in float32."""
        if recipe.activations_on(runtime) == FLOAT32:
            return None
        return self.known_ranges(graph) or self._measure(graph)

    def known_ranges(self, graph: str) -> Ranges | None:
        """Cached activation ranges of an earlier build, or None."""
        with suppress(BundleError):
            return Ranges.load(self._path(graph))
        return None

    def moments(self, graph: str, recipe: Recipe) -> Moments | None:
        """Moments of one graph, or None where `recipe` needs none."""
        if not needs_moments(graph, recipe):
            return None
        return self.known_moments(graph) or self._measure_moments(graph)

    def known_moments(self, graph: str) -> Moments | None:
        """Cached moments of an earlier build, or None."""
        with suppress(BundleError):
            return Moments.load(self._path(f"{graph}-moments"))
        return None

    def _path(self, graph: str) -> Path:
        return self.folder / f"{self.bundle.identity[:32]}-{graph}.json"

    def _measure_moments(self, graph: str) -> Moments:
        samples = self.samples[graph]
        self.progress(f"measuring activations of {graph}")
        found = moments_of(self.bundle, graph, samples)
        self.folder.mkdir(parents=True, exist_ok=True)
        found.save(self._path(f"{graph}-moments"))
        return found

    def _measure(self, graph: str) -> Ranges:
        """Measure ranges on recorded inputs; on random ones for a graph that recording did not
        run."""
        runs = _calibration_runs(self.samples[graph])
        self.progress(f"measuring ranges of {graph}")
        source = self.bundle.graph_file(graph)
        model = read_model(source, self.bundle.graphs[graph])
        found = measure_ranges(model, source.parent, runs)
        self.folder.mkdir(parents=True, exist_ok=True)
        found.save(self._path(graph))
        return found

    def prove(self, graph: str, recipe: Recipe, runtime: str, rewritten: Path) -> Proof:
        """Compare a rewritten graph with the portable one. Raises `BundleError` beyond
        tolerance."""
        samples = self.samples[graph]
        self.progress(f"proving {graph} in {recipe.name}")
        contract, portable = self.bundle.graphs[graph], self.bundle.graph_file(graph)
        proof = prove(recipe, contract, portable, rewritten, runtime, samples)
        check_proof(proof, recipe.name)
        return proof


def needs_moments(graph: str, recipe: Recipe) -> bool:
    """Return True if `recipe` scales the weights of `graph` by its activations."""
    return recipe.activation_aware and graph in recipe.weights


def moments_of(bundle: Bundle, graph: str, samples: Sequence[Sample]) -> Moments:
    """Moments of a graph of `bundle` on the recorded ones of `samples`, on all where there are
    none."""
    source = bundle.graph_file(graph)
    model = read_model(source, bundle.graphs[graph])
    return measure_moments(model, source.parent, _calibration_runs(samples))


def _calibration_runs(samples: Sequence[Sample]) -> list[Arrays]:
    recorded = [sample.inputs for sample in samples if sample.recorded]
    return recorded or [sample.inputs for sample in samples]


def check_can_run(
    bundle: Bundle,
    free: int,
    fix: str = "Build on a larger machine, or give --unproved to build without ranges and proof",
) -> None:
    """Raise `EngineError` where running the bundle takes more than `free` bytes of memory."""
    need = int(RUN_FACTOR * sum(_float32_bytes(bundle.graph_file(name)) for name in bundle.graphs))
    if need > free:
        raise EngineError(
            "too little memory to run the bundle for calibration",
            expected=f"about {need / 1e9:.1f} GB free",
            got=f"{free / 1e9:.1f} GB",
            fix=fix,
        )


def moments_key(moments: Moments | None) -> str:
    """Hash of moments, for the cache key; empty without."""
    text = repr(sorted(moments.squares.items())) if moments else ""
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


def islands_key(ranges: Ranges | None, recipe: Recipe) -> str:
    """Hash of the tensors that stay in float32 because of `ranges`, for the cache key.

    Empty where every tensor fits the type of activations, and where ranges were not measured.
    """
    beyond = ranges.beyond(MAX_FINITE[recipe.activations], recipe.margin) if ranges else set()
    return hashlib.sha256("\n".join(sorted(beyond)).encode()).hexdigest()[:16] if beyond else ""


def _float32_bytes(path: Path) -> int:
    model = onnx.load(path, load_external_data=False)
    return 4 * sum(prod(tensor.dims) for tensor in model.graph.initializer)
