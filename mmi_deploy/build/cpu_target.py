"""The targets of ONNX Runtime on a CPU: rewritten graphs, each with a receipt."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx

from mmi_deploy.build.evidence import Evidence
from mmi_deploy.build.precision import Recipe, rewrite
from mmi_deploy.build.report import REPORT, GraphReport, TargetReport, weight_bytes
from mmi_deploy.build.target import CPU, Target
from mmi_deploy.bundle import Bundle, tool_versions, write_target
from mmi_deploy.files import write_file

SUFFIX = ".onnx"
UNPROVED = "built without receipts: the runtime takes it with --unproved alone"

Watch = Callable[[str, int, int, str], None]
"""Called with (what is done, graphs done, graphs in all, "")."""


def build_cpu(
    bundle: Bundle,
    recipe: Recipe,
    graphs: Sequence[str],
    evidence: Evidence | None,
    watch: Watch,
) -> TargetReport:
    """Write the target of `recipe` into the bundle, whole or not at all. evidence: None leaves the
    graphs without receipts. Raises what `rewrite` and `Evidence.prove` raise."""
    target = Target(CPU, None, recipe.name)
    version = tool_versions().get("onnxruntime", "")
    about = {"runtime": CPU, "architecture": "", "precision": recipe.name, "onnxruntime": version}
    made: list[GraphReport] = []
    with write_target(bundle, target.name, about, recipe.activations_on(CPU)) as writer:
        for index, name in enumerate(graphs):
            watch(f"{name} in {recipe.name}", index, len(graphs), "")
            started = time.monotonic()
            path = writer.engine_file(name, SUFFIX)
            source = bundle.graph_file(name)
            ranges = evidence.ranges(name, recipe, CPU) if evidence else None
            rewrite(recipe, bundle.graphs[name], source, path, runtime=CPU, ranges=ranges)
            report = _report(name, path, time.monotonic() - started)
            if evidence is not None:
                proof = evidence.prove(name, recipe, CPU, path)
                writer.add_receipt(name, proof.compared_with, proof.cases)
                report = report.with_proof(proof.compared_with, proof.cases)
            made.append(report)
        found = TargetReport(
            target=target.name,
            runtime=CPU,
            version=version,
            architecture=None,
            precision=recipe.name,
            remark="" if evidence else UNPROVED,
            graphs=tuple(made),
        )
        write_file(writer.folder / REPORT, found.model_dump_json(indent=2) + "\n")
    return found


def _report(name: str, path: Path, seconds: float) -> GraphReport:
    model = onnx.load(path, load_external_data=False)
    operators = Counter(node.op_type for node in model.graph.node)
    weights = weight_bytes(path)
    return GraphReport(
        graph=name,
        layers=dict(operators.most_common()),
        engine_bytes=weights + path.stat().st_size,
        weights_bytes=weights,
        seconds=round(seconds, 2),
    )
