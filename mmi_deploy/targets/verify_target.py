"""Compare a target's graphs with the portable ones in ONNX Runtime, and write their receipts.

Both run on the same recorded and random inputs. `prove` compares a rewritten ONNX file during a
build, `compare_target` the engines of a finished target on their own hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import Receipt, TargetManifest, hash_of_files
from mmi_deploy.errors import BundleError
from mmi_deploy.parity import PRECISION_TOLERANCES, Proof, compare_outputs, precision_tolerance
from mmi_deploy.runtime.buffers import Array, element_type
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.onnxruntime.run_graph import Run, model_runner, runner
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.backends import BACKENDS
from mmi_deploy.spec.graphs import Graph
from mmi_deploy.targets.precision.emulation import emulated
from mmi_deploy.targets.precision.recipes import FLOAT32, Recipe
from mmi_deploy.targets.rewriting import rewrite_target
from mmi_deploy.targets.sample_inputs import Arrays, Sample, dynamic_sizes, samples_of

COMPARED_WITH = "the portable graph in ONNX Runtime, recorded and random inputs, root mean square"
EMULATED = f"{COMPARED_WITH}; emulated: rounded to the type after every operator, float32 sums"
ON_GPU = (
    "the portable graph in ONNX Runtime, on the GPU itself, recorded and random inputs at batch 1 "
    "and 2 with no, one and several images, root mean square"
)

TOO_FAR = "choose a higher precision, or measure ranges on documents like yours"

# Called with what is done next, how much is done, and how much there is.
Progress = Callable[[str, int, int], None]

# Output that `written` puts in the place of all caches.
CACHES = "caches"


def prove(
    recipe: Recipe,
    graph: Graph,
    portable: Path,
    rewritten: Path,
    runtime: str,
    samples: Sequence[Sample],
) -> Proof:
    """Compare `rewritten`, made for `runtime`, with the `portable` file of `graph`.

    fp16 and bf16 activations are emulated: ONNX Runtime has few CPU kernels for them, and does not
    round between operators that it runs in float32 instead.
    """
    emulate = recipe.activations_on(runtime) != FLOAT32

    def load() -> Run:
        if not emulate:
            run = runner(rewritten)
        else:
            rounded_scales = BACKENDS[runtime].plugin
            run = model_runner(emulated(rewritten, rounded_scales), rewritten.parent)
        return lambda inputs: written(graph, inputs, run(inputs))

    compared_with = EMULATED if emulate else COMPARED_WITH
    return compare_graph(graph, recipe.name, samples, portable, load, compared_with)


def check_proof(proof: Proof, precision: str) -> None:
    """Raise `BundleError` for the first failed case of a target's graph."""
    proof.check(f"{proof.graph} in {precision} is too far from the portable graph", TOO_FAR)


def compare_target(
    bundle: Bundle,
    manifest: TargetManifest,
    runtime: Runtime,
    progress: Progress = lambda what, done, total: None,
    samples: Mapping[str, Sequence[Sample]] | None = None,
) -> list[Proof]:
    """Compare every engine of the target opened in `runtime` with its portable graph.

    samples: inputs of every graph, None for those of `samples_of`. Raises `BundleError` for a
    target of an unknown precision, and what running the graphs raises.
    """
    precision = checked_precision(bundle, manifest)
    total = 1 + len(manifest.graphs)
    progress("recording inputs", 0, total)
    samples = samples_of(bundle, runtime.limits) if samples is None else samples
    proofs = []
    for done, name in enumerate(manifest.graphs, 1):
        progress(f"comparing {name}", done, total)
        graph = runtime.graphs[name]
        proofs.append(
            compare_graph(
                graph,
                precision,
                samples[name],
                bundle.graph_file(name),
                partial(partial, run_engine, runtime, graph),
                COMPARED_WITH if runtime.backend.plan() is None else ON_GPU,
            )
        )
    return proofs


def checked_precision(bundle: Bundle, manifest: TargetManifest) -> str:
    """Precision of a target. Raises `BundleError` for one that has no tolerance."""
    precision = manifest.recipe.get("precision", "")
    if precision not in PRECISION_TOLERANCES:
        raise BundleError(
            f"{manifest.target} does not say in which precision it was built",
            expected=" or ".join(PRECISION_TOLERANCES),
            got=precision or "nothing",
            fix=f"build it again with `{bundle.build_command(manifest.target)}`",
        )
    return precision


