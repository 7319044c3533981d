"""Build the engines of one or more TensorRT targets from a bundle's portable graphs.

For each graph: the recipe's ONNX, written once for all architectures; TensorRT's own copy of it;
one engine per architecture from the cache. At the end each target's folder is replaced atomically.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import onnx

from mmi_deploy.bundle.build_report import (
    BUILD_ONLY,
    NOT_RUN,
    PLUGIN_LAYER,
    REPORT,
    GraphReport,
    TargetReport,
    read_report,
)
from mmi_deploy.bundle.bundle import TARGET_MANIFEST, Bundle, check_target, write_target
from mmi_deploy.bundle.manifest import TargetManifest, read_manifest, sha256_of
from mmi_deploy.errors import BundleError, ConfigError, EngineError
from mmi_deploy.parity import Proof
from mmi_deploy.spec.backends import BACKENDS
from mmi_deploy.spec.graphs import Graph
from mmi_deploy.spec.target import Target
from mmi_deploy.system.files import write_file
from mmi_deploy.system.nvidia_driver import gpus_here
from mmi_deploy.system.progress import Progress, Unit
from mmi_deploy.system.temporary_folder import temporary_folder
from mmi_deploy.targets.cache import EngineCache, link_or_copy
from mmi_deploy.targets.plan_rules import check_plans, facts_of, refuse_fatal
from mmi_deploy.targets.precision import rewrite
from mmi_deploy.targets.precision.recipes import FLOAT32
from mmi_deploy.targets.tensorrt_build import Job
from mmi_deploy.targets.tensorrt_plan import (
    EnginePlan,
    Request,
    graph_of,
    plan_engines,
    weight_bytes,
)
from mmi_deploy.targets.tensorrt_process import MeasuredBuild, build_in_process
from mmi_deploy.targets.tensorrt_rewrites import rewrite_for_tensorrt
from mmi_deploy.targets.timing_cache import timing_file

# Contract of the typed graph, its ONNX file, and the comparison with the portable graph.
_Prepared = tuple[Graph, Path, Proof | None]

Build = Callable[[Job, Progress], MeasuredBuild]


def build_targets(
    request: Request, cache: EngineCache, progress: Progress, build: Build = build_in_process
) -> list[TargetReport]:
    """Build all engines of `request` and write its targets into the bundle.

    When a build fails, finished engines stay in the cache, so a second call continues from there.
    Raises `EngineError`, `BundleError` or `OSError`; the bundle's targets are unchanged then.
    """
    for target in request.targets:
        check_target(request.bundle, target.name)
    plans = plan_engines(request)
    engines = request.bundle.folder / "engines"
    engines.mkdir(exist_ok=True)
    with temporary_folder(engines, ".build-") as work:
        builder = _EngineBuilder(request, cache, work, progress, build, len(plans))
        made = [(plan, builder.engine(plan)) for plan in plans]
        return [
            _write(request, target, [m for m in made if m[0].target == target], work)
            for target in request.targets
        ]


class _EngineBuilder:
    """Builds engines one after another; the plans of one graph share its rewritten ONNX."""

    def __init__(
        self,
        request: Request,
        cache: EngineCache,
        work: Path,
        progress: Progress,
        build: Build,
        of: int,
    ) -> None:
        self._request, self._cache, self._work = request, cache, work
        self._progress, self._build = progress, build
        self._done, self._of, self._built = 0, of, False
        self._prepared: _Prepared | None = None

    def engine(self, plan: EnginePlan) -> GraphReport:
        """Build the engine of `plan`, or take it from the cache, in the work folder of its
        target."""
        label = f"{plan.graph} for {plan.target.architecture}"
        stage = self._work / plan.target.name
        stage.mkdir(exist_ok=True)
        self._built = False
        self._cache.obtain(
            plan.key,
            lambda folder: self._make(plan, label, folder),
            stage,
            key_parts=plan.key_parts,
            rebuild=self._request.force,
            on_wait=lambda: self._say(f"waiting for another build of {label}"),
        )
        if not self._built:
            self._say(f"{label}: cached")
        self._done += 1
        report = GraphReport.model_validate_json((stage / _report_name(plan.graph)).read_bytes())
        if not self._request.force:
            refuse_fatal(plan.graph, plan.target.runtime, report.findings)
        return report.model_copy(update={"cached": not self._built})

    def _say(self, what: str, phase: str = "") -> None:
        self._progress(what, self._done, self._of, detail=phase)

    def _make(self, plan: EnginePlan, label: str, folder: Path) -> None:
        if not self._request.force and _reuse(self._request.bundle, plan, folder):
            return
        self._built = True
        typed, source, proof = self._onnx(plan)
        self._say(label)
        job = Job(
            plan.graph,
            plan.target.runtime,
            str(plan.target.architecture),
            source,
            folder / _engine_name(plan),
            plan.profiles,
            self._request.plugin,
            self._request.device,
            _timing_file(plan.target.runtime, self._request),
        )

        def phases(
            what: str, done: int = 0, total: int = 0, *, detail: str = "", unit: Unit = "steps"
        ) -> None:
            self._say(label, f"{what} {done}/{total}")

        measured = self._build(job, phases)
        check_bindings(typed, measured.built.bindings)
        half = self._request.recipe.activations_on(plan.target.runtime) != FLOAT32
        facts = facts_of(onnx.load(source, load_external_data=False))
        findings = check_plans(measured.built.plans, facts, half)
        report = _graph_report(plan, measured, weight_bytes(source))
        report = report.model_copy(update={"findings": findings})
        if proof is not None:
            report = report.with_proof(proof)
        write_file(folder / _report_name(plan.graph), report.model_dump_json(indent=2) + "\n")

    def _onnx(self, plan: EnginePlan) -> _Prepared:
        """TensorRT's ONNX of a graph. Only the latest graph's file is kept, to save disk space."""
        if self._prepared is None or self._prepared[0].name != plan.graph:
            if self._prepared is not None:
                _remove(self._prepared[1])
            self._prepared = self._prepare(plan)
        return self._prepared

    def _prepare(self, plan: EnginePlan) -> _Prepared:
        request, path = self._request, self._work / f"{plan.graph}.onnx"
        self._say(f"writing {plan.graph} in {plan.target.precision}")
        typed = rewrite(
            request.recipe,
            graph_of(request.bundle, plan.graph),
            request.bundle.graph_file(plan.graph),
            path,
            runtime=plan.target.runtime,
            ranges=(request.ranges or {}).get(plan.graph),
            moments=(request.moments or {}).get(plan.graph),
        )
        proof = None
        if request.calibration is not None:
            self._say(f"proving {plan.graph} in {plan.target.precision}")
            proof = request.calibration.prove(plan.graph, request.recipe, plan.target.runtime, path)
        model = onnx.load(path, load_external_data=False)
        if request.own_products and request.plugin.products is not None:
            self._say(f"packing weights of {plan.graph}")
            model = request.plugin.products(model, path)
            _check_all_packed(request, model)
        onnx.save(rewrite_for_tensorrt(request.plugin.copy(model), path), path)
        return typed, path, proof


def _check_all_packed(request: Request, model: onnx.ModelProto) -> None:
    """Raise `ConfigError` where a product was left to TensorRT that it computes well in batches
    alone, and the engine is for fewer rows."""
    rows, least = (request.limits or request.bundle.limits).batch, request.recipe.min_batch
    left = [node.name for node in model.graph.node if node.op_type == "DequantizeLinear"]
    if left and rows < least:
        raise ConfigError(
            f"precision {request.recipe.name} cannot be built for {rows} row: our plugin does not "
            f"take the weight of {left[0]}, which TensorRT would write dequantised at every token",
            expected="input channels that are a multiple of 32",
            fix=f"Give --rows {least}, or choose --precision fp16",
        )


def _timing_file(runtime: str, request: Request) -> Path | None:
    """File of the timing cache; None for a runtime that measures nothing while it builds."""
    if BACKENDS[runtime].cross_compiles:
        return None
    gpus = [gpu.name for gpu in gpus_here() if gpu.index == request.device]
    return timing_file(runtime, request.tensorrt, gpus[0]) if gpus else None


def check_bindings(typed: Graph, bindings: Mapping[str, str]) -> None:
    """Raise `EngineError` unless an engine's inputs and outputs match the target's contract."""
    names = {"float32": "float", "float16": "half", "bfloat16": "bf16"}
    expected = {tensor.name: tensor.dtype for tensor in (*typed.inputs, *typed.outputs)}
    for name, dtype in expected.items():
        if bindings.get(name) not in (dtype, names.get(dtype, dtype)):
            raise EngineError(
                f"the engine of {typed.name} has another {name} than its contract",
                expected=dtype,
                got=bindings.get(name, "none"),
            )
    if extra := set(bindings) - set(expected):
        raise EngineError(f"the engine of {typed.name} has an extra tensor", got=min(extra))


def _graph_report(plan: EnginePlan, measured: MeasuredBuild, weights: int) -> GraphReport:
    built = measured.built
    return GraphReport(
        graph=plan.graph,
        key=plan.key,
        layers=dict(built.layers),
        plugin_layers=built.layers.get(PLUGIN_LAYER, 0),
        bindings=dict(built.bindings),
        engine_bytes=built.engine_bytes,
        weights_bytes=weights,
        seconds=round(measured.seconds, 2),
        peak_bytes=measured.memory.added,
        peak_private_bytes=measured.memory.private_added,
        profiles={profile.name: profile.record() for profile in plan.profiles},
        warnings=built.warnings,
        plans=built.plans,
    )


def _reuse(bundle: Bundle, plan: EnginePlan, folder: Path) -> bool:
    """Link the engine from the bundle's own target, if it was built under the same key."""
    there = bundle.target_folder(plan.target.name)
    found = read_report(there)
    same = [graph for graph in found.graphs if graph.key == plan.key] if found else []
    if not same:
        return False
    with suppress(BundleError, OSError, KeyError):
        manifest = read_manifest(there / TARGET_MANIFEST, TargetManifest, "mmi build")
        name = manifest.graphs[plan.graph]
        if sha256_of(there / name) == manifest.files[name].sha256:
            link_or_copy(there / name, folder / _engine_name(plan))
            write_file(folder / _report_name(plan.graph), same[0].model_dump_json(indent=2) + "\n")
            return True
    return False


