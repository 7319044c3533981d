"""The kernels of `mmi::WeightOnlyMatMul` against float64: their PTX in the emulator, and their
source compiled by g++ with a fiber for every thread."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emulator.sanitized import check_sanitized
from mmi_deploy.errors import EngineError
from mmi_emulator import gemv, shim
from mmi_emulator.emulator import EMULATOR
from mmi_emulator.ptx import Fault, Kernel, parse
from mmi_plugins.compile import nvrtc
from mmi_plugins.constants import CSRC
from mmi_plugins.gemv.calls import draw
from mmi_plugins.gemv.launch_plan import GEMV_VARIANTS, ROWS_VARIANTS, GemvVariant, launch_of
from mmi_plugins.gemv.operator import BLOCKS, FORMATS, TOLERANCES, GemvCall
from mmi_plugins.gemv.reference import gemv_reference

DTYPES = tuple(TOLERANCES)
ALL = (*GEMV_VARIANTS, *ROWS_VARIANTS)
needs_emulator = pytest.mark.skipif(EMULATOR.missing() is not None, reason=str(EMULATOR.missing()))
needs_compiler = pytest.mark.skipif(
    shim.SHIM.missing() is not None, reason=str(shim.SHIM.missing())
)


def variants(dtype: str) -> Iterator[GemvVariant]:
    return (variant for variant in ALL if variant.dtype == dtype)


def draws(variant: GemvVariant) -> Iterator[GemvCall]:
    """Every number of rows of decoding; part of a step, some steps, more than all warps have; tiles
    that are full, and one that has a single channel. Of many rows: part of eight, one and more
    tiles of them, a row in the last; more tiles of channels than a block has."""
    rng = np.random.default_rng(ALL.index(variant))
    unit = variant.block or 32
    few = zip(
        range(1, 9),
        (32, 96, 128, 224, 1152, 1184, 1024, 2240),
        (16, 1, 17, 40, 32, 15, 9, 31),
        strict=True,
    )
    many = ((9, 32, 17), (64, 384, 16), (65, 160, 1), (83, 224, 145))
    for rows, inputs, outputs in many if variant.rows else few:
        yield draw(
            rng,
            variant.format,
            variant.dtype,
            rows=rows,
            inputs=unit * -(-inputs // unit),
            outputs=outputs,
            block=variant.block,
        )


def error(call: GemvCall, found: np.ndarray) -> float:
    """Relative rms error."""
    expected = gemv_reference(call)
    assert np.isfinite(found).all()
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


def kernels_of(dtype: str, compute: int, compiler: str = "nvrtc") -> dict[str, Kernel]:
    if reason := nvrtc.missing(compiler):
        pytest.skip(reason)

    class Unit:
        source = "".join(variant.source for variant in variants(dtype))

    return parse(nvrtc.compile_ptx(Unit(), compute, compiler))


@pytest.mark.parametrize(
    ("compute", "compiler"), [(80, "nvrtc"), (90, "nvrtc"), (100, "nvcc"), (120, "nvrtc")]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ptx_agrees_with_float64(dtype: str, compute: int, compiler: str) -> None:
    kernels = kernels_of(dtype, compute, compiler)
    for variant in variants(dtype):
        for call in draws(variant):
            found, _ = gemv.emulate(call, lambda each: kernels[each.name])
            assert error(call, found) <= TOLERANCES[dtype], (variant.name, call.input.shape)


@needs_compiler
@pytest.mark.parametrize("variant", ALL, ids=lambda variant: variant.name)
@pytest.mark.parametrize("backwards", [False, True])
def test_the_source_agrees_with_float64_whatever_the_order_of_threads(
    variant: GemvVariant, backwards: bool
) -> None:
    for call in draws(variant):
        found = gemv.run_shim(call, shim.Shim(backwards=backwards))
        assert error(call, found) <= TOLERANCES[variant.dtype], call.input.shape


@needs_compiler
@pytest.mark.parametrize("variant", GEMV_VARIANTS, ids=lambda variant: variant.name)
def test_every_number_of_a_format_is_exact(variant: GemvVariant) -> None:
    """One input channel is 1 at a time: outputs are numbers times scales, rounded once."""
    unit, outputs = variant.block or 32, 256
    rng = np.random.default_rng(0)
    call = draw(
        rng, variant.format, variant.dtype, inputs=unit, outputs=outputs, block=variant.block
    )
    if variant.format == "float8_e4m3fn":
        every = np.arange(256, dtype=np.uint8)
        every[every & 0x7F == 0x7F] = 0
    else:
        most = 8 if variant.format == "int4" else 128
        every = (np.arange(256) % (2 * most) - most).astype(np.int8)
    call.numbers[3] = every.view(call.numbers.dtype)
    call.scales[...] = 0.125
    call.input[:] = 0
    call.input[0, 3] = 1
    expected = (call.numbers[3].astype(np.float64) * 0.125).astype(call.input.dtype)
    np.testing.assert_array_equal(gemv.run_shim(call)[0], expected.astype(np.float64))
    assert len(np.unique(expected)) == {"int8": 256, "int4": 16}.get(variant.format, 253)


@needs_emulator
def test_sums_are_float32() -> None:
    """A sum in float16 would stay at 2048, and one in bfloat16 at 256."""
    for dtype in DTYPES:
        call = draw(np.random.default_rng(0), "int8", dtype, inputs=8192, outputs=16)
        call.input[:], call.numbers[:], call.scales[:] = 1, 1, 1
        assert (gemv.emulate(call)[0] == 8192).all()


@needs_emulator
def test_rows_do_not_meet() -> None:
    """A row that is not finite spoils itself alone; rows that a call does not have are not read."""
    call = draw(np.random.default_rng(0), "int4", rows=3, inputs=160, outputs=17, block=32)
    clean = gemv.emulate(call)[0]
    call.input[1, 7] = np.nan
    spoilt = gemv.emulate(call)[0]
    assert np.isnan(spoilt[1]).all()
    np.testing.assert_array_equal(spoilt[[0, 2]], clean[[0, 2]])


@needs_emulator
@pytest.mark.parametrize("what", ["rows", "in", "steps"])
def test_reading_outside_an_input_is_a_fault(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is told of more than there is: what the emulator must see."""
    call = draw(np.random.default_rng(0), "int8", rows=2, inputs=128, outputs=16)
    place = {"rows": 32, "in": 36, "steps": 44}[what]

    def boasting(*arguments: object) -> object:
        launch = launch_of(*arguments)  # type: ignore[arg-type]
        more = bytearray(launch.parameter)
        more[place : place + 4] = (9 * int.from_bytes(more[place : place + 4], "little")).to_bytes(
            4, "little"
        )
        return type(launch)(launch.variant, launch.grid, bytes(more))

    monkeypatch.setattr(gemv, "launch_of", boasting)
    with pytest.raises(Fault, match="outside (input|weight|output)"):
        gemv.emulate(call)


