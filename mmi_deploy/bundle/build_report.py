"""Build report: layers, plugin, sizes, build time and memory of every graph of a target.

Stored beside the engines as report.json, printed by `mmi build --json`, and read again to describe
a bundle's targets.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mmi_deploy.bundle.bundle import TARGET_MANIFEST, Bundle
from mmi_deploy.bundle.kernel_plan import Finding, ProfilePlan
from mmi_deploy.bundle.manifest import AnswerReceipt, TargetManifest, read_manifest
from mmi_deploy.errors import BundleError
from mmi_deploy.parity import Proof

REPORT = "report.json"
PLUGIN_LAYER = "PLUGIN_V3"

# What to leave out of a report's JSON for a reader who did not ask for kernels.
WITHOUT_PLANS = {"graphs": {"__all__": {"plans": True}}}

# Remarks of a target's report.
BUILD_ONLY = (
    "built with the build-only plugin: proves parsing and compilation, cannot run. Compile the "
    "plugin with `mmi plugins build tensorrt` and build again"
)
NOT_RUN = (
    "not run yet: `mmi verify BUNDLE --target NAME` on the GPU compares it with the portable graph"
)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GraphReport(_Model):
    """Report of one engine.

    layers: layers of the parsed network by type (ONNX targets: nodes by operator). plugin_layers:
    layers of our plugin among them. bindings: type of each input and output. seconds, peak_bytes,
    peak_private_bytes: of the build that made the engine, also when this one came from the cache;
    the peaks are resident memory above that before the build, with and without mapped weights.
    profiles: name -> letter -> [min, opt, max]. error: worst relative error of the engine's ONNX
    file against the graph that `compared_with` names. plans: final kernels of each profile.
    findings: where they break the rules of `mmi_deploy.targets.plan_rules`.
    """

    graph: str
    key: str = ""
    cached: bool = False
    layers: dict[str, int]
    plugin_layers: int = 0
    bindings: dict[str, str] = {}
    engine_bytes: int
    weights_bytes: int
    seconds: float
    peak_bytes: int = 0
    peak_private_bytes: int = 0
    profiles: dict[str, dict[str, list[int]]] = {}
    warnings: tuple[str, ...] = ()
    compared_with: str = ""
    error: float | None = None
    tolerance: float | None = None
    findings: tuple[Finding, ...] = ()
    plans: tuple[ProfilePlan, ...] = ()

    def with_proof(self, proof: Proof) -> GraphReport:
        """Copy of the report with the worst case of `proof`, a comparison of its ONNX file."""
        _, worst = proof.worst
        return self.model_copy(
            update={
                "compared_with": proof.compared_with,
                "error": worst.relative,
                "tolerance": worst.tolerance.relative,
            }
        )


class TargetReport(_Model):
    """Report of one target. remark: reason why its engines cannot be run or trusted, or ""."""

    target: str
    runtime: str
    version: str
    architecture: str | None
    precision: str
    plugin: str = ""
    remark: str = ""
    graphs: tuple[GraphReport, ...]

    @property
    def engine_bytes(self) -> int:
        return sum(graph.engine_bytes for graph in self.graphs)


class TargetSummary(_Model):
    """Summary of one target of a bundle.

    receipts: graph -> proved, failed or none. stale: built from another export of the bundle.
    report: None where the target was written without one. answers: receipts of its answers on
    benchmarks.
    """

    target: str
    precision: str
    architecture: str | None
    bytes: int
    graphs: tuple[str, ...]
    receipts: dict[str, str]
    stale: bool
    remark: str
    report: TargetReport | None
    answers: tuple[AnswerReceipt, ...] = ()


def read_report(folder: Path) -> TargetReport | None:
    """Read the report in a target's folder; None where it is missing or unreadable."""
    try:
        return TargetReport.model_validate_json((folder / REPORT).read_bytes())
    except (OSError, ValidationError):
        return None


def describe_targets(bundle: Bundle) -> list[TargetSummary]:
    """Summarise every target of `bundle`, stale and damaged ones included, without hashing."""
    identity = bundle.identity
    return [_summary(bundle.target_folder(name), name, identity) for name in bundle.targets]


def _summary(folder: Path, name: str, identity: str) -> TargetSummary:
    report = read_report(folder)
    try:
        manifest = read_manifest(folder / TARGET_MANIFEST, TargetManifest, "mmi build")
    except BundleError as error:
        return TargetSummary(
            target=name, precision="", architecture=None, bytes=0, graphs=(), receipts={},
            stale=True, remark=str(error), report=report,
        )  # fmt: skip
    receipts = {graph: _proof(manifest, graph) for graph in manifest.graphs}
    proved = all(proof == "proved" for proof in receipts.values())
    return TargetSummary(
        target=name,
        precision=manifest.recipe.get("precision", ""),
        architecture=manifest.recipe.get("architecture") or None,
        bytes=sum(entry.size for entry in manifest.files.values()),
        graphs=tuple(manifest.graphs),
        receipts=receipts,
        stale=manifest.made_for != identity,
        # The build remarks that nothing was run yet, which is no longer so once all are proved.
        remark=report.remark if report and not proved else "",
        report=report,
        answers=manifest.valid_answers,
    )


def _proof(manifest: TargetManifest, graph: str) -> str:
    receipt = manifest.receipt(graph)
    return "none" if receipt is None else "proved" if receipt.passed else "failed"
