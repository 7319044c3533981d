"""Run mutants of the kernels of `mmi::WeightOnlyMatMul` over a fixed set of calls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from mmi_emulator import gemv
from mmi_emulator.ptx import Kernel, PtxError
from mmi_plugins.constants import constant
from mmi_plugins.gemv.calls import draw
from mmi_plugins.gemv.launch_plan import GEMV_VARIANTS, ROWS_VARIANTS, GemvVariant
from mmi_plugins.gemv.operator import GemvCall
from mmi_plugins.gemv.reference import gemv_reference

# A kernel that executes more than this times what the unchanged one does exceeds its budget.
MORE_WORK = 1.01

_BITS = {"float16": 11, "bfloat16": 8}


@dataclass(frozen=True)
class GemvTrial:
    """One call, what must come out, and what the unchanged kernel gives and takes: `excess`: error
    beyond rounding, relative to the largest sum of magnitudes; `work`: lane-instructions."""

    call: GemvCall
    expected: np.ndarray
    magnitude: float
    output: np.ndarray
    excess: float = 0.0
    work: int = 0


@cache
def kernel_of(variant: GemvVariant) -> Kernel:
    """The unchanged kernel."""
    return gemv.compiled(variant)


@cache
def gemv_trials(variant: GemvVariant) -> tuple[GemvTrial, ...]:
    """Calls that use everything there is in a kernel: several turns of all warps, a step that is
    not whole, warps without a step, tiles that are not whole, any number of rows."""
    rng = np.random.default_rng((*GEMV_VARIANTS, *ROWS_VARIANTS).index(variant))
    unit = variant.block or 32
    sizes = [(8, 1184, 20), (1, 96, 16), (3, 2208, 17), (5, 32, 1), (7, 1088, 33), (2, 8192, 9)]
    if variant.rows:
        sizes = [(83, 1184, 20), (64, 96, 144), (9, 160, 1)]
    made = []
    for rows, inputs, outputs in sizes:
        whole = unit * -(-inputs // unit)
        sides = {"rows": rows, "inputs": whole, "outputs": outputs, "block": variant.block}
        call = draw(rng, variant.format, variant.dtype, **sides)
        positive = replace(call, input=np.abs(call.input))
        for each in (call, positive, _infinite(call)) if inputs == 1184 else (call, positive):
            output, work = run(each, kernel_of(variant))
            with np.errstate(invalid="ignore"):
                expected = gemv_reference(each)
            magnitude = float(np.abs(gemv_reference(positive)).max())
            trial = GemvTrial(each, expected, magnitude, output, work=work)
            assert wrong_where_infinite(trial, output) is None
            made.append(
                replace(trial, excess=1e-7 + 1.25 * max(0.0, beyond_rounding(trial, output)))
            )
    return tuple(made)


def _infinite(call: GemvCall) -> GemvCall:
    """The call with infinite inputs in a row, in the step that the warp of the last step takes
    before it: nothing of them may be left in registers where the last step has no inputs."""
    steps = -(-call.input.shape[1] // constant("kGemvStep"))
    first = (steps - 1 - constant("kGemvWarps")) * constant("kGemvStep")
    where = slice(first, first + constant("kGemvStep"))
    given, numbers = call.input.copy(), call.numbers.copy()
    given[0, where] = np.inf
    numbers[where] = 1
    return replace(call, input=given, numbers=numbers)


def wrong_where_infinite(trial: GemvTrial, found: np.ndarray) -> str | None:
    """Difference of `found` in whether numbers are finite, or None."""
    same = np.where(np.isfinite(trial.expected), np.isfinite(found), found == trial.expected)
    return None if same.all() else "not finite, or not infinite"


def run(call: GemvCall, kernel: Kernel, most: int = 200_000) -> tuple[np.ndarray, int]:
    """Output and lane-instructions of a call."""
    output, counts = gemv.emulate(call, lambda variant: kernel, most)
    return output, counts.lane_instructions


def beyond_rounding(trial: GemvTrial, found: np.ndarray) -> float:
    """Error of `found` beyond that of the nearest number of its type."""
    bits = _BITS[trial.call.dtype]
    exponent = np.frexp(np.maximum(np.abs(trial.expected), 2.0**-14))[1]
    half = np.ldexp(0.5, exponent - bits)
    finite = np.isfinite(trial.expected)
    error = np.abs(found[finite] - trial.expected[finite]) - half[finite]
    return float(error.max()) / trial.magnitude


def verdict(variant: GemvVariant, changed: Kernel) -> tuple[str, str]:
    """Verdict on a changed kernel, and its reason: `caught` (a fault, a wrong result or more work
    in a call), `same` (every output is as before) or `missed`."""
    differs = ""
    for trial in gemv_trials(variant):
        where = f"{trial.call.rows} rows of {trial.call.input.shape[1]}"
        try:
            found, work = run(trial.call, changed)
        except (PtxError, AssertionError) as error:
            return "caught", f"{where}: {error}"
        if reason := wrong_where_infinite(trial, found):
            return "caught", f"{where}: {reason}"
        if (excess := beyond_rounding(trial, found)) > trial.excess:
            return "caught", f"{where}: {excess:.2g} beyond rounding"
        if work > MORE_WORK * trial.work:
            return "caught", f"{where}: {work} lane-instructions, not {trial.work}"
        if not differs and not np.array_equal(found, trial.output):
            differs = f"{where}: differs by {np.abs(found - trial.output).max():.2g}"
    return ("missed", differs) if differs else ("same", "all outputs are the same, bit for bit")
