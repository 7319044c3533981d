"""Launch plan of `mmi::WeightOnlyMatMul`: kernel, grid and parameter, as in `csrc/gemv_plan.h`."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmi_plugins.compile.launch_plan import TYPES
from mmi_plugins.constants import constant
from mmi_plugins.gemv.operator import BLOCKS, FORMATS, MAX_DECODE_ROWS, GemvCall
from mmi_plugins.gemv.packing import pack_scales, pack_weight, steps_of, tiles_of

_NAMES = {"int8": ("int8", "Int8"), "float8_e4m3fn": ("fp8", "Fp8")}
_NAMES |= {f"int4-{block}": (f"int4_{block}", f"Int4<{block}>") for block in BLOCKS}


@dataclass(frozen=True)
class GemvVariant:
    """One kernel. block: 0 unless the format is int4. rows: for more than `MAX_DECODE_ROWS`."""

    dtype: str
    format: str
    block: int = 0
    rows: bool = False

    @property
    def _names(self) -> tuple[str, str]:
        return _NAMES[f"{self.format}-{self.block}" if self.block else self.format]

    @property
    def name(self) -> str:
        """The kernel's `extern "C"` name."""
        return f"gemv_{self.dtype}_{self._names[0]}{'_rows' if self.rows else ''}"

    @property
    def source(self) -> str:
        """A translation unit that has this kernel alone."""
        macro = "MMI_GEMV_ROWS_KERNEL" if self.rows else "MMI_GEMV_KERNEL"
        name = self.name.removesuffix("_rows")
        kernel = f"{macro}({name}, {TYPES[self.dtype]}, mmi::{self._names[1]})"
        return f'#include "gemv_rows.cuh"\n{kernel}\n'

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return constant("kLanes") * constant("kGemvWarps")


def _variants(rows: bool) -> tuple[GemvVariant, ...]:
    return tuple(
        GemvVariant(dtype, format_, block, rows)
        for dtype in ("float16", "bfloat16")
        for format_ in FORMATS
        for block in (BLOCKS if format_ == "int4" else (0,))
    )


# Kernels of decoding, and those of more rows; each takes every width.
GEMV_VARIANTS, ROWS_VARIANTS = _variants(False), _variants(True)


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
    many = call.rows > MAX_DECODE_ROWS
    variant = GemvVariant(call.dtype, call.format, call.block, many)
    return GemvLaunch(variant, grid_of(call.rows, call.out), parameter)


def grid_of(rows: int, out: int) -> tuple[int, int, int]:
    """Blocks of a launch: tiles of output channels, or (row tiles, groups of those tiles)."""
    tiles = tiles_of(out)
    if rows <= MAX_DECODE_ROWS:
        return (tiles, 1, 1)
    return (-(-rows // constant("kGemvRowTile")), -(-tiles // constant("kGemvWarps")), 1)


def device_arrays(call: GemvCall) -> dict[str, np.ndarray]:
    """The inputs as the kernels read them: 16-bit types as uint16, the weight int32."""
    return {
        "input": np.ascontiguousarray(call.input).view(np.uint16),
        "weight": pack_weight(call.format, call.numbers),
        "scales": np.ascontiguousarray(pack_scales(call.scales, call.input.shape[1])).view(
            np.uint16
        ),
    }
