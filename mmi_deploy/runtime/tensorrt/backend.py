"""TensorRT backend: the engines of one target of a bundle, on one GPU.

Incompatibilities are errors here, before anything is loaded: another GPU, TensorRT version or
plugin, or too little memory.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmi_deploy.bundle.build_report import read_report
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import TargetManifest, check_receipts, sha256_of
from mmi_deploy.errors import BundleError, EngineError
from mmi_deploy.runtime.device_memory import Cuda, DeviceMemory, import_cuda
from mmi_deploy.runtime.memory_plan import SHALLOW, MemoryPlan, document_bytes
from mmi_deploy.runtime.tensorrt.engine import (
    GROUPS,
    Residency,
    TensorRtEngine,
    Workspace,
    contexts_bytes,
    group_of,
)
from mmi_deploy.runtime.tensorrt.module import TensorRt, import_tensorrt
from mmi_deploy.runtime.tensorrt.versions import check_versions, installed_versions
from mmi_deploy.spec.backends import ARCHITECTURES, BACKENDS, backend_of
from mmi_deploy.spec.graphs import Graph, Limits, graphs
from mmi_deploy.system.files import cache_folder

# Prefix of the plugin's identity in a target whose engines were built with the build-only plugin.
BUILD_ONLY = "build-only"
_BUILD_ONLY_IDENTITIES = (BUILD_ONLY, "stand-in")  # the latter: in targets of earlier versions

# The same prefix of a target whose engines contain the plugin's kernels, and so load no library.
AHEAD_OF_TIME = "ahead-of-time"


@dataclass
class TensorRtBackend:
    """Engines of one TensorRT target, on one GPU. record: launch repeated runs as CUDA graphs."""

    bundle: Bundle
    name: str
    manifest: TargetManifest
    limits: Limits
    tensorrt: TensorRt
    memory: DeviceMemory
    residency: Residency
    workspace: Workspace
    record: bool = True

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        name: str,
        *,
        library: Path | None = None,
        threads: int = 0,
        device: int = 0,
        resident: Collection[str] | None = None,
        record: bool = True,
        cache: Path | None = None,
        cuda: Any = None,
        tensorrt: Any = None,
    ) -> TensorRtBackend:
        """Open a target, check its compatibility, and load the plugin; engines are loaded later.

        library: plugin library, for engines that need it. threads: not used. device: index of the
        GPU. resident: engine groups that stay on the GPU (`GROUPS`); None for all. record: launch
        repeated runs as CUDA graphs. cache: folder of RTX's compiled kernels, by default in the
        user's cache folder. cuda, tensorrt: modules to use in place of the real ones, in tests.
        Raises `MmiError` for an incompatible target.
        """
        plugin, runtime = library and library.absolute(), backend_of(name).name
        # Receipts are checked apart, with a fix that writes them rather than builds the target.
        manifest = replace(bundle, unproved=True).target(name)
        if not bundle.unproved:
            folder, fix = bundle.target_folder(name), bundle.verify_command(name)
            check_receipts(manifest, manifest.graphs, folder, fix)
        residency = Residency(resident)
        bindings = cuda or import_cuda()
        check_versions(runtime, installed_versions(runtime, bindings))
        memory = DeviceMemory(Cuda(bindings), device)
        module = tensorrt or import_tensorrt(BACKENDS[runtime].module)
        check_compatible(bundle, manifest, memory.gpu, module.__version__, plugin)
        built_with = manifest.recipe.get("plugin", AHEAD_OF_TIME)
        needed = None if built_with.startswith(AHEAD_OF_TIME) else plugin
        return cls(
            bundle,
            name,
            manifest,
            _limits(bundle, name),
            TensorRt(module, runtime, needed, cache or cache_folder() / "tensorrt-rtx"),
            memory,
            residency,
            Workspace(memory),
            record,
        )

    @property
    def graphs(self) -> dict[str, Graph]:
        """The contract at the target's own limits and element types."""
        wide = graphs(self.bundle.config, self.limits)
        return {name: graph.typed(self.manifest.activations) for name, graph in wide.items()}

    def load(self, graph: Graph) -> TensorRtEngine:
        """Load the engine of one graph onto the GPU. Raises `MmiError`."""
        fix = self.bundle.build_command(self.name)
        if graph.name not in self.manifest.graphs:
            raise BundleError(
                f"{self.name} has no engine of {graph.name}",
                fix=f"build it with `{fix} --graph {graph.name}`",
            )
        file = self.manifest.graphs[graph.name]
        return TensorRtEngine(
            self.bundle.target_folder(self.name) / file,
            graph,
            self.tensorrt,
            self.memory,
            self.workspace,
            fix=fix,
            residency=self.residency,
            cache_name=f"{graph.name}-{self.manifest.files[file].sha256[:16]}",
            record=self.record,
        )

    def is_resident(self, graph: str) -> bool:
        """True if the engine of `graph` stays on the GPU."""
        return self.residency.is_resident(graph)

    def plan(self, rows: int = 1) -> MemoryPlan:
        """Estimate of GPU memory with one document of `rows` beams, as far as it is known before
        the engines are loaded."""
        needed = {name: file for name, file in self.manifest.graphs.items() if name != SHALLOW}
        sizes = {name: self.manifest.files[file].size for name, file in needed.items()}
        resident = {name: size for name, size in sizes.items() if self.residency.is_resident(name)}
        swapped: dict[str, int] = {}
        for name in sizes.keys() - resident.keys():
            swapped[group_of(name)] = swapped.get(group_of(name), 0) + sizes[name]
        config, graphs = self.bundle.config, self.graphs
        seen = min(config.image_decoder.mmfs.images_seen, self.limits.images)
        free, total = self.memory.gpu.memory()
        return MemoryPlan(
            resident,
            {group: swapped[group] for group in GROUPS if group in swapped},
            document_bytes(graphs, self.limits, seen, rows),
            self.workspace.bound or None,
            free,
            self.memory.gpu.name,
            total,
            sum(
                contexts_bytes(graphs[name], self.limits.images, self.limits.batch)
                for name in sizes
            ),
            self.bundle.build_command(self.name),
        )


