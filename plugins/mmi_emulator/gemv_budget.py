"""Figures of the kernels of `mmi::WeightOnlyMatMul` and their budget, `gemv_budgets.json`.

`python -m mmi_emulator.gemv_budget` compiles every kernel for every architecture, disassembles it,
and prints its figures and what exceeds the budget; `--write` makes them the new budget, `--table`
prints the tables of `docs/gemv_kernel.md`. Counts are of machine code; no figure is a measured
time.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from mmi_emulator import ptx_budget
from mmi_plugins.compile import nvrtc
from mmi_plugins.constants import constant
from mmi_plugins.gemv.launch_plan import GEMV_VARIANTS, ROWS_VARIANTS, GemvVariant
from mmi_plugins.gemv.packing import words_of

BUDGETS = Path(__file__).with_name("gemv_budgets.json")

# Input channels of the products whose instructions are counted: the narrowest of a 13B model, for
# which what a block does once weighs most.
INPUTS = 5120


@dataclass(frozen=True)
class Gpu:
    """Data sheet of a GPU: architecture, multiprocessors, boost clock in GHz, memory in GB/s."""

    architecture: int
    multiprocessors: int
    clock: float
    bandwidth: float

    @property
    def issued_per_byte(self) -> float:
        """Lane-instructions that the GPU issues (4 warps a clock and multiprocessor) in the time in
        which memory delivers a byte."""
        return 4 * 32 * self.multiprocessors * self.clock / self.bandwidth


GPUS = {
    "L4": Gpu(89, 58, 2.04, 300),
    "AGX Orin 64 GB": Gpu(87, 16, 1.3, 204.8),
    "A100 80 GB": Gpu(80, 108, 1.41, 2039),
    "H100 SXM": Gpu(90, 132, 1.755, 3350),
}


@dataclass(frozen=True)
class GemvFigures:
    """Figures of one kernel on one architecture."""

    registers: int
    stack: int
    spills: int  # instructions that read or write local memory
    shared: int
    warps: int  # resident on a multiprocessor
    wide_loads: int  # loads of 128 bits of the weight, a step
    loads_in_flight: int  # loads before the first product
    lane_instructions: float  # per byte of the weight, all phases, `INPUTS` input channels

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of the weight that the resident warps of a multiprocessor have asked for."""
        return self.warps * self.wide_loads * 512


@cache
def figures(architecture: int) -> dict[str, GemvFigures]:
    """Figures by kernel name. Raises `EngineError` where a tool is missing."""
    kernels = "".join(variant.source.split("\n", 1)[1] for variant in GEMV_VARIANTS)
    resources, listings = _disassembled(kernels, architecture)
    return {
        variant.name: _figures(
            variant, architecture, resources[variant.name], listings[variant.name]
        )
        for variant in GEMV_VARIANTS
    }


