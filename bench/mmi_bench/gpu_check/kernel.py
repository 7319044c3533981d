"""Run the MMFS kernels on a GPU without TensorRT or torch.

NVRTC compiles them to machine code; CUDA's driver API (`cuda.bindings.driver`) launches them.

Letters: b batch, q queries, h heads, d channels per head.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import numpy as np

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.buffers import Buffer
from mmi_deploy.runtime.device_memory import INSTALL, DeviceMemory
from mmi_plugins.compile import nvrtc
from mmi_plugins.compile.launch_plan import (
    Launch,
    Variant,
    device_arrays,
    launch_plan,
    output_array,
    widen,
    workspace_shape,
)
from mmi_plugins.operator import Call
from mmi_plugins.reference import rows_of


def import_driver() -> Any:
    """Import `cuda.bindings.driver`; raises `EngineError` if it is not installed."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise EngineError(f"CUDA's driver API cannot be imported: {error}", fix=INSTALL) from None


class GpuKernel:
    """Implementation of the operator for `mmi_plugins.conformance.check`. `parts` as in
    `launch_plan`."""

    name = "gpu"
    most_rows: int | None = None

    def __init__(self, memory: DeviceMemory, driver: Any, parts: int | None = None) -> None:
        self.memory, self.driver, self.parts = memory, driver, parts
        self._functions: dict[Variant, Any] = {}

    def missing(self) -> str | None:
        """Reason why the kernel cannot run on this machine, or None."""
        return nvrtc.missing("nvrtc")

    def run(self, call: Call, rows: np.ndarray) -> np.ndarray:
        """Outputs [row, d] of `rows` [row, 3], each a (b, q, h)."""
        arrays = {**device_arrays(call), "output": output_array(call)}
        buffers = {name: self.memory.from_array(array) for name, array in arrays.items()}
        if prod := int(np.prod(workspace_shape(call, self.parts))):
            buffers["workspace"] = self.memory.allocate((prod,), np.float32)
        for launch in launch_plan(call, _addresses(buffers), self.parts):
            self._launch(launch)
        return rows_of(widen(buffers["output"].read(), call.dtype), call, rows)

    def _launch(self, launch: Launch) -> None:
        parameter = ctypes.create_string_buffer(launch.parameter, len(launch.parameter))
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(parameter))
        with self.memory.lock:
            self._call(
                "cuLaunchKernel",
                self._function(launch.variant),
                *launch.grid,
                *launch.block,
                0,
                self.memory.stream,
                ctypes.addressof(parameters),
                0,
            )

    def _function(self, variant: Variant) -> Any:
        if variant not in self._functions:
            architecture = int(self.memory.gpu.architecture.removeprefix("sm"))
            code = nvrtc.compile_cubin(variant.source, architecture)
            image = ctypes.create_string_buffer(code, len(code))
            module = self._call("cuModuleLoadData", ctypes.addressof(image))
            self._functions[variant] = self._call(
                "cuModuleGetFunction", module, variant.name.encode()
            )
        return self._functions[variant]

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self.driver, name)(*arguments)
        if error != self.driver.CUresult.CUDA_SUCCESS:
            raise EngineError(f"CUDA's {name} failed: {error.name}")
        return results[0] if results else None


def _addresses(buffers: dict[str, Buffer]) -> dict[str, int]:
    return {name: buffer.pointer for name, buffer in buffers.items()}
