"""Definition of `mmi::WeightOnlyMatMul`, version 1: what a call is, and which weights it takes.

    output[rows, out] = input[rows, in] (numbers * scales)[in, out]

with any number of rows (of all leading axes together), sums in float32, and activations and scales
of one type, float16 or bfloat16. `numbers` is int8 or float8 (E4M3) with a scale per output
channel, or int4 with a scale for every 32, 64 or 128 input channels of an output channel. On disk
the inputs are `input`, `weight` and `scales`, the last two packed by `packing`; the attributes are
integers: `format` (the place in `FORMATS`), `out` and `block` (0 for a scale per output channel).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from mmi_deploy.errors import EngineError
from mmi_plugins.constants import constant

NAME, DOMAIN, VERSION = "WeightOnlyMatMul", "mmi", 1

# Formats of a weight, in the order of `mmi::WeightFormat`.
FORMATS = ("int8", "float8_e4m3fn", "int4")

# Blocks of int4.
BLOCKS = (32, 64, 128)

# Types of activations, and the relative error (rms) that an output may have.
TOLERANCES: Mapping[str, float] = {"float16": 5e-4, "bfloat16": 4e-3}

# Rows that the kernels of decoding take; more rows have kernels of their own.
MAX_DECODE_ROWS = constant("kGemvRows")


def numpy_type(dtype: str) -> DTypeLike:
    """NumPy's type for a type of activations."""
    return np.float16 if dtype == "float16" else ml_dtypes.bfloat16


@dataclass(frozen=True)
class GemvCall:
    """One call. input: [rows, in]; numbers: [in, out], int8 (also of int4) or float8; scales:
    [out], or [in / block, out]; input and scales have the type of activations, `dtype`."""

    format: str
    input: np.ndarray
    numbers: np.ndarray
    scales: np.ndarray

    def __post_init__(self) -> None:
        rows, channels = self.input.shape
        if rows < 1:
            raise EngineError(f"{NAME}: there are no rows")
        if channels != self.numbers.shape[0] or self.scales.shape[-1] != self.numbers.shape[1]:
            shapes = f"{self.input.shape}, {self.numbers.shape}, {self.scales.shape}"
            raise EngineError(f"{NAME}: shapes of input, numbers and scales differ", got=shapes)
        check_supported(self.format, channels, self.out, self.block)

    @property
    def dtype(self) -> str:
        """Type of activations."""
        return self.input.dtype.name

    @property
    def block(self) -> int:
        """Input channels that share a scale; 0 where all of an output channel do."""
        return self.numbers.shape[0] // self.scales.shape[0] if self.scales.ndim == 2 else 0

    @property
    def rows(self) -> int:
        """Rows of activations."""
        return int(self.input.shape[0])

    @property
    def out(self) -> int:
        """Output channels."""
        return int(self.numbers.shape[1])


def unsupported_reason(format_: str, inputs: int, outputs: int, block: int) -> str | None:
    """Reason why no kernel takes a weight [inputs, outputs], or None."""
    if format_ not in FORMATS:
        return "the weight is neither int8, float8 nor int4"
    if inputs < 1 or inputs % constant("kGemvChunk"):
        return "input channels are not a multiple of 32"
    if outputs < 1:
        return "there are no output channels"
    if format_ != "int4":
        return "int8 and float8 have no blocks" if block else None
    if block not in BLOCKS:
        return "a block of int4 is not 32, 64 or 128"
    return "input channels are not a multiple of the block" if inputs % block else None


def check_supported(format_: str, inputs: int, outputs: int, block: int) -> None:
    """Raise `EngineError` for a weight that no kernel takes."""
    if reason := unsupported_reason(format_, inputs, outputs, block):
        got = f"{format_} [{inputs}, {outputs}], block {block}"
        raise EngineError(f"{NAME}: {reason}", got=got)


def attributes(format_: str, outputs: int, block: int) -> dict[str, int]:
    """Attributes of a node."""
    return {"format": FORMATS.index(format_), "out": outputs, "block": block}