class _GemvCall(ctypes.Structure):
    """`mmi::GemvCall` of `csrc/gemv.h`."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        *[(name, ctypes.c_void_p) for name in ("input", "weight", "scales", "output")],
        *[(name, ctypes.c_int32) for name in ("rows", "in_", "out", "block")],
    ]


def cpp_plan(**changed: int) -> tuple[bytes, list[int]] | str:
    given = _GemvCall(1, 0, 0x1000, 0x2000, 0x3000, 0x4000, 3, 160, 40, 0)
    for name, number in changed.items():
        setattr(given, name, number)
    parameter, grid = ctypes.create_string_buffer(48), (ctypes.c_uint32 * 4)()
    refused = shim.load(shim.build()).mmi_shim_gemv_plan(ctypes.byref(given), parameter, grid)
    return refused.decode() if refused else (parameter.raw, list(grid))


@needs_compiler
def test_the_plan_in_c_plus_plus_is_the_plan_in_python() -> None:
    rng = np.random.default_rng(0)
    addresses = {"input": 0x1000, "weight": 0x2000, "scales": 0x3000, "output": 0x4000}
    for number, format_ in enumerate(FORMATS):
        block = 32 if format_ == "int4" else 0
        for rows, outputs in ((3, 40), (8, 129), (9, 129), (129, 40)):
            call = draw(rng, format_, rows=rows, inputs=160, outputs=outputs, block=block)
            launch = launch_of(call, addresses)
            assert launch.variant.rows == (rows > 8)
            expected = (launch.parameter, [*launch.grid, launch.variant.threads])
            assert cpp_plan(format=number, block=block, rows=rows, out=outputs) == expected


@needs_compiler
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"type": 0}, "neither float16 nor bfloat16"),
        ({"format": 3}, "neither int8, float8 nor int4"),
        ({"rows": 0}, "there are no rows"),
        ({"rows": 2**31 - 1}, "2^31 rows"),
        ({"rows": 9, "out": 2**23}, "2^23 output channels"),
        ({"in_": 48}, "not a multiple of 32"),
        ({"in_": 0}, "not a multiple of 32"),
        ({"out": 0}, "no output channels"),
        ({"block": 32}, "have no blocks"),
        ({"format": 2}, "not 32, 64 or 128"),
        ({"format": 2, "block": 16}, "not 32, 64 or 128"),
        ({"format": 2, "block": 64}, "not a multiple of the block"),
        ({"in_": 2**31 - 32}, "2^31"),
        ({"out": 2**31 - 1}, "2^31"),
        ({"input": 0}, "a pointer is missing"),
        ({"output": 0}, "a pointer is missing"),
        ({"weight": 0x2008}, "not aligned to 16"),
        ({"scales": 0x3002}, "not aligned to 16"),
    ],
)
def test_calls_that_cannot_run_are_refused_with_a_reason(
    changed: dict[str, int], reason: str
) -> None:
    refused = cpp_plan(**changed)
    assert isinstance(refused, str) and reason in refused


@needs_compiler
def test_a_barrier_that_is_left_out_is_found() -> None:
    lines = (CSRC / "gemv.cuh").read_text().splitlines()
    (barrier,) = [n for n, line in enumerate(lines, 1) if re.search(r"__syncthreads\(", line)]
    call = draw(np.random.default_rng(0), "int8", rows=8, inputs=1024, outputs=16)
    found = gemv.run_shim(call, shim.Shim(without=barrier))
    assert not np.allclose(found, gemv_reference(call), atol=0.1)


@needs_emulator
def test_a_barrier_of_many_rows_that_is_left_out_is_a_race() -> None:
    call = draw(np.random.default_rng(0), "int8", rows=64, inputs=384, outputs=128)
    kernel = gemv.compiled(GemvVariant("float16", "int8", rows=True))
    barriers = [
        index for index, each in enumerate(kernel.instructions) if each.text.startswith("bar")
    ]
    assert len(barriers) == 3
    for index in barriers:
        changed = kernel.with_instruction(index, "membar.cta")
        with pytest.raises(Fault, match="no barrier between them"):
            gemv.emulate(call, lambda _, changed=changed: changed)  # type: ignore[misc]


@needs_emulator
def test_many_rows_do_not_meet() -> None:
    """As `test_rows_do_not_meet`, with a tile whose last row is alone among eight."""
    call = draw(np.random.default_rng(0), "int4", rows=73, inputs=160, outputs=17, block=32)
    clean = gemv.emulate(call)[0]
    call.input[64, 7] = np.nan
    spoilt = gemv.emulate(call)[0]
    assert np.isnan(spoilt[64]).all()
    others = np.arange(73) != 64
    np.testing.assert_array_equal(spoilt[others], clean[others])


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "missing", lambda compiler="nvrtc": f"{compiler} is not installed")
    with pytest.raises(EngineError, match="nvrtc is not installed"):
        gemv.compiled(GemvVariant("float16", "int4", BLOCKS[0]), 81)


_SANITIZED = """
import sys
import numpy as np
from emulator.test_gemv import draws
from mmi_emulator import gemv, shim
from mmi_plugins.constants import CSRC
from mmi_plugins.gemv import launch_plan, packing

runs = shim.Shim(shim.build(CSRC, *shim.SANITIZERS))
if sys.argv[1] != "inside":
    whole = gemv.device_arrays
    cut = {"input": 16, "weight": 16, "scales": 2}[sys.argv[1]]
    gemv.device_arrays = lambda call: {
        name: array.reshape(-1)[: array.size - cut // array.itemsize * (name == sys.argv[1])]
        for name, array in whole(call).items()
    }
for variant in (*launch_plan.GEMV_VARIANTS, *launch_plan.ROWS_VARIANTS):
    for call in draws(variant):
        gemv.run_shim(call, runs)
print("clean")
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("what", ("inside", "input", "weight", "scales"))
def test_no_step_beyond_memory_and_no_undefined_behaviour(what: str, tmp_path: Path) -> None:
    """Under AddressSanitizer and UndefinedBehaviorSanitizer; arrays cut short by their last number
    show that they see it."""
    check_sanitized(_SANITIZED, what, tmp_path)
