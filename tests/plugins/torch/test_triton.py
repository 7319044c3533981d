"""The Triton kernels: interpreted on the CPU, against the float64 reference and its finite
differences; and compiled for GPUs that are not here. Nothing here runs on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch

from mmi_plugins.conformance.calls import SITUATIONS, draw
from mmi_plugins.operator import INPUT_SHAPES, NARROW_INPUTS, TOLERANCES, Call
from mmi_plugins.reference import mmfs_reference, output_of
from mmi_plugins.torch.op import multi_image_deformable_attention
from oracles import mmfs_triton
from oracles.mmfs_slopes import FLOATING, slope, smooth_call

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="no triton: pip install triton")

LEVELS = [(6, 9), (3, 4)]

# Calls a function with arguments in the other process.
Run = Callable[..., Any]


def process(start: Callable[..., None], *arguments: str) -> Iterator[Run]:
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=start, initargs=arguments
    ) as pool:
        yield lambda function, *inputs: pool.submit(function, *inputs).result()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    yield from process(mmfs_triton.interpret)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    yield from process(mmfs_triton.compile_only, str(tmp_path_factory.mktemp("triton")))


def small(index: int, situation: str, dtype: str, **fixed: Any) -> Call:
    """Two rows: the interpreter takes a tenth of a second for each."""
    fixed = {"b": 1, "q": 1, "h": 2, "m": 2, "dtype": dtype, "levels": LEVELS} | fixed
    return draw(np.random.default_rng([20, index]), situation, **fixed)


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """rms of error / rms of wanted; where nothing is wanted, the norm of the error."""
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(got.astype(np.float64) - wanted)) / (norm or 1.0)


def tolerance(dtype: str) -> float:
    """The interpreter cuts bits off where it makes bfloat16, hardware rounds: twice the error."""
    return TOLERANCES[dtype].relative * (2 if dtype == "bfloat16" else 1)


NARROW = [("float16", "ordinary"), ("bfloat16", "ordinary")]
WIDE = [("float32", situation) for situation in SITUATIONS]


def test_every_situation_is_within_the_tolerance_of_its_type(interpreted: Run) -> None:
    for index, (dtype, situation) in enumerate([*WIDE, *NARROW]):
        call = small(index, situation, dtype)
        error = relative(
            interpreted(mmfs_triton.forward, call), output_of(call, mmfs_reference(call))
        )
        assert error <= tolerance(dtype), f"{situation}, {dtype}: {error:.1e}"


def test_wide_maps_cost_no_accuracy(interpreted: Run) -> None:
    """Offsets in one fp32 number are 1e-6 of a cell off on a map 64 wide, which alone is as much
    as fp32 outputs are allowed."""
    fixed = {"levels": [(64, 64), (32, 32)], "base_grid": 12.5, "p": 8, "d": 32, "q": 6, "r": 9}
    call = small(3, "ordinary", "float32", **fixed, references=True)
    call.inputs["offsets"] *= 4
    error = relative(interpreted(mmfs_triton.forward, call), output_of(call, mmfs_reference(call)))
    assert error <= 5e-7


def test_queries_have_their_own_positions_and_references(interpreted: Run) -> None:
    call = small(0, "ordinary", "float32", b=2, q=3, h=1, per_query=True, references=True)
    error = relative(interpreted(mmfs_triton.forward, call), output_of(call, mmfs_reference(call)))
    assert error <= TOLERANCES["float32"].relative


@pytest.mark.parametrize("null_slot, shared", [(False, False), (True, True)])
def test_gradients_equal_finite_differences_of_the_reference(
    interpreted: Run, null_slot: bool, shared: bool
) -> None:
    call = smooth_call(3, null_slot=null_slot, shared=shared)
    rng = np.random.default_rng(4)
    grad = rng.normal(size=output_of(call, mmfs_reference(call)).shape).astype(np.float32)
    found = interpreted(mmfs_triton.backward, call, grad)
    for name in FLOATING:
        size = float(np.linalg.norm(found[name]))
        assert size > 0 or (name == "null_value" and not null_slot), name
        for _ in range(3):
            direction = rng.choice([-1.0, 0.0, 1.0], call[name].shape)
            wanted = slope(call, name, direction, grad)
            got = float((found[name].astype(np.float64) * direction).sum())
            assert got == pytest.approx(wanted, abs=2e-6 * max(size, 1.0)), name


def test_gradients_equal_those_of_the_cpu_in_fp64(interpreted: Run) -> None:
    """Over all situations but those on kinks, where either side's gradient may come."""
    for index, (dtype, situation) in enumerate([*WIDE, *NARROW]):
        if situation in ("on borders", "on centres"):
            continue
        call = small(index, situation, dtype)
        wide = {name: torch.from_numpy(np.array(call[name])) for name in INPUT_SHAPES}
        wide |= {name: wide[name].double().requires_grad_() for name in FLOATING}
        output = multi_image_deformable_attention(
            *wide.values(), call.level_heights, call.level_widths, call.base_grid, call.null_slot
        )
        grad = np.random.default_rng(index).integers(-8, 9, output.shape).astype(np.float32)
        leaves = [wide[name] for name in FLOATING]
        wanted = torch.autograd.grad(output, leaves, torch.from_numpy(grad).double())
        found = interpreted(mmfs_triton.backward, call, grad)
        for name, gradient in zip(FLOATING, wanted, strict=True):
            allowed = tolerance(dtype) if name in NARROW_INPUTS else TOLERANCES["float32"].relative
            if situation == "huge logits" and "logit" in name:
                # One weight is 1: its gradient, the difference of two large numbers, is rounding.
                assert np.abs(found[name] - gradient.numpy()).max() <= 1e-4, name
            else:
                error = relative(found[name], gradient.numpy())
                assert error <= allowed, f"{situation}, {dtype}, {name}: {error:.1e}"


