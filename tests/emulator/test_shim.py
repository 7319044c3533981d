"""The CUDA kernels, compiled by g++ with a fiber for every thread, against float64."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emulator.sanitized import check_sanitized
from mmi_deploy.errors import EngineError
from mmi_emulator import shim
from mmi_plugins.compile import launch_plan
from mmi_plugins.conformance import calls
from mmi_plugins.constants import CSRC
from mmi_plugins.operator import INPUT_SHAPES, TOLERANCES, Call
from mmi_plugins.reference import all_rows, mmfs_reference

if reason := shim.SHIM.missing():
    pytest.skip(reason, allow_module_level=True)

# Outputs whose rms is below this cannot be held by the type to its tolerance.
SMALLEST = {"float32": 1e-30, "float16": 1e-6, "bfloat16": 1e-30}

# A warp a row; a block a row; three blocks a row, and a merge.
PARTS = (0, 1, 3)


def error(call: Call, got: np.ndarray, expected: np.ndarray) -> float:
    """Relative rms error."""
    rms = float(np.sqrt(np.mean(expected**2)))
    return float(np.sqrt(np.mean((got - expected) ** 2))) / max(rms, SMALLEST[call.dtype])


def some_rows(call: Call, most: int = 16) -> np.ndarray:
    """Up to `most` rows (b, q, h) of a call, the last ones of a block among them."""
    rows = all_rows(call)
    chosen = np.random.default_rng(len(rows)).permutation(len(rows))[: most - 1]
    return rows[np.union1d(chosen, len(rows) - 1)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("parts", PARTS)
def test_every_situation_agrees_with_float64_whatever_the_order_of_threads(
    dtype: str, parts: int
) -> None:
    for index, (name, call) in enumerate(calls.draws(20 + parts, 24, dtype=dtype)):
        rows = some_rows(call)
        got = shim.Shim(backwards=index % 2 == 1).run(call, rows, parts)
        wrong = error(call, got, mmfs_reference(call, rows))
        assert wrong <= TOLERANCES[dtype].relative, f"{name}, {call.sizes}: {wrong:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("channels", range(8, 129, 8))
def test_every_head_size(dtype: str, channels: int) -> None:
    rng = np.random.default_rng(channels)
    call = calls.draw(rng, dtype=dtype, d=channels, b=1, q=2, m=3, p=5, h=2)
    rows = some_rows(call, 3)
    expected = mmfs_reference(call, rows)
    for parts in (0, 2):
        assert (
            error(call, shim.Shim().run(call, rows, parts), expected) <= TOLERANCES[dtype].relative
        )


LEVELS = [(6, 5), (4, 4), (3, 2), (1, 1)]


@pytest.mark.parametrize("points", range(1, 17))
def test_every_number_of_points(points: int) -> None:
    call = calls.draw(
        np.random.default_rng(points), dtype="float32", p=points, m=7, q=3, b=1, d=24, levels=LEVELS
    )
    rows = some_rows(call, 4)
    got = shim.Shim().run(call, rows, 0)
    assert error(call, got, mmfs_reference(call, rows)) <= TOLERANCES["float32"].relative


@pytest.mark.parametrize("images", (31, 32, 33, 49, 70))
def test_more_images_than_a_warp_has_lanes(images: int) -> None:
    call = calls.draw(
        np.random.default_rng(images), m=images, n=9, q=2, b=2, h=2, d=16, p=3, per_query=True
    )
    rows = all_rows(call)
    for parts in (0, 1, 5):
        got = shim.Shim().run(call, rows, parts)
        assert error(call, got, mmfs_reference(call, rows)) <= TOLERANCES[call.dtype].relative


def test_wide_maps_cost_no_accuracy() -> None:
    """A location in one fp32 number is 2e-6 pixels off on a map 64 wide, twice the tolerance."""
    call = calls.draw(
        np.random.default_rng(0),
        **{"dtype": "float32", "levels": [(64, 64), (32, 32)], "d": 32, "p": 8, "m": 5, "r": 9},
        **{"b": 1, "q": 17, "h": 5, "n": 2, "base_grid": 12.5, "null_slot": False},
    )
    rows = some_rows(call, 40)
    assert error(call, shim.Shim().run(call, rows), mmfs_reference(call, rows)) <= 5e-7


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_locations_that_are_no_numbers_are_outside(dtype: str) -> None:
    fixed = {"b": 1, "m": 2, "n": 2, "q": 4, "h": 2, "p": 4, "d": 16, "null_slot": True, "r": 4}
    call = calls.draw(np.random.default_rng(1), dtype=dtype, **fixed)
    call.inputs["offsets"][0, 0, :, 1] = np.nan
    call.inputs["offsets"][0, 1, :, 2] = np.inf
    call.inputs["offsets"][0, 2, :, 3] = [-np.inf, 3e38 if dtype == "float32" else 3.3e38]
    got = shim.Shim().run(call, all_rows(call), 0)
    offsets = call["offsets"]
    offsets[~(np.abs(offsets) < 1e6)] = 1e6
    assert error(call, got, mmfs_reference(call, all_rows(call))) <= TOLERANCES[dtype].relative


def test_logits_of_minus_infinity_weigh_nothing_and_nan_is_not_hidden() -> None:
    fixed = {"b": 1, "m": 1, "n": 1, "q": 3, "h": 1, "p": 4, "d": 8, "null_slot": False, "r": 2}
    call = calls.draw(np.random.default_rng(2), dtype="float32", **fixed)
    call.inputs["image_position"][:] = 1
    call.inputs["logits"][0, 0, :, :, 1:] = -np.inf
    call.inputs["logits"][0, 1] = -np.inf
    call.inputs["logits"][0, 2, 0, 0, 0] = np.nan
    for parts in PARTS:
        got = shim.Shim().run(call, all_rows(call), parts)
        assert (
            error(call, got[:2], mmfs_reference(call, all_rows(call)[:2]))
            <= TOLERANCES["float32"].relative
        )
        assert not got[1].any() and np.isnan(got[2]).all()


def _barriers() -> list[int]:
    """Lines of the kernels' barriers."""
    lines = (CSRC / "mmfs.cuh").read_text().splitlines()
    return [n for n, line in enumerate(lines, 1) if re.search(r"__sync(warp|threads)\(", line)]