def _write(
    request: Request, target: Target, made: Sequence[tuple[EnginePlan, GraphReport]], work: Path
) -> TargetReport:
    """Write the folder of one target: the engines of this build, and up-to-date engines of graphs
    that this build leaves out."""
    stage = work / target.name
    kept = _keep(request, target, {plan.graph for plan, _ in made}, stage)
    made = sorted([*made, *kept], key=lambda one: list(request.bundle.graphs).index(one[0].graph))
    shared = ("runtime", "tensorrt", "architecture", "precision", "recipe", "plugin", "flags")
    recipe = {name: made[0][0].key_parts[name] for name in shared}
    recipe |= {f"key.{plan.graph}": plan.key for plan, _ in made}
    report = TargetReport(
        target=target.name,
        runtime=target.runtime,
        version=request.tensorrt,
        architecture=target.architecture,
        precision=target.precision,
        plugin=request.plugin.identity,
        remark=BUILD_ONLY if request.plugin.build_only else NOT_RUN,
        graphs=tuple(graph for _, graph in made),
    )
    activations = request.recipe.activations_on(target.runtime)
    with write_target(request.bundle, target.name, recipe, activations) as writer:
        for plan, _ in made:
            engine = stage / _engine_name(plan)
            engine.rename(writer.engine_file(plan.graph, engine.suffix))
        write_file(writer.folder / REPORT, report.model_dump_json(indent=2) + "\n")
    return report


def _keep(
    request: Request, target: Target, made: set[str], stage: Path
) -> list[tuple[EnginePlan, GraphReport]]:
    others = tuple(name for name in request.bundle.graphs if name not in made)
    rest = replace(request, targets=(target,), graphs=others, force=False)
    kept = []
    for plan in plan_engines(rest):
        if _reuse(request.bundle, plan, stage):
            path = stage / _report_name(plan.graph)
            report = GraphReport.model_validate_json(path.read_bytes())
            kept.append((plan, report.model_copy(update={"cached": True})))
    return kept


def _report_name(graph: str) -> str:
    return f"{graph}.json"


def _remove(source: Path) -> None:
    for path in source.parent.glob(f"{source.stem}.*"):
        if path.is_file():
            path.unlink()


def _engine_name(plan: EnginePlan) -> str:
    return f"{plan.graph}{BACKENDS[plan.target.runtime].engine_suffix}"