def compare_graph(
    graph: Graph,
    precision: str,
    samples: Sequence[Sample],
    portable: Path,
    load: Callable[[], Run],
    compared_with: str,
) -> Proof:
    """Compare the graph that `load()` opens with the `portable` file. Both return `written`
    outputs.

    The portable graph is unloaded first, since both may not fit in memory.
    """
    run = runner(portable)
    expected = [written(graph, sample.inputs, run(sample.inputs)) for sample in samples]
    del run
    run = load()
    comparisons = []
    for sample, outputs in zip(samples, expected, strict=True):
        on_gpu = compared_with == ON_GPU
        tolerance = precision_tolerance(precision, sample.recorded, on_gpu)
        comparison = compare_outputs(run(sample.inputs), outputs, tolerance)
        comparisons.append((dynamic_sizes(graph, sample.inputs), comparison))
    return Proof(graph.name, compared_with, tuple(comparisons))


def run_engine(runtime: Runtime, graph: Graph, inputs: Mapping[str, Array]) -> Arrays:
    """Run an engine; returns `written` outputs as float32. Casts `inputs` to the engine's types."""
    outputs = engine_outputs(runtime.engine(graph.name), inputs)
    before = {
        old: inputs[old].astype(element_type(graph[old].dtype)).astype(np.float32)
        for old in graph.in_place.values()
    }
    return written(graph, before, outputs)


def engine_outputs(engine: Engine, inputs: Mapping[str, Array]) -> Arrays:
    """Run an engine on `inputs`, cast to its types; returns all outputs as float32, those in place
    too."""
    graph = engine.graph
    typed = {t.name: inputs[t.name].astype(element_type(t.dtype)) for t in graph.inputs}
    # Copies: a host buffer shares memory with its array, and the engine writes into it.
    caches = {old: engine.memory.from_array(typed[old].copy()) for old in graph.in_place.values()}
    buffers = engine.run({**typed, **caches})
    buffers |= {new: caches[old] for new, old in graph.in_place.items()}
    return {tensor.name: buffers[tensor.name].read().astype(np.float32) for tensor in graph.outputs}


def written(graph: Graph, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Arrays:
    """Outputs to compare: in-place outputs (KV caches) are replaced by one array of their changes.

    One array, since each cache already depends on the others; changes only, since the unchanged
    entries would hide the error.
    """
    found = {name: value for name, value in outputs.items() if name not in graph.in_place}
    new = [outputs[name] - inputs[old] for name, old in graph.in_place.items()]
    if new:
        found[CACHES] = np.concatenate([value.reshape(-1) for value in new])
    return found


def write_receipts(
    bundle: Bundle, compared: TargetManifest, proofs: Sequence[Proof]
) -> TargetManifest:
    """Replace the receipts of the compared graphs in the target's manifest, atomically.

    compared: the manifest of the engines that were run. Returns the new manifest. Raises
    `BundleError` where the target has been rebuilt since.
    """

    def with_receipts(present: TargetManifest) -> TargetManifest:
        receipts = [_receipt(bundle, present, compared, proof) for proof in proofs]
        graphs = {proof.graph for proof in proofs}
        kept = [receipt for receipt in present.receipts if receipt.graph not in graphs]
        return present.model_copy(update={"receipts": (*kept, *receipts)})

    return rewrite_target(bundle, compared.target, with_receipts)


def _receipt(
    bundle: Bundle, present: TargetManifest, compared: TargetManifest, proof: Proof
) -> Receipt:
    sha256 = hash_of_files(present.graph_files(proof.graph))
    if sha256 != hash_of_files(compared.graph_files(proof.graph)):
        raise BundleError(
            f"{proof.graph} of {compared.target} was built again while it was compared",
            fix=f"compare the new engines with `{bundle.verify_command(compared.target)}`",
        )
    return Receipt(
        graph=proof.graph,
        target=compared.target,
        sha256=sha256,
        compared_with=proof.compared_with,
        cases=proof.cases,
    )
