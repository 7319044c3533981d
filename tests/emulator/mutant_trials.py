"""Run mutants of the kernels over a fixed set of cases, and report which are caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from mmi_emulator import emulator
from mmi_emulator.ptx import Kernel, PtxError
from mmi_plugins import reference
from mmi_plugins.compile.launch_plan import Variant
from mmi_plugins.conformance import calls
from mmi_plugins.operator import NARROW_INPUTS, TOLERANCES, Call

COMPUTE = 90

# Error beyond rounding the exact result to T, relative to the largest value, that no case of the
# unchanged kernels may have. Mutants are held to what the unchanged kernel does in the same case.
SHARP = 1e-6

# Below its smallest normal number a type has no relative precision.
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}

_LEVELS = ([(8, 6), (4, 3), (2, 2), (1, 1)], [(6, 9), (3, 4)], [(5, 7)])


@dataclass(frozen=True)
class Trial:
    """One call, how it is put on the GPU, what must come out, and what the unchanged kernel gives
    and takes: `sharp`: how far beyond rounding a result may be; `work`: lane-instructions."""

    name: str
    call: Call
    parts: int
    rows: np.ndarray
    expected: np.ndarray
    output: np.ndarray
    sharp: float = SHARP
    work: int = 0


# A kernel that executes more than this times what the unchanged one does is noticed: figures of
# what is executed have a budget (`mmi_emulator.ptx_budget`).
MORE_WORK = 1.01


def _calls(dtype: str, wide: bool) -> Iterator[tuple[str, Call]]:
    """Small calls that together use everything there is in a kernel."""
    sizes = (128, 80, 72) if wide else (24, 64, 8) if dtype != "float32" else (24, 128, 8)
    plain = {"dtype": dtype, "n": 3, "r": 4, "h": 2}
    several = {"levels": _LEVELS[0], "p": 3, "m": 3, "b": 2, "q": 5, "d": sizes[0]}
    many = {"levels": _LEVELS[1], "p": 1, "m": 67, "b": 1, "q": 1, "d": sizes[1]}
    large = {"levels": _LEVELS[2], "p": 16, "m": 5, "b": 1, "q": 3, "d": sizes[0]}
    rng = np.random.default_rng(5)

    def draw(situation: str, **fixed: object) -> tuple[str, Call]:
        return situation, calls.draw(rng, situation, **{**plain, **fixed})

    single = {"levels": _LEVELS[2], "p": 1, "m": 1, "b": 2, "q": 1, "d": sizes[1]}
    yield draw("ordinary", **several, null_slot=True, per_query=True, references=True)
    yield draw("ordinary", **many, null_slot=False, per_query=False, references=False)
    yield draw("ordinary", **large, null_slot=False, per_query=True, references=False)
    yield draw("bad slots", **several, null_slot=True, per_query=True, references=True)
    yield draw("on borders", **several, null_slot=True, per_query=False, references=True)
    crowd = {"levels": _LEVELS[2], "p": 16, "m": 18, "b": 1, "q": 1, "d": sizes[2]}
    yield draw("ordinary", **crowd, null_slot=True, per_query=True, references=True)
    yield draw("huge logits", **crowd, null_slot=False, per_query=True, references=True)
    name, call = draw("ordinary", **single, null_slot=False, references=False)
    yield "one pair", _changed(call, image_position=np.ones_like(call["image_position"]))
    several_single = {**single, "q": 6, "null_slot": True, "references": True}
    name, call = draw("ordinary", **several_single)
    weak = {name: 0.3 * call[name] for name in ("logits", "logit_table")}
    near_zero = _changed(call, image_position=np.ones_like(call["image_position"]), **weak)
    yield "one pair beside the null slot", near_zero
    yield "full turn", _full_turn(rng, dtype, sizes[0])
    yield "last cell", _last_cell(rng, dtype, 80 if wide else 24)
    yield draw("tiny logits", **large, null_slot=True, per_query=True, references=True)
    yield draw("tiny logits", **several, null_slot=False, per_query=True, references=True)
    yield draw("far outside", **several, null_slot=False, per_query=True, references=True)
    yield draw("all hidden", **several, null_slot=False, per_query=True, references=True)
    yield draw("all hidden", **several, null_slot=True, per_query=True, references=True)
    yield "long maps", _long_maps(rng, dtype, sizes[2])
    yield "near ties", _near_ties(rng, dtype, sizes[2])
    if dtype == "float32":  # 16-bit outputs cannot show it
        yield "faint", _faint(rng, null_slot=False)
        yield "faint beside nothing", _faint(rng, null_slot=True)
    name, call = draw("huge logits", **several, null_slot=True, per_query=True, references=True)
    yield name, call
    largest = np.float32(1e38 if dtype != "float16" else 6e4)
    huge = np.sign(call["logits"]) * largest
    none = np.zeros_like(call["logit_table"])  # float64 would lose it in the sum
    yield "enormous logits", _changed(call, logits=huge, logit_table=none)
    share = {"levels": _LEVELS[2], "p": 16, "m": 18, "b": 1, "h": 1, "q": 10, "d": 8, "r": 4}
    shared = {**share, "d": sizes[2], "null_slot": False, "per_query": True}
    yield draw("huge logits", **shared)  # whoever shares a row has the largest of some row
    name, call = draw("ordinary", **shared)
    table = call["logit_table"].copy()
    table[1], table[2] = -2.5e38, 2.5e38  # and of some only what is too far below to be subtracted
    yield "enormous tables", _changed(call, logits=np.zeros_like(call["logits"]), logit_table=table)
    name, call = draw("ordinary", **several, null_slot=True, per_query=True, references=True)
    seen = np.ones_like(call["image_position"])
    slot = np.array([[-1, 0, 3], [1, -(2**31), 2]], np.int32)  # of a pool of three
    yield "visible without a slot", _changed(call, image_slot=slot, image_position=seen)
    name, call = draw("ordinary", **many, null_slot=True, references=False)
    seen = np.ones_like(call["image_position"])
    yield "whole turns, then the next 32 images", _changed(call, image_position=seen)
    name, call = draw("ordinary", **{**shared, "q": 9})
    table = np.zeros_like(call["logit_table"])
    table[2] = 200
    own = 1 + (np.arange(18) // 2 == np.arange(9)[:, None])  # two images a part, one part a row
    yield (
        "each part the largest of a row",
        _changed(call, image_position=own[None], logit_table=table),
    )
    if dtype == "float32":
        yield draw("ordinary", **{**several, "d": 64}, null_slot=True)  # two groups of lanes


def _changed(call: Call, **inputs: np.ndarray) -> Call:
    """The call with other inputs, rounded to what its type holds."""
    narrow = {
        name: calls.rounded(array, call.dtype)
        if name in NARROW_INPUTS
        else array.astype(call[name].dtype)
        for name, array in inputs.items()
    }
    return replace(call, inputs={**call.inputs, **narrow})


def _long_maps(rng: np.random.Generator, dtype: str, d: int) -> Call:
    """Maps 700 cells long, where the last bits of a location are worth whole parts of a cell."""
    fixed = {"dtype": dtype, "n": 2, "r": 3, "h": 2, "b": 1, "q": 4, "m": 2, "p": 4, "d": d}
    call = calls.draw(
        rng, levels=[(2, 700), (700, 2)], base_grid=12.5, references=True, null_slot=False, **fixed
    )
    slot, position = np.array([[0, 1]], np.int32), np.array([[[1, 2]]], np.int32)
    return replace(call, inputs={**call.inputs, "image_slot": slot, "image_position": position})


def _near_ties(rng: np.random.Generator, dtype: str, d: int) -> Call:
    """Large logits of which the sum with the table's decides in bits that one float has lost."""
    fixed = {"dtype": dtype, "n": 2, "r": 3, "h": 2, "b": 1, "q": 4, "m": 3, "p": 4, "d": d}
    call = calls.draw(rng, levels=[(4, 4), (2, 3)], null_slot=False, **fixed)
    return _changed(
        call,
        logits=300 + np.round(call["logits"]),
        logit_table=-300 + call["logit_table"],
        image_position=np.ones_like(call["image_position"]),
    )


