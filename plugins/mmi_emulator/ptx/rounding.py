"""Hardware rounding: single rounding of fma, bfloat16 and approximate results on NumPy floats.

bfloat16 numbers are their 16 bits (uint16).
"""

from __future__ import annotations

import numpy as np

_TIE = np.uint64(0x1000_0000)
_BELOW_FLOAT32 = np.uint64(0x1FFF_FFFF)
_SMALLEST_NORMAL = np.float32(2.0**-126)


def sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd where inexact, so that one more rounding to a format of at
    most 51 bits gives what rounding the exact sum would have given."""
    total = a + b
    back = total - a
    rest = (a - (total - back)) + (b - back)  # exact: total + rest == a + b
    bits = total.view(np.int64)
    change = (rest != 0) & ((bits & 1) == 0) & np.isfinite(rest)
    toward = np.where((rest > 0) == (total > 0), 1, -1)
    return np.where(change, bits + toward, bits).view(np.float64)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32 numbers, rounded once."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    result = total.astype(np.float32)
    # The second rounding can only differ on an apparent tie, or among the subnormals.
    doubtful = (total.view(np.uint64) & _BELOW_FLOAT32) == _TIE
    doubtful |= np.abs(result) <= _SMALLEST_NORMAL
    if doubtful.any():
        wide = np.broadcast_to(np.asarray(c, np.float64), total.shape)[doubtful]
        result[doubtful] = sum_to_odd(product[doubtful], wide).astype(np.float32)
    return result


def bfloat16(number: np.ndarray) -> np.ndarray:
    """float64 or float32 numbers to the nearest bfloat16, ties to even; NaN is 0x7fff."""
    single = number.astype(np.float32)
    bits = single.view(np.uint32)
    if number.dtype == np.float64:  # round to odd first, so that the second rounding is right
        rest = number - single.astype(np.float64)
        change = (rest != 0) & ((bits & 1) == 0) & np.isfinite(rest) & (single != 0)
        toward = np.where((rest > 0) == (single > 0), 1, -1).astype(np.int32)
        bits = np.where(change, bits.view(np.int32) + toward, bits.view(np.int32)).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    short = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FFF), short)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (np.asarray(bits, np.uint32) << np.uint32(16)).view(np.float32)


def flushed(number: np.ndarray) -> np.ndarray:
    """float32 with subnormals turned into zeros of the same sign (`.ftz`)."""
    return np.where(np.abs(number) < _SMALLEST_NORMAL, np.copysign(np.float32(0), number), number)


def approximate(exact: np.ndarray, ulps: int) -> np.ndarray:
    """A float32 result with the error that the instruction set allows: `exact` (float64) rounded,
    then moved by up to `ulps` units in the last place, the same for equal numbers.

    Powers of two stay exact, as 2^0 and 1/1 are on every GPU; so do zero and infinity.
    """
    result = exact.astype(np.float32)
    bits = result.view(np.uint32)
    exponent = bits & np.uint32(0x7F80_0000)
    movable = (exponent != 0) & (exponent != 0x7F80_0000) & ((bits & np.uint32(0x7F_FFFF)) != 0)
    shuffled = (bits * np.uint32(2654435761)) >> np.uint32(16)
    move = (shuffled % np.uint32(2 * ulps + 1)).astype(np.int32) - ulps
    return np.where(movable, bits.view(np.int32) + move, bits.view(np.int32)).view(np.float32)