def _disassembled(
    kernels: str, architecture: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    return ptx_budget.disassembled(f'#include "gemv_rows.cuh"\n{kernels}', architecture)


@dataclass(frozen=True)
class RowsFigures:
    """Figures of a kernel of many rows. step: instructions of a warp for `kGemvRowTile` rows of a
    tile and step, `products` of them on tensor cores."""

    registers: int
    spills: int
    warps: int
    step: int
    products: int


@cache
def rows_figures(architecture: int) -> dict[str, RowsFigures]:
    """As `figures`, of the kernels of many rows."""
    kernels = "".join(variant.source.split("\n", 1)[1] for variant in ROWS_VARIANTS)
    resources, listings = _disassembled(kernels, architecture)
    found = {}
    for variant in ROWS_VARIANTS:
        registers, stack, shared = resources[variant.name]
        code = ptx_budget.instructions(listings[variant.name])
        body = [each for each in ptx_budget.inner_loop(code) if not each.startswith("NOP")]
        spills = sum(ptx_budget.operation(text).startswith(("LDL", "STL")) for _, text in code)
        found[variant.name] = RowsFigures(
            registers,
            stack + spills,
            ptx_budget.occupancy(architecture, registers, shared, variant.threads),
            len(body),
            sum(each.startswith("HMMA") for each in body),
        )
    return found


def _figures(
    variant: GemvVariant, architecture: int, resources: tuple[int, ...], listing: str
) -> GemvFigures:
    registers, stack, shared = resources
    code = ptx_budget.instructions(listing)
    operations = [ptx_budget.operation(text) for _, text in code]
    operations = [each for each in operations if not each.startswith("NOP")]
    body = ptx_budget.inner_loop(code)
    first = next(place for place, each in enumerate(body) if each.startswith("HMMA"))
    return GemvFigures(
        registers,
        stack,
        sum(each.startswith(("LDL", "STL")) for each in operations),
        shared,
        ptx_budget.occupancy(architecture, registers, shared, variant.threads),
        sum(bool(re.match(r"LDG\.E\.(NA\.)?128", each)) for each in body if ".NA" in each),
        sum(each.startswith("LDG") for each in body[:first]),
        round(_issued(variant, len(body), len(operations) - len(body)), 2),
    )


def _issued(variant: GemvVariant, loop: int, rest: int) -> float:
    """Lane-instructions of a block per byte of its tile. Counts both branches of a step."""
    steps, warps = INPUTS // constant("kGemvStep"), constant("kGemvWarps")
    tile = steps * words_of(variant.format) * 4
    return (loop * steps + rest * warps) * constant("kLanes") / tile


def budget() -> tuple[str, dict[str, dict[int, GemvFigures]]]:
    """Read the budget: version of NVRTC, figures by kernel and architecture."""
    stored = json.loads(BUDGETS.read_text())
    kernels = {
        name: {int(architecture): GemvFigures(**of) for architecture, of in by.items()}
        for name, by in stored["kernels"].items()
    }
    return stored["nvrtc"], kernels


def worse(now: GemvFigures, allowed: GemvFigures) -> list[str]:
    """Figures that exceed the budget, a line each."""
    lines = []
    for name, most in asdict(allowed).items():
        got = getattr(now, name)
        falls = name in ("warps", "wide_loads", "loads_in_flight")
        if got < most if falls else got > most:
            lines.append(f"{name}: {got}, budget {most}")
    return lines


def write() -> None:
    """Write the current figures as the budget."""
    kernels = {
        variant.name: {a: asdict(figures(a)[variant.name]) for a in ptx_budget.ARCHITECTURES}
        for variant in GEMV_VARIANTS
    }
    text = json.dumps({"nvrtc": nvrtc.version(), "kernels": kernels}, indent=1)
    text = re.sub(r"\n    +", " ", text).replace("\n   }", " }")  # a line an architecture
    BUDGETS.write_text(text + "\n")


def table() -> str:
    """The budget as the tables of `docs/gemv_kernel.md`."""
    _, kernels = budget()
    names = [f"sm_{architecture}" for architecture in ptx_budget.ARCHITECTURES]
    lines = ["| kernel | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, by in kernels.items():
        cells = [f"{of.registers} · {of.warps} · {of.lane_instructions:.1f}" for of in by.values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    limits = [f"{name}: {gpu.issued_per_byte:.1f}" for name, gpu in GPUS.items()]
    lines += ["", "| kernel | " + " | ".join(limits) + " |", "|---" * (len(GPUS) + 1) + "|"]
    for name, by in kernels.items():
        shares = [
            by[gpu.architecture].lane_instructions / gpu.issued_per_byte for gpu in GPUS.values()
        ]
        lines.append(f"| `{name}` | " + " | ".join(f"{100 * each:.0f} %" for each in shares) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Print all figures, or the tables of the budget."""
    if reason := ptx_budget.missing():
        raise SystemExit(reason)
    if "--table" in arguments:
        print(table())
        return
    if "--write" in arguments:
        write()
    for name, by in budget()[1].items():
        for architecture, most in by.items():
            now = figures(architecture)[name]
            words = "  ".join(f"{key} {value}" for key, value in asdict(now).items())
            exceeded = (f"WORSE {line}" for line in worse(now, most))
            print("  ".join([f"{name} sm_{architecture}", words, *exceeded]))


if __name__ == "__main__":
    main(sys.argv[1:])
