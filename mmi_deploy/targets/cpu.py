"""Build CPU targets: graphs with quantised weights for ONNX Runtime."""

from __future__ import annotations

import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import onnx

from mmi_deploy.bundle.build_report import REPORT, GraphReport, TargetReport
from mmi_deploy.bundle.bundle import Bundle, write_target
from mmi_deploy.bundle.manifest import belongs
from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.backends import CPU
from mmi_deploy.spec.target import Target
from mmi_deploy.system.files import write_file
from mmi_deploy.system.memory import free_memory
from mmi_deploy.system.progress import Progress, silent
from mmi_deploy.targets.calibration import check_can_run, moments_of, needs_moments
from mmi_deploy.targets.precision.recipes import RECIPES, Recipe, check_possible
from mmi_deploy.targets.precision.rewrite import rewrite
from mmi_deploy.targets.sample_inputs import Sample, samples_of
from mmi_deploy.targets.verify_target import check_proof, prove


def build_cpu_target(
    bundle: Bundle,
    recipe: Recipe,
    progress: Progress = silent,
    *,
    unproved: bool = False,
    force: bool = False,
) -> TargetReport:
    """Write `engines/cpu-<recipe>` of `bundle`: the graphs that the recipe changes, with receipts.

    The runtime takes the portable file for every other graph. unproved: skip the comparison and its
    receipt. force: compare even where memory looks too small. Raises `ConfigError` for a recipe
    without a CPU form, `EngineError` where memory is too small to run the bundle, `BundleError`
    where the error exceeds the tolerance of the recipe. The target is not written then.
    """
    check_possible(recipe, CPU, None)
    names = [name for name in bundle.graphs if name in recipe.weights]
    if not names:
        useful = [r.name for r in RECIPES.values() if r.weights and r.on_cpu]
        raise ConfigError(
            f"precision {recipe.name} changes no graph on the CPU",
            fix=f"choose --precision {' or '.join(useful)}",
        )
    target = Target(CPU, None, recipe.name)
    total, reports = 1 + 2 * len(names), []
    samples: dict[str, list[Sample]] = {}
    if not unproved:
        if not force:
            check_can_run(bundle, free_memory())
        progress("recording inputs", 0, total)
        samples = samples_of(bundle)
    manifest = {"runtime": CPU, "precision": recipe.name, "recipe": repr(recipe.weights)}
    with write_target(bundle, target.name, manifest) as writer:
        for index, name in enumerate(names):
            graph, started = bundle.graphs[name], time.perf_counter()
            progress(f"writing {name} in {recipe.name}", 1 + 2 * index, total)
            out = writer.engine_file(name, ".onnx")
            moments = None
            if needs_moments(name, recipe) and not unproved:
                moments = moments_of(bundle, name, samples[name])
            rewrite(recipe, graph, bundle.graph_file(name), out, runtime=CPU, moments=moments)
            proof = None
            if not unproved:
                progress(f"proving {name} in {recipe.name}", 2 + 2 * index, total)
                portable = bundle.graph_file(name)
                proof = prove(recipe, graph, portable, out, CPU, samples[name])
                check_proof(proof, recipe.name)
                writer.add_receipt(name, proof.compared_with, proof.cases)
            one = graph_report(writer.folder, name, out, started)
            if proof is not None:
                one = one.with_proof(proof)
            reports.append(one)
        report = TargetReport(
            target=target.name,
            runtime=CPU,
            version=version("onnxruntime"),
            architecture=None,
            precision=recipe.name,
            graphs=tuple(reports),
        )
        write_file(writer.folder / REPORT, report.model_dump_json(indent=2) + "\n")
    return report


def graph_report(folder: Path, graph: str, file: Path, started: float) -> GraphReport:
    """Report of a graph whose ONNX file and weights were written to `folder`. started:
    `time.perf_counter` at the start of its build."""
    files = [path for path in folder.iterdir() if belongs(path.name, file.name)]
    total_bytes = sum(path.stat().st_size for path in files)
    nodes = onnx.load(file, load_external_data=False).graph.node
    return GraphReport(
        graph=graph,
        layers=dict(Counter(node.op_type for node in nodes)),
        engine_bytes=total_bytes,
        weights_bytes=total_bytes - file.stat().st_size,
        seconds=round(time.perf_counter() - started, 2),
    )
