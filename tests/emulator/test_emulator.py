"""The PTX that the compilers really emit, in the emulator, against float64.

Every kernel, from NVRTC and from nvcc, for compute capabilities 80, 90, 100 and 120. Which kernels
meet which compiler and capability rotates here; the exhaustive test runs all of them in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

from mmi_deploy.errors import EngineError
from mmi_emulator import emulator
from mmi_emulator.emulator import EMULATOR, emulate
from mmi_emulator.ptx import Fault, GlobalMemory, Kernel, Machine, parse
from mmi_plugins import reference
from mmi_plugins.compile import nvrtc
from mmi_plugins.compile.launch_plan import (
    VARIANTS,
    Variant,
    constant,
    default_parts,
    device_arrays,
    kernel_variants,
    launch_plan,
    output_array,
    workspace_shape,
)
from mmi_plugins.conformance import calls
from mmi_plugins.operator import TOLERANCES, Call

COMPUTES = (80, 90, 100, 120)

# Smallest normal numbers: outputs below have no relative precision.
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}


@dataclass(frozen=True)
class Unit:
    """Several kernels, compiled together because compilers take longest to start."""

    variants: tuple[Variant, ...]

    @property
    def source(self) -> str:
        return "".join(variant.source for variant in self.variants)


@cache
def compiled(unit: Unit, compute: int, compiler: str) -> dict[str, Kernel]:
    """The kernels of a unit by name; skips where the compiler is not installed."""
    if reason := nvrtc.missing(compiler):
        pytest.skip(reason)
    return parse(nvrtc.compile_ptx(unit, compute, compiler))  # type: ignore[arg-type]


def check(call: Call, kernels: dict[str, Kernel], parts: int, what: str) -> None:
    """At most 24 rows of the call, drawn at random, are within the tolerance of their type."""
    rows = reference.all_rows(call)
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:24])
    found = emulate(call, rows[chosen], lambda each: kernels[each.name], parts=parts).output
    expected = reference.mmfs_reference(call, rows[chosen])
    assert np.isfinite(found).all(), what
    error = np.sqrt(((found - expected) ** 2).mean())
    scale = max(np.sqrt((expected**2).mean()), SMALLEST[call.dtype])
    worst = np.abs(found - expected).max()
    assert error <= TOLERANCES[call.dtype].relative * scale, (
        f"{what}: relative error {error / scale:.2g}, largest {worst:.2g}; "
        f"{call.dtype}, {parts} parts, {call.sizes}"
    )


def draws_for(variant: Variant, seed: int, count: int) -> Iterator[tuple[str, Call, int]]:
    """Calls that run `variant`, every situation in turn, each with a number of parts."""
    rng = np.random.default_rng([seed, VARIANTS.index(variant)])
    widths = (128, 80, 72, 96) if variant.wide else (64, 24, 8, 40, 16, 32, 56, 48)
    if variant.dtype == "float32":
        widths = (64, 24, 8, 40, 128, 80, 16, 104)
    for index in range(count):
        situation = calls.SITUATIONS[(index + seed) % len(calls.SITUATIONS)]
        d = widths[int(rng.integers(len(widths)))]
        call = calls.draw(rng, situation, dtype=variant.dtype, d=d)
        parts = {"rows": 0, "split": 1, "merge": 2 + index % 4}[variant.kind]
        assert variant in kernel_variants(call, parts)
        yield f"{variant.name}, {situation}", call, parts


def with_helpers(variants: list[Variant]) -> tuple[Variant, ...]:
    """`variants`, and what must run before a `merge`."""
    further = [
        Variant(variant.dtype, "split", wide)
        for variant in variants
        if variant.kind == "merge"
        for wide in (False, True)
        if not (wide and variant.dtype == "float32")
    ]
    return tuple(dict.fromkeys([*variants, *further]))


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("compiler", nvrtc.COMPILERS)
def test_kernels_agree_with_float64(compiler: str, compute: int) -> None:
    """A quarter of the kernels for each pair; each kernel meets all situations, half with each
    compiler."""
    turn = COMPUTES.index(compute) + 2 * nvrtc.COMPILERS.index(compiler)  # other ones with nvcc
    variants = [variant for i, variant in enumerate(VARIANTS) if (i + turn) % 4 == 0]
    kernels = compiled(Unit(with_helpers(variants)), compute, compiler)
    for variant in variants:
        for what, call, parts in draws_for(variant, 4 * nvrtc.COMPILERS.index(compiler), 4):
            check(call, kernels, parts, what)


@pytest.mark.exhaustive
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("compiler", nvrtc.COMPILERS)
def test_all_kernels_in_all_situations(compiler: str, compute: int) -> None:
    kernels = compiled(Unit(VARIANTS), compute, compiler)
    for variant in VARIANTS:
        for what, call, parts in draws_for(variant, 1000 + compute, 2 * len(calls.SITUATIONS)):
            check(call, kernels, parts, what)


KERNEL_TYPES = [pytest.param(dtype, id=dtype) for dtype in TOLERANCES]


@pytest.fixture(scope="module", params=KERNEL_TYPES)
def kernels(request: pytest.FixtureRequest) -> tuple[str, dict[str, Kernel]]:
    """All kernels of one type."""
    dtype = request.param
    unit = Unit(tuple(variant for variant in VARIANTS if variant.dtype == dtype))
    return dtype, compiled(unit, 90, emulator.compiler() or "nvrtc")


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_every_size_of_head(kernels: tuple[str, dict[str, Kernel]], parts: int) -> None:
    """All multiples of 8 up to 128, with all numbers of points and of levels along the way."""
    dtype, compiled_ = kernels
    rng = np.random.default_rng(parts)
    all_levels = (
        [(5, 7)],
        [(6, 3), (1, 2)],
        [(4, 4), (2, 2), (3, 1)],
        [(4, 2), (2, 2), (1, 3), (1, 1)],
    )
    for index, d in enumerate(range(8, 129, 8)):
        p, levels = index % 16 + 1, all_levels[index % 4]
        call = calls.draw(rng, dtype=dtype, d=d, p=p, levels=levels, b=1 + index % 4, h=1, q=1)
        check(call, compiled_, parts, f"head size {d}, {p} points, {len(levels)} levels")


@pytest.mark.parametrize("parts", [0, 4])
def test_many_images_and_many_queries(kernels: tuple[str, dict[str, Kernel]], parts: int) -> None:
    """More images than a warp has lanes, more queries than a block has rows."""
    dtype, compiled_ = kernels
    rng = np.random.default_rng(3)
    for m, q in ((1, 1), (49, 1), (70, 2), (2, 130)):
        call = calls.draw(rng, dtype=dtype, d=32, p=4, m=m, q=q, r=9, b=1, h=2)
        check(call, compiled_, parts, f"{m} images, {q} queries")


def test_blocks_share_a_row_of_many_images_equally() -> None:
    """Also where the images are more than a warp looks at together: no warp takes two turns where
    each could take one."""
    if reason := EMULATOR.missing():
        pytest.skip(reason)
    sizes = {"m": 49, "p": 8, "q": 1, "b": 1, "h": 1, "d": 64, "n": 3, "r": 50, "levels": [(8, 8)]}
    call = calls.draw(np.random.default_rng(4), dtype="float16", **sizes)
    call.inputs["image_position"][:] = np.arange(1, 50)
    parts, per_block = default_parts(call), constant("kSplitWarps") * constant("kSplitPairs")
    assert parts == -(-49 * 8 // per_block)
    arrays, output = device_arrays(call), output_array(call)
    memory = GlobalMemory(2**22)
    addresses = {name: memory.allocate(array, name) for name, array in arrays.items()}
    addresses["output"] = memory.reserve(output.nbytes, "output")
    addresses["workspace"] = memory.reserve(4 * int(np.prod(workspace_shape(call))), "workspace")
    launch = launch_plan(call, addresses)[0]
    kernel = emulator.default_kernel(launch.variant)
    taken = []
    for block in range(parts):
        machine = Machine(
            kernel, memory, launch.grid, launch.block, launch.parameter, blocks=[block]
        )
        taken.append(machine.run().by_name()["mma"])
        memory.next_blocks()
    full = taken[0]  # 8 warps, a turn each
    assert taken[:-1] == [full] * (parts - 1) and 0 < taken[-1] <= full


def test_a_row_that_sees_nothing_is_its_null_value_or_zero(
    kernels: tuple[str, dict[str, Kernel]],
) -> None:
    dtype, compiled_ = kernels
    for null_slot in (False, True):
        rng = np.random.default_rng(4)
        call = calls.draw(rng, "all hidden", dtype=dtype, null_slot=null_slot, d=24, h=2, m=5)
        rows = reference.all_rows(call)
        for parts in (0, 1, 3):
            found = emulate(call, rows, lambda each: compiled_[each.name], parts=parts).output
            null = calls.rounded(call["null_value"], dtype)[rows[:, 2]]
            np.testing.assert_array_equal(found, null if null_slot else np.zeros_like(null))


def needs_emulator() -> None:
    if reason := EMULATOR.missing():
        pytest.skip(reason)


def test_rows_are_run_on_demand() -> None:
    """Only the blocks of the rows asked for; the rows come in the order asked for."""
    needs_emulator()
    call = calls.draw(np.random.default_rng(1), dtype="float16", b=2, q=17, h=5, d=64)
    rows = reference.all_rows(call)[[160, 3, 77]]
    part = emulate(call, rows, emulator.default_kernel)
    whole = emulate(call, reference.all_rows(call), emulator.default_kernel)
    np.testing.assert_array_equal(part.output, whole.output[[160, 3, 77]])
    np.testing.assert_array_equal(part.output, EMULATOR.run(call, rows))
    assert part.lane_instructions < whole.lane_instructions / 10


def test_reading_outside_an_input_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is told of one more image in the pool, and of one more table row, than there
    are: what the emulator must see."""
    needs_emulator()
    plan = emulator.launch_plan
    call = calls.draw(np.random.default_rng(1), dtype="float32", n=2, r=2, m=2, b=1, q=2)
    rows = reference.all_rows(call)

    @dataclass(frozen=True)
    class Boasting:
        """A call whose sizes are larger than its arrays."""

        call: Call
        more: str

        @property
        def sizes(self) -> dict[str, int]:
            return {**self.call.sizes, self.more: self.call.sizes[self.more] + 1}

        def __getattr__(self, name: str) -> object:
            return getattr(self.call, name)

        def __getitem__(self, name: str) -> np.ndarray:
            return self.call[name]

    for more, name in (("n", "image_slot"), ("r", "image_position")):
        inputs = {**call.inputs, "image_slot": np.zeros((1, 2), np.int32)}
        inputs["image_position"] = np.ones_like(call["image_position"])
        inputs[name] = np.full_like(call[name], 2)
        wrong = Call(inputs, call.level_heights, call.level_widths, 4.0, False, "float32")
        emulate(wrong, rows, emulator.default_kernel, parts=0)  # out of range is hidden: no fault
        monkeypatch.setattr(
            emulator, "launch_plan", lambda c, a, p, more=more: plan(Boasting(c, more), a, p)
        )
        with pytest.raises(Fault, match="outside (value|offset_table|logit_table)"):
            emulate(wrong, rows, emulator.default_kernel, parts=0)
        monkeypatch.setattr(emulator, "launch_plan", plan)