def test_a_query_that_sees_nothing_writes_zeros(interpreted: Run) -> None:
    call = small(0, "all hidden", "float32", null_slot=False)
    assert not interpreted(mmfs_triton.forward, call).any()
    grad = np.ones((call.sizes["b"], call.sizes["q"], call.sizes["h"] * call.sizes["d"]), "f4")
    found = interpreted(mmfs_triton.backward, call, grad)
    assert not any(gradient.any() for gradient in found.values())


def test_hidden_images_are_not_read(interpreted: Run) -> None:
    """Not even to be multiplied by zero."""
    call = small(0, "ordinary", "float32", n=2, r=4)
    call.inputs["image_slot"][:] = [[0, 1]]
    call.inputs["image_position"][:] = [[[2, 0]]]
    poisoned = call["value"].copy()
    poisoned[1] = np.nan
    other = replace(call, inputs={**call.inputs, "value": poisoned})
    np.testing.assert_array_equal(
        interpreted(mmfs_triton.forward, other), interpreted(mmfs_triton.forward, call)
    )


@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
@pytest.mark.parametrize("capability, dtype", [(80, "float32"), (90, "float16"), (120, "bfloat16")])
def test_compiles_without_spills_and_with_wide_loads(
    compiler: Run, kernel: str, capability: int, dtype: str
) -> None:
    found = compiler(mmfs_triton.compiled, kernel, dtype, capability, 8, 64)
    assert found["STACK"] == 0 and found["LOCAL"] == 0
    # The four corners' loads of value are 128 bit wide: one of fp16, two of fp32.
    assert found["ptx"].count("ld.global.v4.b32") == 4 * (2 if dtype == "float32" else 1)


@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
def test_compiles_where_arguments_that_are_one_become_constants(compiler: Run, kernel: str) -> None:
    found = compiler(mmfs_triton.compiled, kernel, "float32", 80, 1, 8, True)
    assert found["STACK"] == 0 and found["LOCAL"] == 0