def _full_turn(rng: np.random.Generator, dtype: str, d: int) -> Call:
    """32 visible pairs, all of which touch the map: a table of corners that is full."""
    fixed = {"dtype": dtype, "n": 3, "r": 3, "h": 2, "b": 1, "q": 2, "m": 8, "p": 4, "d": d}
    call = calls.draw(rng, levels=_LEVELS[2], base_grid=12.5, null_slot=False, **fixed)
    return _changed(
        call,
        image_position=np.ones_like(call["image_position"]),
        reference=np.full_like(call["reference"], 0.5),
    )


def _last_cell(rng: np.random.Generator, dtype: str, d: int) -> Call:
    """Points at the very end of `value`, of which nothing beyond may be read."""
    fixed = {"dtype": dtype, "n": 2, "r": 3, "h": 2, "b": 1, "q": 2, "m": 1, "p": 4, "d": d}
    call = calls.draw(rng, levels=_LEVELS[2], null_slot=False, **fixed)
    return _changed(
        call,
        image_slot=np.ones_like(call["image_slot"]),
        image_position=np.ones_like(call["image_position"]),
        offsets=0.1 * call["offsets"],
        offset_table=np.zeros_like(call["offset_table"]),
        reference=np.ones_like(call["reference"]),
    )


def _faint(rng: np.random.Generator, null_slot: bool) -> Call:
    """A call in which most of the weight is on the null slot or on points outside their level, so
    that every output is a sum of few small exponentials, those of one image: their relative error
    is the output's."""
    fixed = {"dtype": "float32", "n": 2, "r": 3, "h": 2, "b": 9, "q": 1, "m": 9, "p": 8, "d": 8}
    call = calls.draw(rng, levels=[(3, 5), (2, 2)], per_query=False, null_slot=null_slot, **fixed)
    table, moved = 0.1 * call["logit_table"], 0.1 * call["offset_table"]
    position = np.full((9, 1, 9), 1, np.int32)
    if not null_slot:
        table[2] = 50 + 14 * rng.random(table[2].shape)
        moved[2], position[:, 0, 6] = 1000, 2  # seen after half of the others
    value = np.abs(call["value"])
    value[0] = 0
    return _changed(
        call,
        value=value,
        logits=0.1 * call["logits"] - 15 - 45 * rng.random((9, 1, 2, 1, 1)),
        logit_table=table,
        offsets=0.1 * call["offsets"],
        offset_table=moved,
        reference=np.full(call["reference"].shape, 0.5),
        null_value=np.zeros(call["null_value"].shape),
        image_slot=np.eye(9, dtype=np.int32),
        image_position=position,
    )