# By type and queries, with 4 images, 3 levels, 8 points and 64 channels: PTX instructions times
# threads of the whole kernel, and bytes loaded 128 bits at a time, for each sampled point. One
# query shares its 96 points between 8 warps, so that what every warp does once weighs more.
DYNAMIC = {
    ("float16", 4): (610, 540),
    ("bfloat16", 4): (610, 540),
    ("float32", 4): (1200, 1080),
    ("float16", 1): (1950, 720),
    ("float32", 1): (2450, 1080),
}


@pytest.mark.parametrize(("dtype", "queries"), DYNAMIC)
def test_dynamic_instructions_and_bytes_stay_within_their_budget(dtype: str, queries: int) -> None:
    needs_emulator()
    sizes = {"b": 1, "q": queries, "h": 1, "m": 4, "n": 4, "r": 5, "p": 8, "d": 64}
    drawn = calls.draw(
        np.random.default_rng(0),
        **{**sizes, "dtype": dtype, "base_grid": 8.0, "per_query": False, "null_slot": True},
        levels=[(32, 32), (16, 16), (8, 8)],
    )
    inputs = {
        **drawn.inputs,
        "image_position": np.array([[[1, 2, 3, 4]]], np.int32),
        "image_slot": np.arange(4, dtype=np.int32)[None],
        "reference": np.full((1, 2), 0.5, np.float32),
        "offsets": calls.rounded(0.3 * drawn["offsets"], dtype),
        "offset_table": np.float32(0.3) * drawn["offset_table"],
    }
    call = replace(drawn, inputs=inputs)
    rows = reference.all_rows(call)
    done = emulate(call, rows, emulator.default_kernel, parts=0 if queries > 1 else 1)
    points = emulator.sampled_points(call, rows)
    assert points == queries * 4 * 3 * 8
    instructions, wide_bytes = DYNAMIC[dtype, queries]
    assert done.lane_instructions / points <= instructions
    value_bytes = 4 * 64 * (4 if dtype == "float32" else 2)  # four corners, once each
    assert 0.9 * value_bytes <= done.bytes_by_kind["ld", "global", 16] / points <= wide_bytes


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "missing", lambda compiler="nvrtc": f"{compiler} is not installed")
    assert EMULATOR.missing() == "nvrtc is not installed"
    with pytest.raises(EngineError, match="nvrtc is not installed"):
        nvrtc.compile_ptx.__wrapped__(VARIANTS[0], 90, "nvrtc")
