"""Backend: the engines of one target of a bundle, and where they run.

`open_backend` finds the class in `mmi_deploy.spec.backends` and the kernels in the package that
has them; both are imported when they are needed, so that a machine has only what it runs.
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

KERNEL_LIBRARY = "mmi_plugins.library:kernel_library"


class Backend(Protocol):
    """Memory, graphs, limits and engines of one target, as a `Runtime` needs them."""

    # The contract as the target keeps it: its limits, its types.
    @property
    def graphs(self) -> Mapping[str, Graph]: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def memory(self) -> Memory: ...

    def load(self, graph: Graph) -> Engine:
        """Load the engine of one graph. Raises `MmiError`."""

    def is_resident(self, graph: str) -> bool:
        """Whether the engine of `graph` stays in memory, rather than take turns with others."""

    def plan(self) -> MemoryPlan | None:
        """Memory on the device, as far as it is known before engines are loaded; None for the
        host's."""


@dataclass(frozen=True)
class HostBackend:
    """Engines on the host that a function loads: recorders of inputs, emulated precisions, models
    of tests."""

    graphs: Mapping[str, Graph]
    limits: Limits
    load: Callable[[Graph], Engine]
    memory: Memory = HOST

    def is_resident(self, graph: str) -> bool:
        return True

    def plan(self) -> None:
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
    """Open a target of `bundle`; parameters as of `Runtime.open`. Raises `MmiError`."""
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
    """The library of kernels (TensorRT: of the plugin) for a target, None for the functions inside
    the model files. May compile the library for ONNX Runtime, which it says in the log. Raises
    `MmiError` for a file that is not such a library."""
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
