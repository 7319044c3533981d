"""Registers, spills and instruction counts of the kernels, and their budget, `ptx_budgets.json`.

`python -m mmi_emulator.ptx_budget` compiles every kernel for every architecture with NVRTC,
disassembles it with cuobjdump, counts what the PTX executes in the emulator, and prints the figures
and what exceeds the budget; `--write` makes them the new budget, `--table` prints the budget as in
`docs/mmfs_kernel.md`, which derives bounds on speed. No figure is a measured time.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mmi_deploy.errors import EngineError
from mmi_emulator.emulator import default_kernel, emulate, sampled_points
from mmi_plugins.compile import compilers, nvrtc
from mmi_plugins.compile.launch_plan import TYPES, VARIANTS, Variant
from mmi_plugins.conformance.calls import draw
from mmi_plugins.reference import all_rows

ARCHITECTURES = tuple(map(int, compilers.ARCHITECTURES))

BUDGETS = Path(__file__).with_name("ptx_budgets.json")

# Target: lane-instructions per sampled point and 64 channels in the inner loop, 16-bit types.
TARGETS = {80: 600, 86: 600, 87: 600, 89: 600, 90: 600, 100: 520, 120: 520}


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of a streaming multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""

    warps: int
    blocks: int
    shared: int  # bytes of shared memory; a block takes 1024 more than it declares


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * 1024),
    86: Multiprocessor(48, 16, 100 * 1024),
    87: Multiprocessor(48, 16, 164 * 1024),
    89: Multiprocessor(48, 24, 100 * 1024),
    90: Multiprocessor(64, 32, 228 * 1024),
    100: Multiprocessor(64, 32, 228 * 1024),
    120: Multiprocessor(48, 24, 100 * 1024),
}

_PARTITIONS, _PARTITION_REGISTERS, _REGISTER_UNIT, _RESERVED = 4, 16384, 256, 1024


@dataclass(frozen=True)
class Figures:
    """Figures of one kernel on one architecture. The last three are None for `merge`, which samples
    nothing."""

    registers: int
    stack: int
    spills: int  # instructions that read or write local memory
    shared: int
    instructions: int
    warps: int  # resident on a multiprocessor
    load_bits: int | None  # of the narrowest load of values
    loads_in_flight: int | None  # loads of values before the first use of one
    lane_instructions: float | None  # in the inner loop, per sampled point and 64 channels


def missing() -> str | None:
    """Reason why the figures cannot be taken here, or None."""
    if reason := nvrtc.missing():
        return reason
    try:
        _tool()
    except EngineError as error:
        return str(error)
    return None


@cache
def figures(architecture: int) -> dict[str, Figures]:
    """Figures by kernel name. Raises `EngineError` where a tool is missing."""
    kernels = "".join(variant.source.split("\n", 1)[1] for variant in VARIANTS)
    resources, listings = disassembled(f'#include "mmfs.cuh"\n{kernels}', architecture)
    return {
        variant.name: _figures(
            variant, architecture, resources[variant.name], listings[variant.name]
        )
        for variant in VARIANTS
    }


def disassembled(
    source: str, architecture: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Registers, stack and shared memory of every kernel in a source, and its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        cubin.write_bytes(nvrtc.compile_cubin(source, architecture))
        usage = _run("-res-usage", cubin)
        code = _run("-sass", cubin)
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    resources = {name: tuple(map(int, rest)) for name, *rest in re.findall(pattern, usage)}
    if architecture >= 90:  # counts what the system reserves
        resources = {
            name: (*of[:2], of[2] - _RESERVED * bool(of[2])) for name, of in resources.items()
        }
    return resources, {part.split()[0]: part for part in code.split("Function : ")[1:]}


def instructions(listing: str) -> list[tuple[int, str]]:
    """Address and text of every instruction."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", listing)
    return [(int(address, 16), text.strip()) for address, text in found]