_WITHOUT_A_BARRIER = """
import sys
import numpy as np
from mmi_emulator import shim
from mmi_plugins.conformance import calls
from mmi_plugins.operator import TOLERANCES
from mmi_plugins.reference import all_rows, mmfs_reference

fixed = {"m": 70, "n": 5, "q": 2, "b": 1, "h": 1, "d": 64, "p": 8, "r": 4, "null_slot": False}
for dtype in ("float32", "float16"):
    call = calls.draw(np.random.default_rng(3), dtype=dtype, **fixed)
    expected = mmfs_reference(call)
    for backwards in (False, True):
        runs = shim.Shim(backwards=backwards, without=int(sys.argv[1]))
        for parts in (0, 1, 3):
            got = runs.run(call, all_rows(call), parts)
            wrong = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
            assert wrong <= TOLERANCES[dtype].relative, wrong
"""


def test_a_barrier_that_is_left_out_is_found() -> None:
    """Those before what others wrote is read. The other two order reads before later writes: votes
    come between, where threads meet as well, but which promise no order of memory."""

    def goes_wrong(without: int) -> bool:  # in a process of its own: it may read wild addresses
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", _WITHOUT_A_BARRIER, str(without)]
        return subprocess.run(command, capture_output=True, env=environment).returncode != 0

    images, table, _, _, block = _barriers()
    assert not goes_wrong(without=0)
    assert all(goes_wrong(line) for line in (images, table, block))


