"""Packed weights of `mmi::WeightOnlyMatMul`: a warp reads 512 contiguous bytes at once.

`csrc/gemv.cuh` has the order. `quantise.Quantised` of `mmi_deploy.targets.precision` has the arrays
to pack.
"""

from __future__ import annotations

import numpy as np

from mmi_plugins.constants import constant
from mmi_plugins.gemv.operator import FORMATS, check_supported

_TILE, _STEP = constant("kGemvOutputs"), constant("kGemvStep")
_CHUNKS = _STEP // constant("kGemvChunk")


def tiles_of(outputs: int) -> int:
    """Tiles of output channels."""
    return -(-outputs // _TILE)


def steps_of(inputs: int) -> int:
    """Steps of input channels."""
    return -(-inputs // _STEP)


def words_of(format_: str) -> int:
    """32-bit words of a tile and step."""
    return _TILE * _STEP * (4 if format_ == "int4" else 8) // 32


def weight_shape(format_: str, inputs: int, outputs: int) -> tuple[int, int, int]:
    """Shape of a packed weight, int32 [tiles, steps, words]."""
    return tiles_of(outputs), steps_of(inputs), words_of(format_)


def scales_shape(inputs: int, outputs: int, block: int) -> tuple[int, ...]:
    """Shape of packed scales: [out], or [tiles, steps, 8, blocks of a step, 2]."""
    if not block:
        return (outputs,)
    return tiles_of(outputs), steps_of(inputs), 8, _STEP // block, 2


def pack_weight(format_: str, numbers: np.ndarray) -> np.ndarray:
    """Pack `numbers` [in, out], int8 (also for int4) or float8, as int32 [tiles, steps, words].

    Raises `EngineError` for sizes that no kernel takes, `ValueError` for a float8 that is NaN and
    numbers outside int4.
    """
    inputs, outputs = numbers.shape
    check_supported(format_, inputs, outputs, 32 if format_ == "int4" else 0)
    zero = {"int8": 128, "int4": 8}.get(format_, 0)  # as it is stored
    whole = np.full((steps_of(inputs) * _STEP, tiles_of(outputs) * _TILE), zero, np.uint8)
    whole[:inputs, :outputs] = _stored(format_, numbers)
    # [step, chunk, t, channel of 8, tile, half of the tile, g]
    apart = whole.reshape(-1, _CHUNKS, 4, 8, tiles_of(outputs), 2, 8)
    if format_ == "int4":
        pairs = apart.reshape(-1, 2, 2, 4, 4, 2, tiles_of(outputs), 2, 8)
        # step, load, chunk, t, p, e, tile, half, g -> tile, step, load, g, t, chunk, half, e, p
        nibbles = pairs.transpose(6, 0, 1, 8, 3, 2, 7, 5, 4).reshape(-1, 2)
        packed = nibbles[:, 0] | nibbles[:, 1] << np.uint8(4)
    else:
        quads = apart.reshape(-1, _CHUNKS, 4, 2, 4, tiles_of(outputs), 2, 8)
        # step, load, t, i, channel, tile, half, g -> tile, step, load, g, t, i, half, channel
        packed = quads.transpose(5, 0, 1, 7, 2, 3, 6, 4)
    words = np.ascontiguousarray(packed).reshape(-1).view(np.int32)
    return words.reshape(weight_shape(format_, inputs, outputs))


def _stored(format_: str, numbers: np.ndarray) -> np.ndarray:
    """Numbers as the bytes that kernels read."""
    assert format_ in FORMATS
    if format_ == "float8_e4m3fn":
        bits = numbers.view(np.uint8)
        if ((bits & 0x7F) == 0x7F).any():
            raise ValueError("a float8 weight is NaN")
        return bits
    middle, least = (8, -8) if format_ == "int4" else (128, -128)
    if format_ == "int4" and ((numbers < least) | (numbers >= middle)).any():
        raise ValueError("a number is outside int4")
    stored: np.ndarray = (numbers.astype(np.int16) + middle).astype(np.uint8)
    return stored


def pack_scales(scales: np.ndarray, inputs: int) -> np.ndarray:
    """Pack scales [out], which stay, or [in / block, out] in the order of `scales_shape`."""
    if scales.ndim == 1:
        return scales
    blocks, outputs = scales.shape
    block = inputs // blocks
    each = _STEP // block
    whole = np.zeros((steps_of(inputs) * each, tiles_of(outputs) * _TILE), scales.dtype)
    whole[:blocks, :outputs] = scales
    apart = whole.reshape(-1, each, tiles_of(outputs), 2, 8)  # [step, block, tile, half, g]
    return np.ascontiguousarray(apart.transpose(2, 0, 4, 1, 3))
