"""Packed weights of `mmi::WeightOnlyMatMul`: every number is where the kernels' comment says."""

from __future__ import annotations

from itertools import product

import ml_dtypes
import numpy as np
import pytest

from mmi_deploy.errors import EngineError
from mmi_deploy.targets.precision.quantise import quantise
from mmi_deploy.targets.precision.recipes import FP8, INT4, INT8, Scheme
from mmi_plugins.gemv import packing
from mmi_plugins.gemv.calls import draw
from mmi_plugins.gemv.operator import BLOCKS, FORMATS, GemvCall
from mmi_plugins.gemv.reference import gemv_reference

SIZES = [(32, 1), (160, 17), (256, 32), (1280, 40)]


def read_back(format_: str, packed: np.ndarray, inputs: int, outputs: int) -> np.ndarray:
    """Numbers [inputs, outputs] of a packed weight, one by one as the comment in gemv.cuh says."""
    data = packed.reshape(packed.shape[0], packed.shape[1], -1).view(np.uint8)
    found = np.zeros((inputs, outputs), np.int32)
    for k, n in product(range(inputs), range(outputs)):
        tile, step = n // 16, k // 128
        g, half = n % 8, n % 16 // 8
        chunk, t, channel = k % 128 // 32, k % 32 // 8, k % 8
        lane = 4 * g + t
        if format_ == "int4":
            load, within = divmod(chunk, 2)
            word = 4 * (32 * load + lane) + 2 * within + half
            nibble = channel // 2 + 4 * (channel % 2)
            byte = int(data[tile, step, 4 * word + nibble // 2])
            found[k, n] = (byte >> 4 * (nibble % 2) & 15) - 8
        else:
            word = 4 * (32 * chunk + lane) + 2 * (channel // 4) + half
            byte = data[tile, step, 4 * word + channel % 4]
            found[k, n] = int(byte) - 128 if format_ == "int8" else byte
    return found


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_every_number_is_in_its_place(format_: str, inputs: int, outputs: int) -> None:
    block = 32 if format_ == "int4" else 0
    call = draw(np.random.default_rng(0), format_, inputs=inputs, outputs=outputs, block=block)
    packed = packing.pack_weight(format_, call.numbers)
    assert packed.shape == packing.weight_shape(format_, inputs, outputs)
    assert packed.dtype == np.int32
    stored = call.numbers.view(np.uint8) if format_ == "float8_e4m3fn" else call.numbers
    np.testing.assert_array_equal(read_back(format_, packed, inputs, outputs), stored)


@pytest.mark.parametrize("format_", FORMATS)
def test_numbers_beyond_the_weight_are_zero(format_: str) -> None:
    """In a step of 128 input channels and a tile of 16 output channels that are not all used."""
    numbers = np.ones((32, 1), np.int8 if format_ != "float8_e4m3fn" else ml_dtypes.float8_e4m3fn)
    packed = packing.pack_weight(format_, numbers)
    whole = read_back(format_, packed, 128, 16)
    assert (whole[:32, 0] != 0).all() and np.count_nonzero(whole) == 32


@pytest.mark.parametrize("block", BLOCKS)
def test_every_scale_is_in_its_place(block: int) -> None:
    inputs, outputs = 3 * 128, 21
    scales = np.arange(inputs // block * outputs, dtype=np.float16).reshape(-1, outputs)
    packed = packing.pack_scales(scales, inputs)
    assert packed.shape == packing.scales_shape(inputs, outputs, block)
    for group, n in product(range(inputs // block), range(outputs)):
        step, within = divmod(group, 128 // block)
        assert packed[n // 16, step, n % 8, within, n % 16 // 8] == scales[group, n]
    assert np.count_nonzero(packed) == scales.size - 1
    flat = np.arange(outputs, dtype=np.float16)
    np.testing.assert_array_equal(packing.pack_scales(flat, inputs), flat)


@pytest.mark.parametrize("scheme", [Scheme(INT8), Scheme(FP8), Scheme(INT4, 32), Scheme(INT4, 128)])
def test_it_takes_what_the_recipes_quantise(scheme: Scheme) -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(256, 24)).astype(np.float32)
    quantised = quantise(weight, scheme, np.float16)
    call = GemvCall(
        scheme.dtype,
        rng.normal(size=(2, 256)).astype(np.float16),
        quantised.numbers,
        quantised.scales,
    )
    expected = call.input.astype(np.float64) @ quantised.dequantised()
    np.testing.assert_allclose(gemv_reference(call), expected, rtol=1e-4, atol=1e-4)
    packed = packing.pack_weight(call.format, call.numbers)
    stored = call.numbers.view(np.uint8) if scheme.dtype == FP8 else call.numbers
    np.testing.assert_array_equal(read_back(call.format, packed, 256, 24), stored)


@pytest.mark.parametrize(
    ("format_", "inputs", "block", "reason"),
    [
        ("int8", 48, 0, "input channels are not a multiple of 32"),
        ("int4", 64, 16, "a block of int4 is not 32, 64 or 128"),
        ("int4", 64, 0, "a block of int4 is not 32, 64 or 128"),
        ("int8", 64, 32, "int8 and float8 have no blocks"),
        ("int2", 64, 0, "neither int8, float8 nor int4"),
    ],
)
def test_other_weights_are_refused(format_: str, inputs: int, block: int, reason: str) -> None:
    numbers = np.zeros((inputs, 16), np.int8)
    scales = np.ones((inputs // block, 16) if block else 16, np.float16)
    with pytest.raises(EngineError, match=reason):
        GemvCall(format_, np.zeros((1, inputs), np.float16), numbers, scales)


def test_numbers_that_a_format_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="outside int4"):
        packing.pack_weight("int4", np.full((32, 1), 8, np.int8))
    with pytest.raises(ValueError, match="NaN"):
        packing.pack_weight(
            "float8_e4m3fn", np.full((32, 1), 0xFF, np.uint8).view(ml_dtypes.float8_e4m3fn)
        )


def test_rows_and_shapes_are_checked() -> None:
    numbers, scales = np.zeros((32, 16), np.int8), np.ones(16, np.float16)
    with pytest.raises(EngineError, match="there are no rows"):
        GemvCall("int8", np.zeros((0, 32), np.float16), numbers, scales)
    with pytest.raises(EngineError, match="differ"):
        GemvCall("int8", np.zeros((1, 64), np.float16), numbers, scales)