def check_compatible(
    bundle: Bundle, manifest: TargetManifest, gpu: Any, version: str, plugin: Path | None
) -> None:
    """Raise `EngineError` for engines built for another GPU, TensorRT version or plugin."""
    recipe, name = manifest.recipe, manifest.target
    wanted = recipe.get("architecture", gpu.architecture)
    if wanted != gpu.architecture:
        gpus = ARCHITECTURES.get(wanted)
        build = f"build for it: `{bundle.build_command(name.replace(wanted, gpu.architecture))}`"
        other = gpu.find_other(wanted)
        raise EngineError(
            f"{name} was built for another GPU",
            expected=f"{wanted} ({gpus})" if gpus else wanted,
            got=f"{gpu.architecture} ({gpu.name})",
            fix=build
            if other is None
            else f"choose the GPU that it was built for: --device {other}",
        )
    fix = bundle.build_command(name)
    if recipe.get("tensorrt", version) != version:
        raise EngineError(
            f"{name} was built with another version of {backend_of(name).name}",
            expected=recipe["tensorrt"],
            got=version,
            fix=f"build it again with `{fix}`, or install the expected version",
        )
    built_with = recipe.get("plugin", "")
    if built_with.startswith(AHEAD_OF_TIME):
        return
    if built_with.startswith(_BUILD_ONLY_IDENTITIES):
        raise EngineError(
            f"{name} was built with the build-only plugin, and its engines cannot run",
            fix=f"compile the plugin with `mmi plugins build tensorrt`, then run `{fix}`",
        )
    if built_with and plugin is None:
        raise EngineError(
            f"{name} needs our TensorRT plugin, which was not found",
            expected=built_with,
            fix="compile it with `mmi plugins build tensorrt`, or give it with --kernels FILE",
        )
    if built_with and plugin is not None and plugin.is_file():
        given = f"{plugin.name}:{sha256_of(plugin)[:16]}"
        if given.rpartition(":")[2] != built_with.rpartition(":")[2]:
            raise EngineError(
                f"{name} was built with another plugin",
                expected=built_with,
                got=given,
                fix=f"give that plugin with --kernels FILE, or build the target again with `{fix}`",
            )


def _limits(bundle: Bundle, target: str) -> Limits:
    """Limits of the bundle, reduced to the profiles that the target's engines were built for."""
    limits, report = bundle.limits, read_report(bundle.target_folder(target))
    for graph in report.graphs if report else ():
        for profile in graph.profiles.values():
            most = {letter: ends[-1] for letter, ends in profile.items()}
            batch = most.get("b") or most.get("n") or limits.batch
            limits = replace(limits, batch=min(limits.batch, batch))
            if graph.graph == "llm":
                images, pool = min(limits.images, most["m"]), min(limits.pool, most["n"])
                limits = replace(limits, images=min(images, pool), pool=pool)
    return limits
