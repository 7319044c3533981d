"""The kernels keep their budget of registers, loads and instructions (docs/mmfs_kernel.md)."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mmi_emulator import ptx_budget
from mmi_plugins.compile import nvrtc
from mmi_plugins.compile.launch_plan import TYPES, VARIANTS

if reason := ptx_budget.missing():
    pytest.skip(reason, allow_module_level=True)

ALLOWED = ptx_budget.budget()
SAME_COMPILER = nvrtc.version() == ALLOWED.nvrtc


@pytest.mark.parametrize("architecture", ptx_budget.ARCHITECTURES)
def test_no_spill_wide_loads_and_few_instructions(architecture: int) -> None:
    """Whatever the compiler: no stack, no local memory, 128-bit loads of values, several on their
    way, and the targets of instructions in the inner loop."""
    for variant in VARIANTS:
        now = ptx_budget.figures(architecture)[variant.name]
        assert (now.stack, now.spills) == (0, 0), variant.name
        if variant.kind == "merge":
            continue
        assert now.load_bits == 128, variant.name
        assert now.loads_in_flight is not None, variant.name
        assert now.loads_in_flight >= (2 if variant.dtype == "float32" else 4), variant.name
        if variant.dtype != "float32":
            assert now.lane_instructions is not None, variant.name
            assert now.lane_instructions <= ptx_budget.TARGETS[architecture], variant.name


@pytest.mark.skipif(not SAME_COMPILER, reason=f"the budget is that of NVRTC {ALLOWED.nvrtc}")
@pytest.mark.parametrize("architecture", ptx_budget.ARCHITECTURES)
def test_no_static_figure_is_worse_than_the_budget(architecture: int) -> None:
    assert set(ALLOWED.kernels) == {variant.name for variant in VARIANTS}
    for name, by_architecture in ALLOWED.kernels.items():
        now = ptx_budget.figures(architecture)[name]
        assert not ptx_budget.worse(now, by_architecture[architecture]), name


@pytest.mark.skipif(not SAME_COMPILER, reason=f"the budget is that of NVRTC {ALLOWED.nvrtc}")
@pytest.mark.parametrize("regime", ptx_budget.REGIMES)
def test_no_more_is_executed_than_the_budget(regime: str) -> None:
    for dtype in TYPES:
        now = ptx_budget.executed(regime, dtype)
        assert not ptx_budget.worse(now, ALLOWED.executed[regime][dtype]), dtype


def test_every_figure_that_gets_worse_is_named() -> None:
    good = ALLOWED.kernels["mmfs_float16_rows"][90]
    assert good.load_bits and good.loads_in_flight and good.lane_instructions
    assert not ptx_budget.worse(good, good)
    bad = replace(
        good,
        registers=good.registers + 1,
        stack=8,
        spills=2,
        shared=good.shared + 1,
        instructions=good.instructions + 1,
        warps=good.warps - 1,
        load_bits=64,
        loads_in_flight=good.loads_in_flight - 1,
        lane_instructions=good.lane_instructions + 1,
    )
    assert len(ptx_budget.worse(bad, good)) == 9


def test_the_documentation_shows_this_budget() -> None:
    document = Path(__file__).parents[2] / "docs" / "mmfs_kernel.md"
    assert all(line in document.read_text() for line in ptx_budget.table().splitlines())


_VENDOR = """
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int major, minor, registers, shared, threads, sm_shared, sm_threads, sm_blocks;
  while (std::scanf("%d %d %d %d %d %d %d %d", &major, &minor, &registers, &shared, &threads,
                    &sm_shared, &sm_threads, &sm_blocks) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = major, device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = sm_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024, device.sharedMemPerMultiprocessor = sm_shared;
    device.numSms = 1, device.sharedMemPerBlockOptin = sm_shared - 1024;
    device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers;
    kernel.sharedSizeBytes = shared;
    cudaOccDeviceState state;
    cudaOccResult result;
    cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0);
    std::printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_agrees_with_the_vendors_calculator(tmp_path: Path) -> None:
    """`cuda_occupancy.h` of the CUDA toolkit, on every kernel and architecture."""
    include = Path("/usr/local/cuda/include")
    if not (include / "cuda_occupancy.h").exists() or shutil.which("g++") is None:
        pytest.skip("needs g++ and the CUDA toolkit's cuda_occupancy.h")
    program = tmp_path / "occupancy"
    command = ["g++", "-x", "c++", "-", f"-I{include}", "-o", str(program)]
    subprocess.run(command, input=_VENDOR, text=True, check=True)
    questions, ours = [], []
    for variant in VARIANTS:
        for architecture, of in ALLOWED.kernels[variant.name].items():
            limit = ptx_budget.MULTIPROCESSORS[architecture]
            words = (*divmod(architecture, 10), of.registers, of.shared, variant.threads)
            questions.append((*words, limit.shared, limit.warps * 32, limit.blocks))
            ours.append(of.warps)
    text = "\n".join(" ".join(map(str, question)) for question in questions)
    done = subprocess.run([str(program)], input=text, text=True, capture_output=True, check=True)
    blocks = [int(line) for line in done.stdout.split()]
    assert ours == [b * q[4] // 32 for b, q in zip(blocks, questions, strict=True)]
