"""ONNX Runtime backend on the CPU: the portable graphs, or those of a target."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import PORTABLE
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.runtime.buffers import HOST, Memory
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions, OnnxRuntimeEngine
from mmi_deploy.spec.backends import BACKENDS, CPU
from mmi_deploy.spec.graphs import GRAPHS, Graph, Limits, graphs


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """Engines of one CPU target.

    files: graph -> ONNX file. library: kernel library; None runs the operator's ONNX function.
    threads: CPU threads; 0 lets ONNX Runtime choose.
    """

    bundle: Bundle
    files: dict[str, Path]
    library: Path | None = None
    threads: int = 0
    memory: Memory = HOST

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        target: str,
        *,
        library: Path | None = None,
        threads: int = 0,
        device: int = 0,
        resident: Collection[str] | None = None,
    ) -> OnnxRuntimeBackend:
        """Open a target; parameters as in `Runtime.open`. Raises `ConfigError` for `resident`: on
        the CPU all engines stay in memory."""
        if resident is not None:
            raise ConfigError("on the CPU all engines stay in memory", fix="leave out --resident")
        return cls(bundle, graph_files(bundle, target), library and library.absolute(), threads)

    @property
    def limits(self) -> Limits:
        return self.bundle.limits

    @cached_property
    def graphs(self) -> dict[str, Graph]:
        return graphs(self.bundle.config, self.limits)

    def load(self, graph: Graph) -> OnnxRuntimeEngine:
        """Load the engine of one graph. Raises `EngineError`."""
        path = self.files[graph.name]
        if path.suffix != BACKENDS[CPU].engine_suffix:
            raise EngineError(f"{path} is not an ONNX file, and this backend runs on the CPU")
        # Outside the kernels' limits the ONNX function inside the file runs, as for its receipt.
        library = None if graph.name in self.bundle.beyond_kernels else self.library
        return OnnxRuntimeEngine(path, graph, OnnxOptions(self.threads, library))

    def is_resident(self, graph: str) -> bool:
        return True

    def plan(self, rows: int = 1) -> None:
        return None


def graph_files(bundle: Bundle, target: str) -> dict[str, Path]:
    """File of every graph: that of `target` where it has one, the portable one otherwise."""
    files = {make.__name__: bundle.graph_file(make.__name__) for make in GRAPHS}
    if target == PORTABLE or (target == CPU and target not in bundle.targets):
        return files
    folder = bundle.target_folder(target)
    return files | {name: folder / file for name, file in bundle.target(target).graphs.items()}
