"""Run a call of `mmi::WeightOnlyMatMul` in the PTX emulator, or with its source on this CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mmi_emulator import emulator, shim
from mmi_emulator.ptx import Counts, GlobalMemory, Kernel, parse
from mmi_plugins.compile import nvrtc
from mmi_plugins.gemv.launch_plan import GemvVariant, device_arrays, launch_of
from mmi_plugins.gemv.operator import GemvCall, numpy_type


def compiled(variant: GemvVariant, compute: int = emulator.COMPUTE) -> Kernel:
    """One kernel, compiled to PTX by the first compiler that is installed, and parsed."""
    program = emulator.compiler() or nvrtc.COMPILERS[0]
    return parse(nvrtc.compile_ptx(variant, compute, program))[variant.name]


def emulate(
    call: GemvCall,
    kernel: Callable[[GemvVariant], Kernel] = compiled,
    most_instructions: int = 10_000_000,
) -> tuple[np.ndarray, Counts]:
    """Output [rows, out] of a call, float64, and counts of executed instructions. Raises `Fault`
    for undefined behaviour."""
    arrays = device_arrays(call)
    size = 2 * call.rows * call.out
    memory = GlobalMemory(sum(array.nbytes + 512 for array in arrays.values()) + size + 512)
    addresses = {name: memory.allocate(array, name) for name, array in arrays.items()}
    addresses["output"] = memory.reserve(size, "output")
    launch = launch_of(call, addresses)
    blocks = np.arange(launch.grid[0] * launch.grid[1])
    counts = emulator.run_launch(launch, kernel(launch.variant), memory, blocks, most_instructions)
    bits, known = memory.written(addresses["output"], np.dtype(np.uint16))
    if not known.all():
        raise AssertionError(f"output {int(np.argmin(known))} was not written")
    return _wide(bits, call), counts


def run_shim(call: GemvCall, runs: shim.Shim | None = None) -> np.ndarray:
    """Output [rows, out] of a call, float64, by the source as compiled for this CPU."""
    arrays = {name: shim.aligned(array) for name, array in device_arrays(call).items()}
    arrays["output"] = shim.aligned(np.full((call.rows, call.out), 0x7FFF, np.uint16))
    launch = launch_of(call, {name: array.ctypes.data for name, array in arrays.items()})
    x, y, _ = launch.grid
    blocks = np.array([(i % x, i // x, 0) for i in range(x * y)], np.uint32)
    (runs or shim.Shim()).launch(launch, blocks)
    return _wide(arrays["output"], call)


def _wide(bits: np.ndarray, call: GemvCall) -> np.ndarray:
    numbers = bits.view(numpy_type(call.dtype)).reshape(call.rows, call.out)
    wide: np.ndarray = numbers.astype(np.float64)
    return wide