def test_addresses_beyond_two_to_the_32() -> None:
    """Values of 6 GiB, of which only the cells in use take memory."""
    cells, heads, channels = (2048, 2048), 2, 64
    shape = (3, cells[0] * cells[1], heads, channels)
    memory = mmap.mmap(-1, 4 * int(np.prod(shape)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    value = np.frombuffer(memory, np.float32).reshape(shape)
    rng = np.random.default_rng(4)
    small = calls.draw(
        rng, dtype="float32", b=1, q=1, m=1, h=heads, d=channels, p=4, levels=[(8, 8)], n=1, r=2
    )
    inputs = {**small.inputs, "value": value, "image_slot": np.array([[2]], np.int32)}
    inputs["image_position"] = np.array([[[1]]], np.int32)
    call = Call(inputs, cells[:1], cells[1:], 2048.0, False, "float32")
    where = inputs["reference"][0] * 2048
    for y in range(int(where[1]) - 8, int(where[1]) + 9):
        for x in range(int(where[0]) - 8, int(where[0]) + 9):
            if 0 <= y < 2048 and 0 <= x < 2048:
                value[2, y * 2048 + x] = rng.normal(size=(heads, channels))
    arrays = {name: shim.aligned(array) for name, array in inputs.items() if name != "value"}
    arrays |= {"value": value, "output": shim.aligned(launch_plan.output_array(call))}
    addresses = {name: array.ctypes.data for name, array in arrays.items()}
    for launch in launch_plan.launch_plan(call, addresses, 1):
        shim.Shim().launch(launch, launch.blocks(all_rows(call)))
    expected = mmfs_reference(call)
    assert np.abs(expected).max() > 0.01
    assert error(call, arrays["output"].reshape(expected.shape), expected) <= 1e-6
    too_large = Call(
        inputs | {"value": np.broadcast_to(value[:1], (99, *shape[1:]))}, *_sides(call)
    )
    with pytest.raises(EngineError, match="64 GiB"):
        launch_plan.launch_plan(too_large, addresses)


def _sides(call: Call) -> tuple[tuple[int, ...], tuple[int, ...], float, bool, str]:
    return call.level_heights, call.level_widths, call.base_grid, call.null_slot, call.dtype


class _MmfsCall(ctypes.Structure):
    """`mmi::MmfsCall` of `csrc/mmfs.h`."""

    _fields_ = [
        ("type", ctypes.c_int32),
        *[(name, ctypes.c_void_p) for name in (*INPUT_SHAPES, "output")],
        *[(letter, ctypes.c_int32) for letter in "bqmhlpdnsr"],
        ("position_queries", ctypes.c_int32),
        ("reference_queries", ctypes.c_int32),
        ("level_height", ctypes.c_int32 * 4),
        ("level_width", ctypes.c_int32 * 4),
        ("base_grid", ctypes.c_float),
        ("null_slot", ctypes.c_bool),
    ]


def _mmfs_call(call: Call) -> _MmfsCall:
    given = _MmfsCall(type=list(TOLERANCES).index(call.dtype))
    for index, name in enumerate((*INPUT_SHAPES, "output")):
        setattr(given, name, 0x1000 * (index + 1))
    for letter in "bqmhlpdnsr":
        setattr(given, letter, call.sizes[letter])
    given.position_queries = call["image_position"].shape[1]
    given.reference_queries = call["reference"].shape[0]
    for level, sides in enumerate(zip(call.level_heights, call.level_widths, strict=True)):
        given.level_height[level], given.level_width[level] = sides
    given.base_grid, given.null_slot = call.base_grid, call.null_slot
    return given


def _cpp_plan(given: _MmfsCall) -> tuple[bytes, int, int, np.ndarray] | str:
    size = len(launch_plan.launch_plan(*_a_call_and_addresses())[0].parameter)
    problem, parts, room = ctypes.create_string_buffer(size), ctypes.c_int(), ctypes.c_size_t()
    grids = np.zeros((3, 4), np.uint32)
    refused = shim.load(shim.build()).mmi_shim_plan(
        ctypes.byref(given),
        ctypes.c_void_p(0x100000),
        problem,
        ctypes.byref(parts),
        ctypes.byref(room),
        grids.ctypes.data_as(ctypes.c_void_p),
    )
    return refused.decode() if refused else (problem.raw, parts.value, room.value, grids)


def _a_call_and_addresses(**fixed: object) -> tuple[Call, dict[str, int]]:
    call = calls.draw(np.random.default_rng(5), **fixed)
    names = (*INPUT_SHAPES, "output")
    addresses = {name: 0x1000 * (index + 1) for index, name in enumerate(names)}
    return call, addresses | {"workspace": 0x100000}


@pytest.mark.parametrize("fixed", [{}, {"q": 900, "h": 5}, {"m": 90, "p": 16}, {"q": 70, "m": 90}])
def test_the_plan_in_c_plus_plus_is_the_plan_in_python(fixed: dict[str, int]) -> None:
    for dtype in TOLERANCES:
        call, addresses = _a_call_and_addresses(dtype=dtype, **fixed)
        plan = launch_plan.launch_plan(call, addresses)
        planned = _cpp_plan(_mmfs_call(call))
        assert not isinstance(planned, str), planned
        parameter, parts, room, grids = planned
        assert parts == launch_plan.default_parts(call)
        assert {launch.parameter for launch in plan} == {parameter}
        for launch in plan:
            *grid, threads = grids[launch_plan.KINDS.index(launch.variant.kind)]
            assert (tuple(grid), threads) == (launch.grid, launch.block[0])
        assert room >= 4 * np.prod(launch_plan.workspace_shape(call))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": 0x1008}, "not aligned to 16"),
        ({"reference": 0x1004}, "not aligned to 8"),
        ({"image_slot": 0x1002}, "not aligned to 4"),
        ({"output": 0}, "a pointer is missing"),
        ({"image_position": 0}, "indices is missing"),
        ({"reference": 0}, "reference points is missing"),
        ({"base_grid": float("inf")}, "base_grid"),
        ({"base_grid": 0.0}, "base_grid"),
        ({"d": 20}, "head size"),
        ({"s": 1}, "feature cells"),
        ({"n": 2**31 - 1}, "64 GiB"),
        ({"h": 70000}, "65535"),
        ({"r": 2**30}, "a table"),
        ({"q": 2**30, "b": 9, "reference_queries": 1, "position_queries": 1}, "output rows"),
        (
            {"q": 2**31 - 4, "b": 1, "h": 1, "reference_queries": 1, "position_queries": 1},
            "output rows",
        ),
        ({"m": 2**31 - 4}, "images"),
    ],
)
def test_calls_that_cannot_run_are_refused_with_a_reason(
    change: dict[str, float], words: str
) -> None:
    given = _mmfs_call(_a_call_and_addresses(d=128, levels=[(8, 8)])[0])
    for name, number in change.items():
        setattr(given, name, number)
    refused = _cpp_plan(given)
    assert isinstance(refused, str) and words in refused


