"""The kernels of `mmi::WeightOnlyMatMul` keep their budget (docs/gemv_kernel.md), and leave memory
the bottleneck on every GPU that the page lists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmi_emulator import gemv_budget, ptx_budget
from mmi_plugins.compile import nvrtc
from mmi_plugins.gemv.launch_plan import GEMV_VARIANTS

if reason := ptx_budget.missing():
    pytest.skip(reason, allow_module_level=True)

COMPILER, ALLOWED = gemv_budget.budget()


@pytest.mark.parametrize("architecture", ptx_budget.ARCHITECTURES)
def test_no_spill_wide_loads_and_all_of_a_step_on_its_way(architecture: int) -> None:
    """All loads of a step come before its first product, in the code of every compiler."""
    for variant in GEMV_VARIANTS:
        now = gemv_budget.figures(architecture)[variant.name]
        assert (now.stack, now.spills) == (0, 0), variant.name
        assert now.wide_loads == (2 if variant.format == "int4" else 4), variant.name
        assert now.loads_in_flight >= now.wide_loads + 4, variant.name
        assert now.warps >= 32, variant.name


@pytest.mark.skipif(nvrtc.version() != COMPILER, reason=f"the budget is that of NVRTC {COMPILER}")
@pytest.mark.parametrize("architecture", ptx_budget.ARCHITECTURES)
def test_no_figure_is_worse_than_the_budget(architecture: int) -> None:
    assert set(ALLOWED) == {variant.name for variant in GEMV_VARIANTS}
    for name, by_architecture in ALLOWED.items():
        now = gemv_budget.figures(architecture)[name]
        assert not gemv_budget.worse(now, by_architecture[architecture]), name


@pytest.mark.parametrize("gpu", gemv_budget.GPUS.values(), ids=list(gemv_budget.GPUS))
def test_memory_is_slower_than_issue(gpu: gemv_budget.Gpu) -> None:
    """With a quarter of the issue slots to spare."""
    for name, figures in gemv_budget.figures(gpu.architecture).items():
        assert figures.lane_instructions <= 0.75 * gpu.issued_per_byte, name


def test_the_resident_warps_ask_for_enough_to_hide_the_latency_of_memory() -> None:
    """Bandwidth times 0.7 microseconds, on the multiprocessors of each GPU."""
    for gpu in gemv_budget.GPUS.values():
        wanted = gpu.bandwidth * 1e9 * 0.7e-6 / gpu.multiprocessors
        for name, figures in gemv_budget.figures(gpu.architecture).items():
            assert figures.bytes_in_flight >= wanted, name


@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_of_many_rows_keep_tensor_cores_busy(architecture: int) -> None:
    """Two blocks an SM, no spill, and at most ten instructions for a product of tensor cores."""
    for name, now in gemv_budget.rows_figures(architecture).items():
        assert (now.spills, now.products) == (0, 64), name
        assert now.registers <= 128 and now.warps >= 16, name
        assert now.step <= 640, name


def test_every_figure_that_gets_worse_is_named() -> None:
    good = ALLOWED["gemv_float16_int8"][90]
    assert not gemv_budget.worse(good, good)
    bad = replace(
        good,
        registers=good.registers + 1,
        stack=8,
        spills=2,
        shared=good.shared + 1,
        warps=good.warps - 8,
        wide_loads=good.wide_loads - 1,
        loads_in_flight=good.loads_in_flight - 1,
        lane_instructions=good.lane_instructions + 0.1,
    )
    assert len(gemv_budget.worse(bad, good)) == 8


def test_the_documentation_shows_this_budget() -> None:
    document = Path(__file__).parents[2] / "docs" / "gemv_kernel.md"
    assert all(line in document.read_text() for line in gemv_budget.table().splitlines())
