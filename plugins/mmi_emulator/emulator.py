"""Run a call of the operator in the PTX emulator, with PTX from NVRTC or nvcc.

Letters as in `operator`; in shapes, `rows` counts the output rows (b, q, h) to compute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from mmi_emulator.ptx import Counts, GlobalMemory, Kernel, Machine, parse
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
from mmi_plugins.gemv.launch_plan import GemvLaunch
from mmi_plugins.operator import Call
from mmi_plugins.reference import rows_of

# Default compute capability of the PTX.
COMPUTE = 90

# Threads emulated side by side: enough to amortise NumPy's overhead, few enough for the CPU caches.
_LANES = 2**14


@dataclass(frozen=True)
class Emulation:
    """Outputs [rows, d], and counts of executed instructions by kernel."""

    output: np.ndarray
    counts: dict[Variant, Counts]

    @property
    def lane_instructions(self) -> int:
        """PTX instructions, each counted once for every thread that ran it."""
        return sum(counts.lane_instructions for counts in self.counts.values())

    @property
    def bytes_by_kind(self) -> Counter[tuple[str, str, int]]:
        """Bytes moved, by (`ld` or `st`, memory, bytes of one access)."""
        total: Counter[tuple[str, str, int]] = Counter()
        for counts in self.counts.values():
            total += counts.bytes_by_kind()
        return total


def compiler() -> str | None:
    """The first compiler of PTX that is installed, or None."""
    return next((name for name in nvrtc.COMPILERS if not nvrtc.missing(name)), None)


@cache
def compiled(variant: Variant, compute: int, compiler: str) -> Kernel:
    """One kernel, compiled to PTX and parsed."""
    return parse(nvrtc.compile_ptx(variant, compute, compiler))[variant.name]


def emulate(
    call: Call,
    rows: np.ndarray,
    kernel: Callable[[Variant], Kernel],
    *,
    parts: int | None = None,
    most_instructions: int = 10_000_000,
) -> Emulation:
    """Run the call's launches with the kernels that `kernel` returns, but only the blocks that
    compute `rows` [rows, 3]. `parts` as in `launch_plan`. Raises `Fault` for undefined behaviour.
    """
    arrays = device_arrays(call)
    output, workspace = output_array(call), workspace_shape(call, parts)
    sizes = [
        *(array.nbytes for array in arrays.values()),
        output.nbytes,
        4 * int(np.prod(workspace)),
    ]
    memory = GlobalMemory(sum(size + 512 for size in sizes))
    addresses = {name: memory.allocate(array, name) for name, array in arrays.items()}
    addresses["output"] = memory.reserve(output.nbytes, "output")
    addresses["workspace"] = memory.reserve(sizes[-1], "workspace")

    counts: dict[Variant, Counts] = {}
    for launch in launch_plan(call, addresses, parts):
        x, y, z = launch.blocks(rows).T
        numbers = x + launch.grid[0] * (y + launch.grid[1] * z)
        counts[launch.variant] = run_launch(
            launch, kernel(launch.variant), memory, numbers, most_instructions
        )
        memory.next_launch()

    bits, known = memory.written(addresses["output"], output.dtype)
    missed = ~rows_of(known, call, rows).all(-1)
    if missed.any():
        raise AssertionError(f"row (b, q, h) {rows[missed][0]} was not written")
    return Emulation(rows_of(widen(bits, call.dtype), call, rows), counts)


def run_launch(
    launch: Launch | GemvLaunch,
    kernel: Kernel,
    memory: GlobalMemory,
    numbers: np.ndarray,
    most_instructions: int,
) -> Counts:
    """Run the blocks `numbers` of one launch, a batch of blocks at a time."""
    step = max(1, _LANES // launch.variant.threads)
    executed = np.zeros(len(kernel.instructions), np.int64)
    for start in range(0, len(numbers), step):
        blocks = numbers[start : start + step]
        machine = Machine(
            kernel,
            memory,
            launch.grid,
            launch.block,
            launch.parameter,
            blocks=blocks,
            most_instructions=most_instructions,
        )
        executed += machine.run().executed
        memory.next_blocks()
    return Counts(executed, kernel)


def sampled_points(call: Call, rows: np.ndarray) -> int:
    """Number of (visible image, level, point) that the rows sample."""
    sizes = call.sizes
    position, slot = call["image_position"], call["image_slot"]
    seen = (position > 0) & (position < sizes["r"])
    seen &= ((slot >= 0) & (slot < sizes["n"]))[:, None]  # [b, q or 1, m]
    b, q, _ = np.asarray(rows).T
    images = seen.sum(2)[b, q if position.shape[1] > 1 else 0]
    return int(images.sum()) * sizes["l"] * sizes["p"]


class _Emulator:
    name = "emulator"
    most_rows: int | None = 64

    def missing(self) -> str | None:
        """Reason why the emulator cannot run here, or None."""
        return None if compiler() else nvrtc.missing("nvrtc")

    def run(self, call: Call, rows: np.ndarray) -> np.ndarray:
        """Outputs [rows, d] of `rows` [rows, 3], by the kernels that the library would choose."""
        return emulate(call, rows, default_kernel).output


def default_kernel(variant: Variant) -> Kernel:
    """The kernel for `COMPUTE`, by the first compiler that is installed."""
    return compiled(variant, COMPUTE, compiler() or nvrtc.COMPILERS[0])


EMULATOR = _Emulator()