def test_the_workspace_never_shrinks_when_a_call_grows() -> None:
    given = _mmfs_call(_a_call_and_addresses()[0])
    for letter, sizes in (("q", (1, 16, 200, 5000)), ("m", (1, 9, 49, 400)), ("p", (1, 16))):
        rooms = []
        for size in sizes:
            setattr(given, letter, size)
            given.position_queries = given.reference_queries = 1
            planned = _cpp_plan(given)
            assert not isinstance(planned, str), planned
            rooms.append(planned[2])
        assert rooms == sorted(rooms)


_GREATEST_LEVELS = """
#include <cstdio>
#include "sizes.h"

int main() {
  mmi::Attributes attributes;
  attributes.levels = mmi::kMaxLevels;
  attributes.base_grid = 1;
  for (int level = 0; level < mmi::kMaxLevels; ++level) {
    attributes.level_height[level] = attributes.level_width[level] = INT32_MAX;
  }
  mmi::Sizes sizes(attributes);
  std::puts(sizes.complete() ? "taken" : sizes.reason().c_str());
}
"""


def test_the_greatest_levels_are_refused_without_an_overflow(tmp_path: Path) -> None:
    source, program = tmp_path / "levels.cpp", tmp_path / "levels"
    source.write_text(_GREATEST_LEVELS)
    options = ["-std=c++17", "-fsanitize=undefined", f"-I{CSRC}", "-o", str(program)]
    subprocess.run([str(shim.compiler()), *options, str(source)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    assert done.stdout == "the levels do not make up the feature cells of value\n"
    assert not done.stderr


_SANITIZED = """
import sys
import numpy as np
from mmi_emulator import shim
from mmi_plugins.constants import CSRC
from mmi_plugins.conformance import calls
from mmi_plugins.reference import all_rows

runs = shim.Shim(shim.build(CSRC, *shim.SANITIZERS))
for index, (name, call) in enumerate(calls.draws(6, 8)):
    rows = all_rows(call)[-6:]
    if sys.argv[1] == "beyond":
        call.inputs["value"] = call.inputs["value"][..., :1, :].copy()
    for parts in (0, 1, 2):
        runs.run(call, rows, parts)
print("clean")
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ("inside", "beyond"))
def test_no_step_beyond_memory_and_no_undefined_behaviour(what: str, tmp_path: Path) -> None:
    """Under AddressSanitizer and UndefinedBehaviorSanitizer; "beyond" shows that they see it."""
    check_sanitized(_SANITIZED, what, tmp_path)
