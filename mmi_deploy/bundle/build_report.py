"""What a build tells: per graph the layers, the plugin, sizes, time and memory; kept beside the
engines as report.json, printed by `mmi build --json`, and read again to describe a bundle's
targets."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mmi_deploy.bundle.bundle import TARGET_MANIFEST, Bundle
from mmi_deploy.bundle.manifest import TargetManifest, read_manifest
from mmi_deploy.errors import BundleError
from mmi_deploy.parity import Proof

REPORT = "report.json"
PLUGIN_LAYER = "PLUGIN_V3"
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
    """One engine. layers: of the parsed network by type (nodes by operator in an ONNX target).
    plugin_layers: those of our plugin. bindings: type of each input and output. seconds and the
    bytes of memory are those of the build, also when the engine now came out of the cache:
    peak_bytes with mapped weights, peak_private_bytes without, both above the process before it.
    profiles: name -> letter -> min, opt, max. error: the worst of comparing the ONNX
    file that it was made from with the portable graph, as compared_with says."""

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

    def with_proof(self, proof: Proof) -> GraphReport:
        """With the worst case of a comparison of its ONNX file."""
        _, worst = proof.worst
        return self.model_copy(
            update={
                "compared_with": proof.compared_with,
                "error": worst.relative,
                "tolerance": worst.tolerance.relative,
            }
        )


class TargetReport(_Model):
    """One target. remark: what keeps its engines from being run or trusted, if anything."""

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
    """What a bundle says of one of its targets. receipts: graph -> proved, failed or none. stale:
    built from another export. report: None where the target was made without one."""

    target: str
    precision: str
    architecture: str | None
    bytes: int
    graphs: tuple[str, ...]
    receipts: dict[str, str]
    stale: bool
    remark: str
    report: TargetReport | None


def read_report(folder: Path) -> TargetReport | None:
    """The report in a target's folder; None where there is none that can be read."""
    try:
        return TargetReport.model_validate_json((folder / REPORT).read_bytes())
    except (OSError, ValidationError):
        return None


def describe_targets(bundle: Bundle) -> list[TargetSummary]:
    """Every target of `bundle`, the stale and damaged ones included. Files are not hashed."""
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
        # The build's remark is that nothing was run yet, which receipts end.
        remark=report.remark if report and not proved else "",
        report=report,
    )


def _proof(manifest: TargetManifest, graph: str) -> str:
    receipt = manifest.receipt(graph)
    return "none" if receipt is None else "proved" if receipt.passed else "failed"
