"""Backend: the engines of one target of a bundle, and the device that they run on.

`open_backend` looks up the class in `mmi_deploy.spec.backends` and the kernel library by an entry
point. Both are imported at first use, so a machine installs only the packages of its backend.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import PORTABLE
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.buffers import HOST, Memory
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.memory_plan import MemoryPlan
from mmi_deploy.spec.backends import AUTO, CPU, NONE, backend_of
from mmi_deploy.spec.graphs import Graph, Limits
from mmi_deploy.system.entry_points import load

# Entry point of the function (backend, kernels) -> path of the kernel library, or None.
KERNEL_LIBRARY = "mmi_plugins.library:kernel_library"


class Backend(Protocol):
    """Interface of a backend to `Runtime`: memory, graphs, limits and engines of one target."""

    # The contract at the target's own limits and element types.
    @property
    def graphs(self) -> Mapping[str, Graph]: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def memory(self) -> Memory: ...

    def load(self, graph: Graph) -> Engine:
        """Load the engine of one graph. Raises `MmiError`."""

    def is_resident(self, graph: str) -> bool:
        """True if the engine of `graph` stays in memory; False if it is swapped with others."""

    def plan(self, rows: int = 1) -> MemoryPlan | None:
        """Estimate of device memory before engines are loaded, with `rows` of the KV cache; None
        on the host."""


@dataclass(frozen=True)
class HostBackend:
    """Backend on the host whose engines a function loads: to record inputs, emulate precisions, or
    run fake models in tests."""

    graphs: Mapping[str, Graph]
    limits: Limits
    load: Callable[[Graph], Engine]
    memory: Memory = HOST

    def is_resident(self, graph: str) -> bool:
        return True

    def plan(self, rows: int = 1) -> None:
        return None


def open_backend(
    bundle: Bundle,
    target: str,
    *,
    kernels: str | Path = AUTO,
    threads: int = 0,
    device: int = 0,
    resident: Collection[str] | None = None,
) -> Backend:
    """Open a target of `bundle`; parameters as in `Runtime.open`. Raises `MmiError`."""
    check_target(bundle, target)
    row = backend_of(target)
    opened: Backend = load(row.entry_point).open(
        bundle,
        target,
        library=find_kernel_library(target, kernels),
        threads=threads,
        device=device,
        resident=resident,
    )
    return opened


def find_kernel_library(target: str, kernels: str | Path = AUTO) -> Path | None:
    """Find the kernel library (TensorRT: the plugin library) of a target; None runs the ONNX
    functions inside the model files. May compile the library for ONNX Runtime, which is logged.
    Raises `MmiError` for a file that is not such a library."""
    if kernels == NONE:
        return None
    found: Path | None = load(KERNEL_LIBRARY)(backend_of(target).name, kernels)
    return found


def check_target(bundle: Bundle, target: str) -> None:
    """Raise `ConfigError` for a target that was not built."""
    if target in (CPU, PORTABLE, *bundle.targets):
        return
    raise ConfigError(
        f"{bundle.folder} has no target {target!r}",
        expected=" or ".join((CPU, *(name for name in bundle.targets if name != CPU))),
        fix=f"build it with `{bundle.build_command(target)}`",
    )
