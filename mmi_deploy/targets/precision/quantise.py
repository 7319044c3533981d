"""Quantise weights to int8, int4 or float8 with scales per output channel or per block of rows.

A weight is [in, out]; `block` rows of one output channel share a scale (0: all rows). Quantisation
is symmetric: weight = scale * number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from mmi_deploy.targets.precision.constants import chunks
from mmi_deploy.targets.precision.recipes import FP8, INT4, INT8, MAX_FINITE, Scheme

Array = NDArray[Any]

_MAX = {INT8: 127.0, INT4: 7.0, FP8: MAX_FINITE[FP8]}
_MIN = {INT8: -127.0, INT4: -8.0, FP8: -MAX_FINITE[FP8]}

# Clipping ratios tried for an int4 block: clipping its largest magnitude gives the others a finer
# scale. The ratio with the least squared error is used.
CLIP_RATIOS = (0.95, 0.9, 0.85, 0.8, 0.75)

# In smaller blocks the scales take as many bytes as int4 saves.
MIN_BLOCK = 16


@dataclass(frozen=True)
class Quantised:
    """numbers [in, out] int8 or float8; scales [in / block, out], or [out] where all rows share."""

    numbers: Array
    scales: Array

    def dequantised(self) -> Array:
        """Dequantised weight, float32 [in, out]."""
        rows = self.numbers.shape[0] // (self.scales.shape[0] if self.scales.ndim == 2 else 1)
        scales = self.scales.astype(np.float32)
        per_row = np.repeat(scales, rows, 0) if scales.ndim == 2 else scales
        return self.numbers.astype(np.float32) * per_row


def scheme_for_rows(scheme: Scheme, rows: int) -> Scheme:
    """`scheme` with its block halved until it divides `rows`; int8 per channel where none does."""
    block = scheme.block
    while block >= MIN_BLOCK and rows % block:
        block //= 2
    if scheme.block and block < MIN_BLOCK:
        return Scheme(INT8)
    return Scheme(scheme.dtype, block)


def quantise(
    weight: Array,
    scheme: Scheme,
    scale_type: DTypeLike = np.float32,
    importance: Array | None = None,
) -> Quantised:
    """Quantise `weight` [in, out]. The block of `scheme` divides `in`; scales have `scale_type`.

    importance: mean square [in] of the activations, by which clipping weighs the error of a row.
    """
    rows, columns = weight.shape
    block = scheme.block or rows
    stored = ml_dtypes.float8_e4m3fn if scheme.dtype == FP8 else np.int8
    numbers = np.empty((rows, columns), stored)
    scales = np.empty((rows // block, columns), scale_type)
    by = None if importance is None else np.asarray(importance, np.float32).reshape(-1, block)
    for part in chunks(weight.shape, axis=1):
        blocks = weight[part].astype(np.float32).reshape(rows // block, block, -1)
        found, scales[part] = _best(blocks, scheme.dtype, scale_type, by)
        numbers[part] = found.reshape(rows, -1).astype(stored)
    return Quantised(numbers, scales if scheme.block else scales[0])


def _best(
    blocks: Array, dtype: str, scale_type: DTypeLike, importance: Array | None = None
) -> tuple[Array, Array]:
    """Numbers [in / block, block, out] and scales [in / block, out] with the least squared
    error. importance: factor [in / block, block] of the squares."""
    peak = np.abs(blocks).max(1)
    scales = _rounded(peak / _MAX[dtype], scale_type)
    numbers = _numbers(blocks, scales, dtype)
    if dtype != INT4:
        return numbers, scales
    error = _squares(numbers, scales, blocks, importance)
    for ratio in CLIP_RATIOS:
        other = _rounded(peak * (ratio / _MAX[dtype]), scale_type)
        tried = _numbers(blocks, other, dtype)
        found = _squares(tried, other, blocks, importance)
        better = found < error
        numbers = np.where(better[:, None], tried, numbers)
        scales, error = np.where(better, other, scales), np.minimum(found, error)
    return numbers, scales


def _squares(
    numbers: Array, scales: Array, blocks: Array, importance: Array | None = None
) -> Array:
    rest = numbers * scales.astype(np.float32)[:, None] - blocks
    other = rest if importance is None else rest * importance[:, :, None]
    squares: Array = np.einsum("ibo,ibo->io", rest, other)
    return squares


def _rounded(scales: Array, scale_type: DTypeLike) -> Array:
    """Round scales to their stored type; zero becomes the smallest normal value."""
    least = float(ml_dtypes.finfo(scale_type).smallest_normal)
    return np.maximum(scales, least).astype(scale_type)


def _numbers(blocks: Array, scales: Array, dtype: str) -> Array:
    """Divide by the scales and clip: float32 [in / block, block, out], rounded except for
    float8."""
    found = blocks / scales.astype(np.float32)[:, None]
    found = np.clip(found, _MIN[dtype], _MAX[dtype], out=found)
    return found if dtype == FP8 else np.rint(found, out=found)


def pack_blocks(quantised: Quantised, bits: int) -> tuple[Array, Array]:
    """Pack for ONNX Runtime's MatMulNBits.

    Returns numbers uint8 [out, in / block, block * bits / 8] with zero point 2 ** (bits - 1), two
    int4 a byte, the first in the low half; and scales [out * in / block].
    """
    count, columns = quantised.scales.shape
    middle = 2 ** (bits - 1)
    numbers: Array = quantised.numbers.T.astype(np.uint8) + np.uint8(middle)  # [out, in], mod 256
    if bits == 4:
        numbers = numbers[:, 0::2] | (numbers[:, 1::2] << 4)
    return numbers.reshape(columns, count, -1), np.ascontiguousarray(quantised.scales.T).reshape(-1)
