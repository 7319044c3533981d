"""Launch plan of a call: its CUDA kernels, grids, blocks and parameter, as `csrc/plan.h` has them.

For whatever runs the kernels without the library: emulator, shim, ahead-of-time PTX. Every kernel
has one parameter, by value: the struct `mmi::KernelParameters` of `csrc/kernel_parameters.h`, whose
bytes are `Launch.parameter`. A device address is an integer; arrays have the layout of
`device_arrays` and start at multiples of 16 bytes.

Letters: b batch, q queries, m image slots, l levels, h heads, p points, d channels per head,
n encoded images, s feature cells, r table rows.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmi_deploy.errors import EngineError
from mmi_plugins.constants import constant
from mmi_plugins.operator import INPUT_SHAPES, MAX_LEVELS, NAME, NARROW_INPUTS, Call

# Types T and their names in the kernels.
TYPES = {"float32": "float", "float16": "mmi::Half", "bfloat16": "mmi::BFloat16"}

# `rows`: a warp for each output row. `split`: warps and blocks share a row. `merge`: merges the
# partial rows of several blocks.
KINDS = ("rows", "split", "merge")


@dataclass(frozen=True)
class Variant:
    """One kernel. `wide`: for more than 64 channels (16-bit types, not `merge`)."""

    dtype: str
    kind: str
    wide: bool = False

    @property
    def name(self) -> str:
        """The kernel's `extern "C"` name."""
        return f"mmfs_{self.dtype}{'_wide' if self.wide else ''}_{self.kind}"

    @property
    def source(self) -> str:
        """A translation unit that has this kernel alone."""
        name = self.name.removesuffix(f"_{self.kind}")
        macro = f"MMI_{self.kind.upper()}_KERNEL"
        wide = "true" if self.wide else "false"
        return f'#include "mmfs.cuh"\n{macro}({name}, {TYPES[self.dtype]}, {wide})\n'

    @property
    def threads(self) -> int:
        """Threads of a block."""
        if self.kind == "merge":
            return constant("kMaxChannels")
        return constant("kLanes") * constant("kRowWarps" if self.kind == "rows" else "kSplitWarps")


# All kernels; each takes every shape.
VARIANTS = tuple(
    Variant(dtype, kind, wide)
    for dtype in TYPES
    for kind in KINDS
    for wide in ((False, True) if dtype != "float32" and kind != "merge" else (False,))
)


