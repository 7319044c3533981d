"""Launch plan of `mmi::WeightOnlyMatMul`: kernel, grid and parameter, as in `csrc/gemv_plan.h`."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmi_plugins.compile.launch_plan import TYPES
from mmi_plugins.constants import constant
from mmi_plugins.gemv.operator import BLOCKS, FORMATS, GemvCall
from mmi_plugins.gemv.packing import pack_scales, pack_weight, steps_of, tiles_of

_NAMES = {"int8": ("int8", "Int8"), "float8_e4m3fn": ("fp8", "Fp8")}
_NAMES |= {f"int4-{block}": (f"int4_{block}", f"Int4<{block}>") for block in BLOCKS}


@dataclass(frozen=True)
class GemvVariant:
    """One kernel. block: 0 unless the format is int4."""

    dtype: str
    format: str
    block: int = 0

    @property
    def _names(self) -> tuple[str, str]:
        return _NAMES[f"{self.format}-{self.block}" if self.block else self.format]

    @property
    def name(self) -> str:
        """The kernel's `extern "C"` name."""
        return f"gemv_{self.dtype}_{self._names[0]}"

    @property
    def source(self) -> str:
        """A translation unit that has this kernel alone."""
        kernel = f"MMI_GEMV_KERNEL({self.name}, {TYPES[self.dtype]}, mmi::{self._names[1]})"
        return f'#include "gemv.cuh"\n{kernel}\n'

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return constant("kLanes") * constant("kGemvWarps")


# All kernels; each takes every shape.
GEMV_VARIANTS = tuple(
    GemvVariant(dtype, format_, block)
    for dtype in ("float16", "bfloat16")
    for format_ in FORMATS
    for block in (BLOCKS if format_ == "int4" else (0,))
)


@dataclass(frozen=True)
class GemvLaunch:
    """The launch of a call. All shared memory is static."""

    variant: GemvVariant
    grid: tuple[int, int, int]
    parameter: bytes

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads of a block."""
        return (self.variant.threads, 1, 1)


def launch_of(call: GemvCall, addresses: Mapping[str, int]) -> GemvLaunch:
    """The launch of a call. `addresses`: of `device_arrays` by name, and of the `output`."""
    names = ("input", "weight", "scales", "output")
    inputs = call.input.shape[1]
    integers = (call.rows, inputs, call.out, steps_of(inputs))
    parameter = struct.pack("<4Q4i", *(addresses[name] for name in names), *integers)
    variant = GemvVariant(call.dtype, call.format, call.block)
    return GemvLaunch(variant, (tiles_of(call.out), 1, 1), parameter)


def device_arrays(call: GemvCall) -> dict[str, np.ndarray]:
    """The inputs as the kernels read them: 16-bit types as uint16, the weight int32."""
    return {
        "input": np.ascontiguousarray(call.input).view(np.uint16),
        "weight": pack_weight(call.format, call.numbers),
        "scales": np.ascontiguousarray(pack_scales(call.scales, call.input.shape[1])).view(
            np.uint16
        ),
    }