def occupancy(architecture: int, registers: int, shared: int, threads: int) -> int:
    """Warps resident on a multiprocessor, with `shared` bytes and `threads` a block."""
    limit, warps = MULTIPROCESSORS[architecture], -(-threads // 32)
    each = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _PARTITIONS * (_PARTITION_REGISTERS // each) // warps
    by_shared = limit.shared // (shared + _RESERVED) if shared else limit.blocks
    return min(limit.blocks, limit.warps // warps, by_registers, by_shared) * warps


def _figures(
    variant: Variant, architecture: int, resources: tuple[int, ...], listing: str
) -> Figures:
    registers, stack, shared = resources
    code = instructions(listing)
    operations = [operation(text) for _, text in code]
    body = inner_loop(code)
    loads = [each for each in body if each.startswith("LDG")]
    bits = [int(width[1]) if (width := re.search(r"\.(64|128)\b", load)) else 32 for load in loads]
    per_point = 2 if variant.dtype == "float32" else 1  # loads of a warp for a point's 64 channels
    return Figures(
        registers,
        stack,
        sum(each.startswith(("LDL", "STL")) for each in operations),
        shared,
        sum(not each.startswith("NOP") for each in operations),
        occupancy(architecture, registers, shared, variant.threads),
        min(bits) if loads else None,
        _in_flight(body) if loads else None,
        len(body) * 32 * per_point / len(loads) if loads else None,
    )


def operation(text: str) -> str:
    """The operation of an instruction, without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def inner_loop(code: list[tuple[int, str]]) -> list[str]:
    """Operations of the smallest loop that has 128-bit loads."""
    bodies = []
    for address, text in code:
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < address:
            first = int(back[1], 16)
            bodies.append([operation(t) for a, t in code if first <= a <= address])
    sampling = [body for body in bodies if any(op.startswith("LDG.E.128") for op in body)]
    return min(sampling, key=len, default=[])


def _in_flight(body: list[str]) -> int:
    """Loads before the first multiplication, which is the first use of one."""
    first = next(i for i, op in enumerate(body) if op.startswith(("HMMA", "FFMA")))
    return sum(op.startswith("LDG") for op in body[:first])


@cache
def _tool() -> str:
    """cuobjdump of the package `nvidia-cuda-cuobjdump`, which takes nvdisasm from beside it."""
    package = find_spec("nvidia")
    places = (package.submodule_search_locations or ()) if package else ()
    packaged = [
        str(path)
        for place in places
        for path in sorted(Path(place).glob("cu*/bin/cuobjdump"), reverse=True)
    ]
    for found in (*packaged, shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"):
        if found and Path(found).with_name("nvdisasm").exists():
            return found
    raise EngineError(
        "cuobjdump is not installed",
        fix="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
    )


def _run(option: str, cubin: Path) -> str:
    done = subprocess.run([_tool(), option, str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"cuobjdump {option} failed", got=(done.stdout + done.stderr).strip())
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Executed:
    """Counts for a sampled point of 64 channels, over all phases of the kernels."""

    lane_instructions: float
    value_bytes: float  # by 128-bit loads, which load values alone


@dataclass(frozen=True)
class Regime:
    """A small call of one kind: `parts` as `launch_plan.default_parts` of the real sizes."""

    parts: int
    queries: int
    images: int
    sides: tuple[int, ...] = (32, 16, 8)  # of the square levels


REGIMES = {
    "decode": Regime(1, 1, 4),
    "decode, 49 images": Regime(13, 1, 49),
    "prefill": Regime(0, 16, 4),
    "unet": Regime(0, 16, 1, (64, 32, 16, 8)),
}


def executed(name: str, dtype: str) -> Executed:
    """Count a regime in the emulator, with 8 points and heads of 64 channels."""
    regime = REGIMES[name]
    fixed: dict[str, Any] = {"dtype": dtype, "b": 1, "n": 4, "h": 2, "p": 8, "d": 64, "r": 60}
    sizes: dict[str, Any] = {
        "q": regime.queries,
        "m": regime.images,
        "levels": [(x, x) for x in regime.sides],
    }
    options: dict[str, Any] = {
        "base_grid": 16.0,
        "null_slot": True,
        "per_query": True,
        "references": True,
    }
    call = draw(np.random.default_rng(3), **fixed, **sizes, **options)
    call.inputs["image_position"][:] = np.arange(1, regime.images + 1)
    done = emulate(call, all_rows(call), default_kernel, parts=regime.parts)
    points = sampled_points(call, all_rows(call))
    value_bytes = done.bytes_by_kind["ld", "global", 16]
    return Executed(round(done.lane_instructions / points, 1), round(value_bytes / points, 1))


@dataclass(frozen=True)
class Budget:
    """A stored budget: version of NVRTC, figures by kernel and architecture, counts by regime and
    type."""

    nvrtc: str
    kernels: dict[str, dict[int, Figures]]
    executed: dict[str, dict[str, Executed]]


def budget() -> Budget:
    """Read the budget."""
    stored = json.loads(BUDGETS.read_text())
    kernels = {
        name: {int(architecture): Figures(**of) for architecture, of in by.items()}
        for name, by in stored["kernels"].items()
    }
    counted = {
        regime: {dtype: Executed(**of) for dtype, of in by.items()}
        for regime, by in stored["executed"].items()
    }
    return Budget(stored["nvrtc"], kernels, counted)


def worse(now: Figures | Executed, allowed: Figures | Executed) -> list[str]:
    """Figures that exceed the budget, a line each."""
    lines = []
    for name, most in asdict(allowed).items():
        got = getattr(now, name)
        if most is None:
            continue
        falls = name in ("warps", "load_bits", "loads_in_flight")
        if got is None or (got < most if falls else got > most):
            lines.append(f"{name}: {got}, budget {most}")
    return lines


def write() -> None:
    """Write the current figures as the budget."""
    current = Budget(
        nvrtc.version(),
        {
            variant.name: {a: figures(a)[variant.name] for a in ARCHITECTURES}
            for variant in VARIANTS
        },
        {regime: {dtype: executed(regime, dtype) for dtype in TYPES} for regime in REGIMES},
    )
    text = json.dumps(asdict(current), indent=1)
    text = re.sub(r"\n    +", " ", text).replace("\n   }", " }")  # a line an architecture
    BUDGETS.write_text(text + "\n")


def table() -> str:
    """The budget as the table of `docs/mmfs_kernel.md`."""
    allowed = budget()
    lines = [
        "| kernel | " + " | ".join(f"sm_{architecture}" for architecture in ARCHITECTURES) + " |",
        "|---" * (len(ARCHITECTURES) + 1) + "|",
    ]
    for name, by_architecture in allowed.kernels.items():
        cells = [
            f"{of.registers} · {of.warps} · {of.lane_instructions or 0:.0f}"
            for of in by_architecture.values()
            if of.lane_instructions
        ]
        if cells:
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += ["", "| regime | " + " | ".join(TYPES) + " |", "|---" * (len(TYPES) + 1) + "|"]
    for regime, by_type in allowed.executed.items():
        counted = [f"{of.lane_instructions:.0f} · {of.value_bytes:.0f}" for of in by_type.values()]
        lines.append(f"| {regime} | " + " | ".join(counted) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Print all figures, or the table of the budget."""
    if reason := missing():
        raise SystemExit(reason)
    if "--table" in arguments:
        print(table())
        return
    if "--write" in arguments:
        write()
    allowed = budget()
    for name, by_architecture in allowed.kernels.items():
        for architecture, most in by_architecture.items():
            _print(f"{name} sm_{architecture}", figures(architecture)[name], most)
    for regime, by_type in allowed.executed.items():
        for dtype, counted in by_type.items():
            _print(f"{regime} {dtype}", executed(regime, dtype), counted)


def _print(name: str, now: Figures | Executed, most: Figures | Executed) -> None:
    words = "  ".join(f"{key} {value}" for key, value in asdict(now).items())
    print("  ".join([name, words, *(f"WORSE {line}" for line in worse(now, most))]))


if __name__ == "__main__":
    main(sys.argv[1:])
