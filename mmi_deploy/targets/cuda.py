"""Build CUDA targets: graphs of one precision for ONNX Runtime's CUDA provider."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx

from mmi_deploy.bundle.build_report import NOT_RUN, REPORT, TargetReport
from mmi_deploy.bundle.bundle import Bundle, write_target
from mmi_deploy.runtime.onnxruntime.cuda_backend import RECORDED
from mmi_deploy.spec.backends import CUDA
from mmi_deploy.spec.target import Target
from mmi_deploy.system.files import write_file
from mmi_deploy.system.progress import Progress, silent
from mmi_deploy.targets.calibration import Calibration
from mmi_deploy.targets.cpu import graph_report
from mmi_deploy.targets.cuda_rewrites import rewrite_for_cuda
from mmi_deploy.targets.placement import check_placement, registry
from mmi_deploy.targets.precision.recipes import Recipe, check_possible
from mmi_deploy.targets.precision.rewrite import check_model, rewrite


def build_cuda_target(
    bundle: Bundle,
    recipe: Recipe,
    calibration: Calibration | None,
    progress: Progress = silent,
) -> TargetReport:
    """Write `engines/cuda-<recipe>` of `bundle`: every graph in the recipe's types.

    calibration: measures ranges and compares each graph with the portable one; None skips both, and
    takes the ranges of no earlier build. The target has no receipts: `mmi verify --target` writes
    them on the GPU. Raises `ConfigError` for a recipe that the provider cannot run, `BundleError`
    for a node that it has no kernel for, or an error beyond the recipe's tolerance. The target is
    not written then.
    """
    check_possible(recipe, CUDA, None)
    target = Target(CUDA, None, recipe.name)
    activations = recipe.activations_on(CUDA)
    about = {
        "runtime": CUDA,
        "precision": recipe.name,
        "recipe": repr(recipe.weights),
        "kernels": f"onnxruntime-gpu {registry()['version']}",
    }
    reports, total = [], len(bundle.graphs)
    with write_target(bundle, target.name, about, activations) as writer:
        for done, (name, graph) in enumerate(bundle.graphs.items()):
            started = time.perf_counter()
            progress(f"writing {name} in {recipe.name}", done, total)
            ranges = moments = None
            if calibration is not None:
                ranges = calibration.ranges(name, recipe, CUDA)
                moments = calibration.moments(name, recipe)
            out = writer.engine_file(name, ".onnx")
            portable = bundle.graph_file(name)
            rewrite(recipe, graph, portable, out, runtime=CUDA, ranges=ranges, moments=moments)
            _prepare(out, name)
            report = graph_report(writer.folder, name, out, started)
            if calibration is not None:
                proof = calibration.prove(name, recipe, CUDA, out)
                report = report.with_proof(proof)
            reports.append(report)
        made = TargetReport(
            target=target.name,
            runtime=CUDA,
            version=_version(),
            architecture=None,
            precision=recipe.name,
            remark=NOT_RUN,
            graphs=tuple(reports),
        )
        write_file(writer.folder / REPORT, made.model_dump_json(indent=2) + "\n")
    return made


def _prepare(file: Path, name: str) -> None:
    """Rewrite a file for the CUDA provider, and check that the provider has its operators."""
    model = typed(onnx.load(file, load_external_data=False))
    rewrite_for_cuda(model, name in RECORDED)
    model = typed(model)
    check_placement(model, name)
    check_model(model)
    onnx.save(model, file)


def typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Infer the types of all values of `model`."""
    return onnx.shape_inference.infer_shapes(model)


def _version() -> str:
    """Version of ONNX Runtime that proved the target: either package has it."""
    for package in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""
