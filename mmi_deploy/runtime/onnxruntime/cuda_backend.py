"""ONNX Runtime backend on an NVIDIA GPU: the graphs of a CUDA target, without TensorRT."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import TargetManifest, check_receipts
from mmi_deploy.errors import BundleError, ConfigError, EngineError
from mmi_deploy.runtime.device_memory import Cuda, DeviceMemory, import_cuda
from mmi_deploy.runtime.memory_plan import SHALLOW, MemoryPlan, document_bytes
from mmi_deploy.runtime.onnxruntime.cuda_engine import PROVIDER, CudaEngine
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions
from mmi_deploy.runtime.onnxruntime.module import ort
from mmi_deploy.spec.backends import BACKENDS, CUDA
from mmi_deploy.spec.graphs import Graph, Limits, graphs

log = logging.getLogger(__name__)

INSTALL = "pip uninstall --yes onnxruntime onnxruntime-gpu; pip install " + BACKENDS[CUDA].package

# Graphs that run again and again on the same addresses. Their files are written so that a run
# copies nothing from the host (`mmi_deploy.targets.cuda_rewrites`); all of them have MMFS nodes.
RECORDED = ("llm", "denoise_step", "denoise_shallow")


@dataclass
class CudaBackend:
    """Engines of one CUDA target, on one GPU. All of them stay on it.

    library: kernel library with CUDA kernels; None runs the operator's ONNX function, which copies
    between GPU and CPU, so that it cannot be recorded. record: launch repeated runs as CUDA graphs.
    """

    bundle: Bundle
    name: str
    manifest: TargetManifest
    memory: DeviceMemory
    library: Path | None = None
    threads: int = 0
    record: bool = True
    module: Any = ort

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
        cuda: Any = None,
        onnxruntime: Any = None,
    ) -> CudaBackend:
        """Open a target; parameters as in `Runtime.open`. Engines are loaded later.

        cuda, onnxruntime: modules to use in place of the real ones, in tests. Raises `MmiError`
        for a machine or an installation that cannot run it.
        """
        if resident is not None:
            raise ConfigError(
                "ONNX Runtime keeps all engines on the GPU",
                fix="leave out --resident, or build a TensorRT target, which can swap them",
            )
        # Receipts are checked apart, with a fix that writes them rather than builds the target.
        manifest = replace(bundle, unproved=True).target(name)
        if not bundle.unproved:
            folder, fix = bundle.target_folder(name), bundle.verify_command(name)
            check_receipts(manifest, manifest.graphs, folder, fix)
        module = onnxruntime or ort
        check_installation(module)
        memory = DeviceMemory(Cuda(cuda or import_cuda()), device)
        check_provider(module)
        if library is None:
            log.warning(
                "MMFS runs as standard operators on the GPU: slower, and without CUDA graphs. "
                "Compile its kernel with `mmi plugins build onnxruntime --cuda`"
            )
        return cls(
            bundle, name, manifest, memory, library and library.absolute(), threads, record, module
        )

    @property
    def limits(self) -> Limits:
        return self.bundle.limits

    @cached_property
    def graphs(self) -> dict[str, Graph]:
        """The contract in the target's element types."""
        wide = graphs(self.bundle.config, self.limits)
        return {name: graph.typed(self.manifest.activations) for name, graph in wide.items()}

    def load(self, graph: Graph) -> CudaEngine:
        """Load the engine of one graph onto the GPU. Raises `MmiError`."""
        if graph.name not in self.manifest.graphs:
            raise BundleError(
                f"{self.name} has no {graph.name}",
                fix=f"build it with `{self.bundle.build_command(self.name)}`",
            )
        library = None if graph.name in self.bundle.beyond_kernels else self.library
        recorded = graph.name in RECORDED
        return CudaEngine(
            self.bundle.target_folder(self.name) / self.manifest.graphs[graph.name],
            graph,
            OnnxOptions(self.threads, library),
            self.memory,
            record=self.record and recorded and library is not None,
            # ONNX Runtime refuses a graph that copies between GPU and CPU when graphs are enabled.
            # The function of MMFS does.
            may_copy=recorded and library is None,
            module=self.module,
        )

    def is_resident(self, graph: str) -> bool:
        return True

    def plan(self, rows: int = 1) -> MemoryPlan:
        """Estimate of GPU memory: the weights and one document of `rows` beams; ONNX Runtime's
        arena is known once the graphs have run."""
        sizes = {
            name: sum(entry.size for entry in self.manifest.graph_files(name).values())
            for name in self.manifest.graphs
            if name != SHALLOW
        }
        seen = min(self.bundle.config.image_decoder.mmfs.images_seen, self.limits.images)
        caches = document_bytes(self.graphs, self.limits, seen, rows)
        free, _ = self.memory.gpu.memory()
        return MemoryPlan(sizes, {}, caches, None, free, self.memory.gpu.name)


def check_installation(module: Any) -> None:
    """Raise `EngineError` for an installation of ONNX Runtime without CUDA, one that is too old, or
    two in one folder."""
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(both) == 2:
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed, into one folder, so that each "
            "has overwritten files of the other",
            fix=f"Install one: {INSTALL}",
        )
    if PROVIDER not in module.get_available_providers():
        raise EngineError(
            f"ONNX Runtime {module.__version__} is installed without its CUDA provider",
            fix=f"Install it with CUDA: {INSTALL}",
        )
    oldest = BACKENDS[CUDA].minimum_version
    if tuple(int(part) for part in module.__version__.split(".")[:2]) < oldest:
        raise EngineError(
            "ONNX Runtime is too old for the graphs' operators on CUDA",
            expected=".".join(map(str, oldest)),
            got=module.__version__,
            fix=f"Install a newer one: {INSTALL}",
        )


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def check_provider(module: Any) -> None:
    """Load the libraries that the CUDA provider uses, of their pip packages if they are installed.
    Raises `EngineError` for one that is missing: ONNX Runtime itself would only run on the CPU."""
    module.preload_dlls()
    major = module.cuda_version.partition(".")[0]
    for library in (f"libcudart.so.{major}", f"libcublas.so.{major}", "libcudnn.so.9"):
        try:
            ctypes.CDLL(library)
        except OSError as error:
            raise EngineError(
                f"ONNX Runtime's CUDA provider lacks a library: {error}",
                fix=f"Install CUDA {major} and cuDNN 9: pip install {BACKENDS[CUDA].package}",
            ) from None
