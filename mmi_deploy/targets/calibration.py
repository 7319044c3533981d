"""What a build is judged by: inputs recorded from a run of the bundle, how great the numbers inside
its graphs get on them, and the proofs of rewritten graphs.

Recording runs the whole bundle, so it is done when it is first asked for; ranges are kept, under
the bundle's identity, since every build of a narrow type asks for them.
"""

from __future__ import annotations

import hashlib
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
from mmi_deploy.targets.precision.recipes import FLOAT32, GREATEST
from mmi_deploy.targets.precision.rewrite import read_model
from mmi_deploy.targets.sample_inputs import Sample, samples_of
from mmi_deploy.targets.verify_target import check_proof, prove

# Memory of ONNX Runtime over the float32 weights of the graphs that it runs.
RUN_FACTOR = 2.5


@dataclass(frozen=True)
class Evidence:
    """Inputs, ranges and proofs of one bundle. folder: where ranges are kept. progress:
    told what is done next."""

    bundle: Bundle
    folder: Path
    progress: Progress = silent

    @cached_property
    def samples(self) -> dict[str, list[Sample]]:
        """Sets of inputs by graph. Raises what running the bundle raises."""
        self.progress("recording inputs")
        return samples_of(self.bundle)

    def ranges(self, graph: str, recipe: Recipe, runtime: str) -> Ranges | None:
        """The range check of one graph, or None where `recipe` computes in float32."""
        if recipe.activations_on(runtime) == FLOAT32:
            return None
        return self.known_ranges(graph) or self._measure(graph)

    def known_ranges(self, graph: str) -> Ranges | None:
        """The range check of an earlier build, if there was one."""
        with suppress(BundleError):
            return Ranges.load(self._path(graph))
        return None

    def _path(self, graph: str) -> Path:
        return self.folder / f"{self.bundle.identity[:32]}-{graph}.json"

    def _measure(self, graph: str) -> Ranges:
        """On what was recorded; on random inputs for a graph that the recorded run had no use
        for."""
        samples = self.samples[graph]
        runs = [sample.inputs for sample in samples if sample.recorded]
        self.progress(f"measuring ranges of {graph}")
        source = self.bundle.graph_file(graph)
        model = read_model(source, self.bundle.graphs[graph])
        found = measure_ranges(model, source.parent, runs or [sample.inputs for sample in samples])
        self.folder.mkdir(parents=True, exist_ok=True)
        found.save(self._path(graph))
        return found

    def prove(self, graph: str, recipe: Recipe, runtime: str, rewritten: Path) -> Proof:
        """Compare a rewritten graph with the portable one; raises `BundleError` when it is too far
        from it."""
        samples = self.samples[graph]
        self.progress(f"proving {graph} in {recipe.name}")
        contract, portable = self.bundle.graphs[graph], self.bundle.graph_file(graph)
        proof = prove(recipe, contract, portable, rewritten, runtime, samples)
        check_proof(proof, recipe.name)
        return proof


def check_can_run(
    bundle: Bundle,
    free: int,
    fix: str = "Build on a larger machine, or give --unproved to build without ranges and proof",
) -> None:
    """Raise `EngineError` where the bundle is too large to be run with `free` bytes of memory."""
    need = int(RUN_FACTOR * sum(_float32_bytes(bundle.graph_file(name)) for name in bundle.graphs))
    if need > free:
        raise EngineError(
            "too little memory to run the bundle, which shows what a precision does to it",
            expected=f"about {need / 1e9:.1f} GB free",
            got=f"{free / 1e9:.1f} GB",
            fix=fix,
        )


def islands_key(ranges: Ranges | None, recipe: Recipe) -> str:
    """What of the ranges matters to an engine: the tensors that its type cannot hold. Empty where
    there are none, whether or not ranges were asked for."""
    beyond = ranges.beyond(GREATEST[recipe.activations], recipe.margin) if ranges else set()
    return hashlib.sha256("\n".join(sorted(beyond)).encode()).hexdigest()[:16] if beyond else ""


def _float32_bytes(path: Path) -> int:
    model = onnx.load(path, load_external_data=False)
    return 4 * sum(prod(tensor.dims) for tensor in model.graph.initializer)
