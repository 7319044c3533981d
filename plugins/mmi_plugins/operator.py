"""The operator `mmi::MultiImageDeformableAttention`, version 1: one call, its limits, tolerances.

Letters: b batch, q queries, m image slots, l levels, h heads, p points, d channels per head,
n encoded images, s feature cells, r table rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmi_deploy.errors import EngineError
from mmi_deploy.parity import Tolerance
from mmi_deploy.spec.graphs import (
    MMFS_CHANNEL_STEP,
    MMFS_DOMAIN,
    MMFS_MOST_CHANNELS,
    MMFS_MOST_LEVELS,
    MMFS_MOST_POINTS,
    MMFS_OPERATOR,
    MMFS_VERSION,
)
from mmi_deploy.spec.mmfs_operator import INDEX_INPUTS, INPUT_SHAPES, NARROW_INPUTS

__all__ = [
    "CHANNEL_STEP",
    "DOMAIN",
    "INDEX_INPUTS",
    "INPUT_SHAPES",
    "MAX_CHANNELS",
    "MAX_LEVELS",
    "MAX_POINTS",
    "NAME",
    "NARROW_INPUTS",
    "TOLERANCES",
    "VERSION",
    "Call",
]

DOMAIN, NAME, VERSION = MMFS_DOMAIN, MMFS_OPERATOR, MMFS_VERSION

# Types T, and the error that each is allowed against float64 over the same, already rounded,
# inputs. The floor is the type's smallest normal number: it cannot hold smaller ones.
TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(1e-6, "2^-24 a rounding, in sums of float32", "rms", 2.0**-126),
    "float16": Tolerance(4e-4, "2^-11 for rounding the output, sums of float32", "rms", 2.0**-14),
    "bfloat16": Tolerance(3e-3, "2^-8 for rounding the output, sums of float32", "rms", 2.0**-126),
}

# Limits of every kernel: 1..4 levels, 1..16 points, multiples of 8 up to 128 channels per head.
MAX_LEVELS, MAX_POINTS = MMFS_MOST_LEVELS, MMFS_MOST_POINTS
MAX_CHANNELS, CHANNEL_STEP = MMFS_MOST_CHANNELS, MMFS_CHANNEL_STEP


@dataclass(frozen=True)
class Call:
    """One call of the operator: `inputs` by name and the attributes.

    Floating inputs are stored as float32 whatever `dtype` is, and those of type T are already
    rounded to it. Raises `EngineError` where shapes or types contradict each other.
    """

    inputs: Mapping[str, np.ndarray]
    level_heights: tuple[int, ...]
    level_widths: tuple[int, ...]
    base_grid: float
    null_slot: bool
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _check(self)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.inputs[name]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size of every letter."""
        sizes: dict[str, int] = {}
        for name, letters in INPUT_SHAPES.items():
            sizes |= {
                letter: side
                for letter, side in zip(letters, self.inputs[name].shape, strict=True)
                if letter.isalpha()
            }
        return sizes

    @property
    def rows(self) -> int:
        """Number of output rows (b, q, h), each a weighted sum of d channels."""
        return self.sizes["b"] * self.sizes["q"] * self.sizes["h"]

    @property
    def level_starts(self) -> tuple[int, ...]:
        """First feature cell of each level."""
        cells = [h * w for h, w in zip(self.level_heights, self.level_widths, strict=True)]
        return tuple(int(start) for start in np.cumsum([0, *cells[:-1]]))


def _check(call: Call) -> None:
    """Raise `EngineError` unless every kernel takes `call`."""
    if call.dtype not in TOLERANCES:
        raise EngineError(f"{NAME}: unknown type", expected=list(TOLERANCES), got=call.dtype)
    if wrong := set(INPUT_SHAPES) ^ set(call.inputs):
        raise EngineError(f"{NAME}: inputs missing or unknown: {', '.join(sorted(wrong))}")
    first: dict[str, tuple[str, int]] = {}
    for name, letters in INPUT_SHAPES.items():
        array = call.inputs[name]
        kind = np.int32 if name in INDEX_INPUTS else np.float32
        if array.dtype != kind:
            raise EngineError(
                f"{NAME}: wrong type of {name}", expected=np.dtype(kind), got=array.dtype
            )
        if array.ndim != len(letters):
            raise EngineError(
                f"{NAME}: wrong rank of {name}", expected=len(letters), got=array.shape
            )
        for letter, side in zip(letters, array.shape, strict=True):
            if letter.isalpha():
                other, size = first.setdefault(letter, (name, side))
                if size != side:
                    raise EngineError(
                        f"{NAME}: {name} and {other} differ in {letter}", expected=size, got=side
                    )
            elif letter == "2" and side != 2:
                raise EngineError(f"{NAME}: {name} must end in (x, y)", expected=2, got=side)
    if empty := [letter for letter, (_, size) in first.items() if size < 1]:
        raise EngineError(f"{NAME}: empty axes {', '.join(empty)}; every axis has at least one")
    queries = first["q"][1]
    for name, axis in (("image_position", 1), ("reference", 0)):
        if call.inputs[name].shape[axis] not in (1, queries):
            raise EngineError(
                f"{NAME}: {name} must have a row for all queries or one each",
                expected=(1, queries),
                got=call.inputs[name].shape[axis],
            )
    heights, widths = call.level_heights, call.level_widths
    if len(heights) != len(widths) or len(heights) != first["l"][1]:
        raise EngineError(
            f"{NAME}: level_heights, level_widths and logits differ in the number of levels",
            expected=first["l"][1],
            got=(len(heights), len(widths)),
        )
    cells = sum(height * width for height, width in zip(heights, widths, strict=True))
    if min(*heights, *widths) < 1 or cells != first["s"][1]:
        raise EngineError(
            f"{NAME}: levels {list(zip(heights, widths, strict=True))} do not make up the cells",
            expected=first["s"][1],
            got=cells,
        )
    if not (np.isfinite(call.base_grid) and call.base_grid > 0):
        raise EngineError(f"{NAME}: base_grid must be positive", got=call.base_grid)
    channels = first["d"][1]
    if channels % CHANNEL_STEP or channels > MAX_CHANNELS:
        raise EngineError(
            f"{NAME}: unsupported head size",
            expected=f"a multiple of {CHANNEL_STEP} up to {MAX_CHANNELS}",
            got=channels,
        )
    for letter, most in (("l", MAX_LEVELS), ("p", MAX_POINTS)):
        if first[letter][1] > most:
            raise EngineError(
                f"{NAME}: too many {'levels' if letter == 'l' else 'points'}",
                expected=f"1..{most}",
                got=first[letter][1],
            )