@cache
def trials(variant: Variant) -> tuple[Trial, ...]:
    """The cases that `variant` is tried with."""
    made = []
    for index, (name, call) in enumerate(_calls(variant.dtype, variant.wide)):
        rows = reference.all_rows(call)
        parts = {
            "rows": 0,
            "split": 1 + 2 * (index % 2),
            "merge": 9 if call.sizes["m"] == 18 else 2 + index % 4,
        }[variant.kind]
        trial = Trial(name, call, parts, rows, reference.mmfs_reference(call, rows), np.empty(0))
        loose = 3 * SHARP if name.startswith("faint") else SHARP
        output, work = run(trial, variant)
        trial = replace(trial, output=output, sharp=loose, work=work)
        assert wrong(trial, trial.output) is None, (variant.name, name)
        sharp = 1e-8 + 1.25 * max(0.0, beyond_rounding(trial, trial.output))
        made.append(replace(trial, sharp=sharp))
    return tuple(made)


def kernels(changed: Mapping[str, Kernel]) -> Callable[[Variant], Kernel]:
    """The compiler's kernels, or those in `changed` by name."""

    def kernel(variant: Variant) -> Kernel:
        name = emulator.compiler() or ""
        return changed.get(variant.name) or emulator.compiled(variant, COMPUTE, name)

    return kernel


def run(
    trial: Trial, variant: Variant, most: int = 10_000_000, **changed: Kernel
) -> tuple[np.ndarray, int]:
    """Outputs [rows, d] of the trial with `changed` kernels (by name), and the lane-instructions of
    `variant`."""
    done = emulator.emulate(
        trial.call, trial.rows, kernels(changed), parts=trial.parts, most_instructions=most
    )
    return done.output, done.counts[variant].lane_instructions


def verdict(variant: Variant, changed: Kernel, most: int = 200_000) -> tuple[str, str]:
    """Verdict on a changed kernel, and its reason: `caught` (a fault, a wrong result or more work
    in a case), `same` (every bit of every output is as before) or `missed` (it differs, but by too
    little)."""
    differs = ""
    for trial in trials(variant):
        try:
            found, work = run(trial, variant, most, **{variant.name: changed})
        except (PtxError, AssertionError) as error:
            return "caught", f"{trial.name}: {error}"
        if message := wrong(trial, found):
            return "caught", f"{trial.name}: {message}"
        if work > MORE_WORK * trial.work:
            return "caught", f"{trial.name}: {work} lane-instructions, not {trial.work}"
        if not differs and not np.array_equal(found, trial.output):
            differs = f"{trial.name}: differs by {np.abs(found - trial.output).max():.2g}"
    return ("missed", differs) if differs else ("same", "all outputs are the same, bit for bit")


def wrong(trial: Trial, found: np.ndarray) -> str | None:
    """Difference of `found` [rows, d] from the expected output beyond the tolerance, or None."""
    dtype, expected = trial.call.dtype, trial.expected
    if not np.isfinite(found).all():
        return "not finite"
    scale = max(np.sqrt((expected**2).mean()), SMALLEST[dtype])
    relative = np.sqrt(((found - expected) ** 2).mean()) / scale
    if relative > TOLERANCES[dtype].relative:
        return f"relative error {relative:.2g}"
    excess = beyond_rounding(trial, found)
    return f"{excess:.2g} beyond rounding" if excess > trial.sharp else None


def beyond_rounding(trial: Trial, found: np.ndarray) -> float:
    """Error of `found` beyond that of the nearest number of its type, relative to the largest
    value, or to itself where it is faint."""
    dtype, expected = trial.call.dtype, trial.expected
    bits = {"float32": 24, "float16": 11, "bfloat16": 8}[dtype]
    exponent = np.frexp(np.maximum(np.abs(expected), SMALLEST[dtype]))[1]
    half = np.ldexp(0.5, exponent - bits)
    if trial.name.startswith("faint"):
        largest = np.maximum(np.abs(expected), SMALLEST[dtype])
    else:
        largest = max(np.abs(trial.call["value"]).max(), np.abs(trial.call["null_value"]).max())
    return float(((np.abs(found - expected) - half) / largest).max())