@dataclass(frozen=True)
class Launch:
    """One kernel launch. All shared memory is static."""

    variant: Variant
    grid: tuple[int, int, int]
    parameter: bytes
    queries_per_block: int
    parts: int

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads of a block."""
        return (self.variant.threads, 1, 1)

    def blocks(self, rows: np.ndarray) -> np.ndarray:
        """Blocks (x, y, z), [blocks, 3], that compute the output `rows` (b, q, h), [rows, 3]."""
        b, q, h = np.asarray(rows).T
        x = q // self.queries_per_block
        if self.variant.kind == "split":
            x, h, b = (np.repeat(axis, self.parts) for axis in (x * self.parts, h, b))
            x = x + np.tile(np.arange(self.parts), len(rows))
        return np.unique(np.stack([x, h, b], 1), axis=0)


def is_wide(call: Call) -> bool:
    """Test for a call that takes a kernel for more than 64 channels per head."""
    return call.dtype != "float32" and call.sizes["d"] > 64


def default_parts(call: Call) -> int:
    """Number of blocks that share a row; 0: each warp has a row of its own (many rows)."""
    if call.rows >= constant("kMinUnsplitRows"):
        return 0
    pairs = call.sizes["m"] * call.sizes["p"]
    block = constant("kSplitWarps") * constant("kSplitPairs")
    return min(-(-pairs // block), constant("kMaxSplitBlocks") // call.rows)


def kernel_variants(call: Call, parts: int | None = None) -> list[Variant]:
    """The kernels of the call, in order. `parts`: as from `default_parts`, which the library uses;
    other values give the same result, so that a small call can test every kernel."""
    parts = default_parts(call) if parts is None else parts
    kinds = ["rows"] if parts == 0 else ["split"] if parts == 1 else ["split", "merge"]
    return [Variant(call.dtype, kind, kind != "merge" and is_wide(call)) for kind in kinds]


def workspace_shape(call: Call, parts: int | None = None) -> tuple[int, ...]:
    """Shape of the float32 workspace of the call; (0,) for none."""
    parts = default_parts(call) if parts is None else parts
    return (call.rows, parts, call.sizes["d"] + 2) if parts > 1 else (0,)


def launch_plan(call: Call, addresses: Mapping[str, int], parts: int | None = None) -> list[Launch]:
    """The launches of a call, in order. `addresses`: every input's by name, `output` and, where
    `workspace_shape` is not empty, `workspace`. Raises `EngineError` for a call too large."""
    parts = default_parts(call) if parts is None else parts
    sizes = call.sizes
    check_limits(sizes, call.dtype)
    parameter = _kernel_parameters(call, addresses, parts)
    b, q, h = (sizes[letter] for letter in "bqh")
    launches = []
    for variant in kernel_variants(call, parts):
        queries = constant("kRowWarps") if variant.kind == "rows" else 1
        across = q * parts if variant.kind == "split" else -(-q // queries)
        launches.append(Launch(variant, (across, h, b), parameter, queries, parts))
    return launches


def check_limits(sizes: Mapping[str, int], dtype: str) -> None:
    """Raise `EngineError` where sizes, by letter, exceed what addresses and grids can hold."""
    unit = sizes["h"] * sizes["d"] * (4 if dtype == "float32" else 2) // 16
    most = constant("kMaxCount")
    reasons = {
        "value is larger than 64 GiB": sizes["n"] * sizes["s"] > 2**32 // unit,
        "more than 2^31 - 64 output rows": sizes["b"] * sizes["q"] * sizes["h"] > most,
        "more than 2^31 - 64 images": sizes["m"] > most,
        "more than 2^31 numbers in a table": sizes["h"] * sizes["p"] * max(sizes["l"], 2)
        > (2**31 - 1) // sizes["r"],
        "more than 65535 heads or batch rows": max(sizes["h"], sizes["b"]) > constant("kMaxGridYZ"),
    }
    for reason, holds in reasons.items():
        if holds:
            raise EngineError(f"{NAME}: {reason}")


def _kernel_parameters(call: Call, addresses: Mapping[str, int], parts: int) -> bytes:
    """Bytes of `mmi::KernelParameters`: 11 addresses, 21 integers, 2 floats, padding at the end."""
    sizes = call.sizes
    names = [*INPUT_SHAPES, "output"]
    pointers = [addresses[name] for name in names] + [addresses.get("workspace", 0)]
    integers = [sizes[letter] for letter in "qmhlpdnsr"]
    integers += [call["image_position"].shape[1], call["reference"].shape[0]]
    integers += [int(call.null_slot), parts]
    for sides in (call.level_heights, call.level_widths):
        integers += [*sides, *[0] * (MAX_LEVELS - len(sides))]
    inverse = 1.0 / float(np.float32(call.base_grid))
    whole = np.float32(inverse)
    rest = np.float32(inverse - float(whole))
    packed = struct.pack(f"<11Q{len(integers)}i2f", *pointers, *integers, whole, rest)
    return packed + bytes(-len(packed) % 8)


def device_arrays(call: Call) -> dict[str, np.ndarray]:
    """The inputs as the kernels read them: 16-bit types as uint16, the rest float32 and int32."""
    return {
        name: narrow(call[name], call.dtype) if name in NARROW_INPUTS else call[name]
        for name in INPUT_SHAPES
    }


def output_array(call: Call) -> np.ndarray:
    """An output [b, q, h * d] of the kernels' type, filled with a NaN."""
    sizes = call.sizes
    shape = (sizes["b"], sizes["q"], sizes["h"] * sizes["d"])
    return narrow(np.full(shape, np.nan, np.float32), call.dtype)


def narrow(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers, exact in `dtype`, as arrays of its bits."""
    array = np.ascontiguousarray(array, np.float32)
    if dtype == "float16":
        return array.astype(np.float16).view(np.uint16)
    if dtype == "bfloat16":
        return (array.view(np.uint32) >> 16).astype(np.uint16)
    return array


def widen(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array of bits of `dtype` as float32 numbers."""
    if dtype == "float16":
        return array.view(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array
