"""Weights as small integers or float8 and the scales that bring them back.

A weight is [in, out]; `block` rows of one output channel share a scale (0: all of them do). Numbers
are symmetric: weight = scale * number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from mmi_deploy.targets.precision.constants import slices
from mmi_deploy.targets.precision.recipes import FP8, GREATEST, INT4, INT8, Scheme

Array = NDArray[Any]

_GREATEST = {INT8: 127.0, INT4: 7.0, FP8: GREATEST[FP8]}
_LEAST = {INT8: -127.0, INT4: -8.0, FP8: -GREATEST[FP8]}

# Factors by which the range of an int4 block is cut on trial: losing the greatest number a little
# can leave the others finer. The one with the smallest squared error is taken.
SHRINK = (0.95, 0.9, 0.85, 0.8, 0.75)

# Below it the scales weigh as much as what they save.
LEAST_BLOCK = 16


@dataclass(frozen=True)
class Quantised:
    """numbers [in, out] int8 or float8; scales [in / block, out], or [out] where all rows share."""

    numbers: Array
    scales: Array

    def restored(self) -> Array:
        """The weight that is computed with, float32 [in, out]."""
        rows = self.numbers.shape[0] // (self.scales.shape[0] if self.scales.ndim == 2 else 1)
        scales = self.scales.astype(np.float32)
        spread = np.repeat(scales, rows, 0) if scales.ndim == 2 else scales
        return self.numbers.astype(np.float32) * spread


def fitting(scheme: Scheme, rows: int) -> Scheme:
    """`scheme`, its block halved until it divides `rows`; int8 where none does."""
    block = scheme.block
    while block >= LEAST_BLOCK and rows % block:
        block //= 2
    if scheme.block and block < LEAST_BLOCK:
        return Scheme(INT8)
    return Scheme(scheme.dtype, block)


def quantise(weight: Array, scheme: Scheme, scale_type: DTypeLike = np.float32) -> Quantised:
    """`weight` [in, out] by a scheme whose block divides `in`; scales rounded to `scale_type`."""
    rows, columns = weight.shape
    block = scheme.block or rows
    stored = ml_dtypes.float8_e4m3fn if scheme.dtype == FP8 else np.int8
    numbers = np.empty((rows, columns), stored)
    scales = np.empty((rows // block, columns), scale_type)
    for part in slices(weight.shape, axis=1):
        blocks = weight[part].astype(np.float32).reshape(rows // block, block, -1)
        found, scales[part] = _best(blocks, scheme.dtype, scale_type)
        numbers[part] = found.reshape(rows, -1).astype(stored)
    return Quantised(numbers, scales if scheme.block else scales[0])


def _best(blocks: Array, dtype: str, scale_type: DTypeLike) -> tuple[Array, Array]:
    """Numbers [in / block, block, out] and scales [in / block, out] of the least squared error."""
    peak = np.abs(blocks).max(1)
    scales = _rounded(peak / _GREATEST[dtype], scale_type)
    numbers = _numbers(blocks, scales, dtype)
    if dtype != INT4:
        return numbers, scales
    error = _squares(numbers, scales, blocks)
    for shrink in SHRINK:
        other = _rounded(peak * (shrink / _GREATEST[dtype]), scale_type)
        tried = _numbers(blocks, other, dtype)
        found = _squares(tried, other, blocks)
        better = found < error
        numbers = np.where(better[:, None], tried, numbers)
        scales, error = np.where(better, other, scales), np.minimum(found, error)
    return numbers, scales


def _squares(numbers: Array, scales: Array, blocks: Array) -> Array:
    rest = numbers * scales.astype(np.float32)[:, None] - blocks
    squares: Array = np.einsum("ibo,ibo->io", rest, rest)
    return squares


def _rounded(scales: Array, scale_type: DTypeLike) -> Array:
    """Scales as they will be stored, none of them 0."""
    least = float(ml_dtypes.finfo(scale_type).smallest_normal)
    return np.maximum(scales, least).astype(scale_type)


def _numbers(blocks: Array, scales: Array, dtype: str) -> Array:
    """float32 [in / block, block, out], whole numbers but for float8."""
    found = blocks / scales.astype(np.float32)[:, None]
    found = np.clip(found, _LEAST[dtype], _GREATEST[dtype], out=found)
    return found if dtype == FP8 else np.rint(found, out=found)


def packed_blocks(quantised: Quantised, bits: int) -> tuple[Array, Array]:
    """What ONNX Runtime's MatMulNBits reads: numbers uint8 [out, in / block, block * bits / 8] with
    zero at the middle, two int4 a byte, the first in the low half; scales [out * in / block]."""
    count, columns = quantised.scales.shape
    middle = 2 ** (bits - 1)
    numbers: Array = quantised.numbers.T.astype(np.uint8) + np.uint8(middle)  # [out, in], mod 256
    if bits == 4:
        numbers = numbers[:, 0::2] | (numbers[:, 1::2] << 4)
    return numbers.reshape(columns, count, -1), np.ascontiguousarray(quantised.scales.T).reshape(-1)
