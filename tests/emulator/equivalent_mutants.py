"""Equivalent mutants: reasons why a changed kernel computes the same, apart from its outputs.

Accepted, and nothing else:
* what is written is not read again, on any path that a trial takes;
* what is written, or stored, does not matter: with random bits in its place, different in every
  thread and every time, all outputs are the same;
* the limit below which the exponential's argument is clamped, moved to where the exponential is
  0 in fp32 as well;
* what `_ARGUED` lists, recognised by the instructions around it, where all outputs are the same;
* the lanes of a butterfly sum or maximum meet in another order;
* the changed instruction gave the same number every time that it ran, in all trials and in further
  calls of every situation (signs of types that are never negative, limits that are never met,
  branches for empty axes);
* in kernels with 16-bit outputs: fp32 arithmetic that moves its result by less than 3e-5. It is
  what makes fp32 kernels as exact as they are; there the same changes are looked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import pytest

from emulator import gemv_trials, mutant_trials
from mmi_emulator import emulator, gemv
from mmi_emulator.mutants import Mutant
from mmi_emulator.ptx import Fault, Instruction, Kernel, Machine, PtxError
from mmi_emulator.ptx.instructions import bind
from mmi_emulator.ptx.operands import Action, Mask, memory_of
from mmi_emulator.ptx.parser import parse_instruction
from mmi_emulator.ptx.warp import SYNCHRONISING, perform
from mmi_plugins import reference
from mmi_plugins.compile.launch_plan import Variant
from mmi_plugins.conformance import calls
from mmi_plugins.constants import constant
from mmi_plugins.gemv.launch_plan import GemvVariant
from mmi_plugins.gemv.operator import GemvCall
from mmi_plugins.operator import MAX_LEVELS, MAX_POINTS, Call

_REGISTER = re.compile(r"[%$\w.]+")

AnyVariant = Variant | GemvVariant


def equivalence(variant: AnyVariant, kernel: Kernel, mutant: Mutant, same: bool) -> str | None:
    """The reason why `mutant`, which no trial caught, is equivalent; None where there is none.
    `same`: all outputs are the same, bit for bit."""
    before, after = kernel.instructions[mutant.index], parse_instruction(mutant.text)
    swapped = _swapped(before, after)
    if swapped and not _live_after(variant, kernel)[mutant.index] & set(swapped):
        if not set(swapped) & _reads(before) and not set(swapped) & _reads(after):
            return "what it writes is not read again"
    if _moves_a_butterfly(kernel, mutant, before):
        return "the lanes of a sum or maximum meet in another order"
    if _moves_a_limit(mutant):
        return "the exponential is 0 at both limits, and between them"
    for holds, reason in _ARGUED if isinstance(variant, Variant) else ():
        if same and holds(variant, kernel, mutant, before, after):
            return reason
    if same and _of_a_half_that_is_not_stored(kernel, before, after):
        return "of a pair only the lower number is stored"
    if same and _of_bytes_that_are_not_chosen(kernel, mutant, before, after):
        return "no byte of it is chosen"
    if _does_not_matter(variant, kernel, mutant, before, after):
        return "random bits in its place change nothing"
    change = _change(variant, kernel, mutant)
    if change == 0:
        signs = mutant.kind == "operation" and _unsigned(mutant.before) == _unsigned(mutant.text)
        always = "its operands are never negative" if signs else "it always gives the same number"
        return f"{always} ({_Probe.runs} runs)" if _Probe.runs else "it never runs"
    if variant.dtype != "float32" and before.type == "f32" and change < 3e-5:
        return f"it moves fp32 numbers by {change:.1g}, below 16-bit rounding"
    return None


def _unsigned(text: str) -> str:
    return re.sub(r"\.s(16|32|64)\b", r".u\1", text)


def _swapped(before: Instruction, after: Instruction) -> list[str]:
    """The registers that differ between two versions of an instruction."""
    old, new = _REGISTER.findall(before.text), _REGISTER.findall(after.text)
    if len(old) != len(new) or before.operation != after.operation:
        return []
    pairs = [pair for pair in zip(old, new, strict=True) if pair[0] != pair[1]]
    return [name for pair in pairs for name in pair if name.startswith("%")]


def _writes(instruction: Instruction) -> set[str]:
    if instruction.name in ("st", "bra", "ret", "exit", "bar", "red"):
        return set()
    return set(_REGISTER.findall(instruction.operands[0]))


def _reads(instruction: Instruction) -> set[str]:
    stores = instruction.name in ("st", "bar", "red")
    sources = instruction.operands if stores else instruction.operands[1:]
    read = {name for operand in sources for name in _REGISTER.findall(operand)}
    return read | ({instruction.guard} if instruction.guard else set())


@cache
def _executed(variant: AnyVariant, kernel: Kernel) -> np.ndarray:
    """Number of threads that ran each instruction of the unchanged kernel, in all trials; for a
    branch, that took it."""
    return np.sum([run(kernel)[1] for run in _all_runs(variant)], axis=0)


@lru_cache(1)
def _live_after(variant: AnyVariant, kernel: Kernel) -> list[set[str]]:
    """After each instruction: the registers that may be read, for something that is used, before
    they are written. Branches that no trial takes are left out."""
    instructions = kernel.instructions
    executed = _executed(variant, kernel)
    following: list[list[int]] = []
    for place, each in enumerate(instructions):
        jumps = [kernel.labels[each.operands[0]]] if each.name == "bra" and executed[place] else []
        goes_on = each.name not in ("bra", "ret", "exit") or each.guard
        following.append(jumps + ([place + 1] if goes_on else []))
    live: list[set[str]] = [set() for _ in range(len(instructions) + 1)]
    reads, writes = (
        [_reads(each) for each in instructions],
        [_writes(each) for each in instructions],
    )
    changed = True
    while changed:
        changed = False
        for place in range(len(instructions) - 1, -1, -1):
            after: set[str] = set().union(*(live[next_] for next_ in following[place]))
            kept = after if instructions[place].guard else after - writes[place]
            acts = not writes[place] or instructions[place].name in SYNCHRONISING
            before = kept | (reads[place] if acts or after & writes[place] else set())
            if before != live[place]:
                live[place], changed = before, True
    return [set().union(*(live[next_] for next_ in each)) for each in following]


def _moves_a_butterfly(kernel: Kernel, mutant: Mutant, before: Instruction) -> bool:
    """Test that only the distance of a butterfly was changed, to one with which the five steps of
    the warp still span all lanes: those of a sum or maximum over all 32."""
    if before.name == "mov" and mutant.kind in ("constant", "register"):
        users = [each for each in kernel.instructions if before.operands[0] in each.operands[1:]]
    else:
        users = [before]
        changed = parse_instruction(mutant.text)
        if (
            changed.operands[:2] != before.operands[:2]
            or changed.operands[3:] != before.operands[3:]
        ):
            return False
    return bool(users) and all(each.operation[:3] == ("shfl", "sync", "bfly") for each in users)


_LIMIT = "0fC2F00000"  # -120, of `exp_of` in location.cuh
_NOTHING = -104.0  # e^x is below half of fp32's least number


def _moves_a_limit(mutant: Mutant) -> bool:
    """Test that only the limit of the exponential's argument was changed, within what gives 0."""
    old, new = mutant.before.split(), mutant.text.split()
    changed = [pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]]
    if len(old) != len(new) or len(changed) != 1 or not changed[0][0].startswith(_LIMIT):
        return False
    found = re.match(r"0f([0-9A-F]{8})", changed[0][1])
    return bool(found) and np.uint32(int(found[1], 16)).view(np.float32) < _NOTHING  # type: ignore[index]


class _Poison(Machine):
    """Fills registers with random bits: those that instruction `index` of kernel `of` has written,
    or, of a store, for as long as it takes what it reads."""

    of: str
    index: int
    names: tuple[str, ...]
    rng: np.random.Generator

    def _bind(self, start: int):  # type: ignore[no-untyped-def]
        block = super()._bind(start)
        if self.kernel.name == _Poison.of and start <= _Poison.index < start + len(block.actions):
            place = _Poison.index - start
            block.actions[place] = self._spoiled(block.actions[place])
        return block

    def _spoiled(self, original: Action) -> Action:
        store = self.kernel.instructions[_Poison.index].name == "st"

        def run(mask: Mask) -> None:
            kept = {name: self.registers[name].copy() for name in _Poison.names}
            if not store:
                original(mask)
            for name in _Poison.names:
                self._spoil(self.registers[name], mask)
            if store:
                original(mask)
                for name, before in kept.items():
                    self.registers[name][...] = before

        return run

    def _spoil(self, register: np.ndarray, mask: Mask) -> None:
        lanes = ... if mask is True else mask
        bits = _Poison.rng.integers(0, 256, register.nbytes, np.uint8)
        random = bits > 127 if register.dtype == bool else bits.view(register.dtype)
        register[lanes] = random[lanes]


def _does_not_matter(
    variant: AnyVariant, kernel: Kernel, mutant: Mutant, before: Instruction, after: Instruction
) -> bool:
    """Test that random bits in place of what the instruction writes, or of what the mutant alone
    stores, leave all outputs as they are, in all trials and further calls."""
    if before.name == "st":
        names = set(_swapped(before, after)[1:2]) - set(_REGISTER.findall(before.text))
    elif before.name in ("bra", "ret", "exit", "red", "atom", *SYNCHRONISING) or before.guard:
        return False
    else:
        names = {name for name in _writes(before) | _writes(after) if name in kernel.registers}
    if not names:
        return False
    poisoned = mutant.of(kernel) if before.name == "st" else kernel
    _Poison.of, _Poison.index, _Poison.names = kernel.name, mutant.index, tuple(sorted(names))
    _Poison.rng = np.random.default_rng(mutant.index)
    with pytest.MonkeyPatch.context() as patch:
        for run in _all_runs(variant):
            patch.undo()
            expected = run(kernel)[0]
            patch.setattr(emulator, "Machine", _Poison)
            try:
                found = run(poisoned)[0]
            except (PtxError, AssertionError):
                return False
            if not np.array_equal(found, expected):
                return False
    return True


def _of_the_same_stores(
    variant: Variant, kernel: Kernel, mutant: Mutant, before: Instruction, after: Instruction
) -> bool:
    """In `prepare`: which lane writes a level's height, width and first cell."""
    if before.name != "setp" or _writes(after) != _writes(before):
        return False
    first = mutant.index + 1
    near = kernel.instructions[first : first + 6]
    jump = next((place for place, each in enumerate(near) if each.name == "bra"), None)
    if jump is None or near[jump].guard not in _writes(before):
        return False
    block = kernel.instructions[first + jump + 1 : kernel.labels[near[jump].operands[0]]]
    stores = [each for each in block if each.operation[:2] == ("st", "shared")]
    return (
        0 < len(block) <= 5
        and bool(stores)
        and all(each in stores or each.name in ("mov", "add", "mad", "ld") for each in block)
    )


def _of_a_reciprocal(
    variant: Variant, kernel: Kernel, mutant: Mutant, before: Instruction, after: Instruction
) -> bool:
    """In `reciprocal`: what is added to 65536 / divisor, as long as all quotients are right."""
    cut = kernel.instructions[mutant.index - 1]
    if cut.operation != ("cvt", "rzi", "u32", "f32") or before.operands[1] != cut.operands[0]:
        return False
    if before.operation != ("add", "s32") or after.operands[:2] != before.operands[:2]:
        return False
    pairs = np.arange(32 * MAX_POINTS)
    added = int(after.operands[2], 0)
    return all(
        (((65536 // by + added) * pairs[: most * by]) >> 16 == pairs[: most * by] // by).all()
        for by, most in [(points, 32) for points in range(1, MAX_POINTS + 1)]
        + [(held, MAX_LEVELS) for held in range(1, 33)]
    )


def _of_lanes_left_over(
    variant: Variant, kernel: Kernel, mutant: Mutant, before: Instruction, after: Instruction
) -> bool:
    """In fp32 `Sum`: that lanes which make up no whole group sum what the last group sums."""
    groups, follows = (kernel.instructions[mutant.index + step] for step in (-3, 1))
    return (
        variant.dtype == "float32"
        and (before.operation, follows.operation) == (("add", "s32"), ("min", "s32"))
        and groups.operation == ("div", "s32")
        and before.operands[1:] == (groups.operands[0], "-1")
        and after.operands[1:] == (groups.operands[0], "-0")
    )


def _of_lanes_without_an_entry(
    variant: Variant, kernel: Kernel, mutant: Mutant, before: Instruction, after: Instruction
) -> bool:
    """In `attend`: which entry a lane without one looks at."""
    follows = kernel.instructions[mutant.index + 1]
    return (
        before.operation == ("selp", "b32")
        and before.operands[2] == "0"
        and after.operands[2] == "1"
        and follows.operation == ("add", "s32")
        and before.operands[0] in follows.operands[1:]
    )


def _of_the_upper_half_of_a_warp(
    variant: Variant, kernel: Kernel, mutant: Mutant, before: Instruction, after: Instruction
) -> bool:
    """In kernels that split a row: a step between the halves of a warp, of which the upper one has
    no entry."""
    if variant.kind != "split" or constant("kSplitPairs") * MAX_LEVELS > 16:
        return False
    near = kernel.instructions[max(0, mutant.index - 6) : mutant.index + 1]
    steps = {each.operands[0] for each in near if each.name == "mov" and each.operands[1] == "16"}
    return before.operation[:3] == ("shfl", "sync", "bfly") and before.operands[2] in steps


def _of_a_half_that_is_not_stored(kernel: Kernel, before: Instruction, after: Instruction) -> bool:
    """Test for another upper number of a pair whose lower number alone is used."""
    if before.operation[:2] != ("cvt", "rn") or before.operation[2] not in ("f16x2", "bf16x2"):
        return False
    if after.operation != before.operation:
        return False
    if (after.operands[0], after.operands[2]) != (before.operands[0], before.operands[2]):
        return False
    users = [each for each in kernel.instructions if before.operands[0] in _reads(each)]
    narrow = (("cvt", "u16", "u32"), ("st", "global", "u16"), ("st", "global", "b16"))
    return all(each.operation in narrow for each in users)


def _of_bytes_that_are_not_chosen(
    kernel: Kernel, mutant: Mutant, before: Instruction, after: Instruction
) -> bool:
    """Test for another second source of a permutation that takes all bytes from the first."""
    if before.name != "prmt" or after.operands[:2] + after.operands[3:] != (
        before.operands[:2] + before.operands[3:]
    ):
        return False
    writers = [each for each in kernel.instructions if before.operands[3] in _writes(each)]
    if [each.name for each in writers] != ["mov"]:
        return False
    choice = int(writers[0].operands[1].rstrip("U"), 0)
    return all(choice >> shift & 15 < 4 for shift in (0, 4, 8, 12))


# Changes that were thought through, once and for all kernels, and why they change nothing.
_ARGUED = (
    (_of_the_same_stores, "every lane would write the same"),
    (_of_a_reciprocal, "all quotients that there are stay the same"),
    (_of_lanes_left_over, "no one takes their sums"),
    (_of_lanes_without_an_entry, "what it finds weighs nothing"),
    (_of_the_upper_half_of_a_warp, "the upper half of the warp has nothing to add"),
)


class _Probe(Machine):
    """Runs the changed instruction beside the original, on the same registers."""

    of: str  # the kernel's name
    live: set[str]  # registers that are read afterwards
    index: int
    changed: Instruction
    change: float  # the largest so far, infinite for what is not a float
    runs: int

    def _bind(self, start: int):  # type: ignore[no-untyped-def]
        block = super()._bind(start)
        if self.kernel.name == _Probe.of and start <= _Probe.index < start + len(block.actions):
            place = _Probe.index - start
            block.actions[place] = self._beside(block.actions[place])
        return block

    def _beside(self, original: Action) -> Action:
        other = bind(self, _Probe.changed)

        def run(mask: Mask) -> None:
            taken = mask
            if _Probe.changed.guard:
                holds = self.predicate(_Probe.changed.guard) ^ _Probe.changed.negated
                taken = holds if mask is True else holds & mask
            self._compare(lambda: other(taken), lambda: original(mask))

        return run

    def _synchronise(self, index, instruction, mask, taken, lanes):  # type: ignore[no-untyped-def]
        if self.kernel.name != _Probe.of or index != _Probe.index:
            return super()._synchronise(index, instruction, mask, taken, lanes)
        result = None

        def original() -> None:
            nonlocal result
            result = super(_Probe, self)._synchronise(index, instruction, mask, taken, lanes)

        self._compare(lambda: perform(self, _Probe.changed, mask), original)
        return result

    def _last(self, index: int, mask: Mask, lanes: int) -> int | None:
        mine = self.kernel.name == _Probe.of and index == _Probe.index
        if mine and self.kernel.instructions[index].name == "bra":
            instruction = self.kernel.instructions[index]
            here = np.ones(self.lanes, bool) if mask is True else mask
            jumps = self._guarded(instruction, here)
            others = self._guarded(_Probe.changed, here)
            differs = bool((jumps != others).any())
            if _Probe.changed.operands != instruction.operands:
                differs |= bool(jumps.any())
            _Probe.change = np.inf if differs else _Probe.change
            _Probe.runs += 1
        return super()._last(index, mask, lanes)

    def _compare(self, changed, original) -> None:  # type: ignore[no-untyped-def]
        tokens = {*_REGISTER.findall(_Probe.changed.text)}
        tokens |= {*_REGISTER.findall(self.kernel.instructions[_Probe.index].text)}
        names = [name for name in tokens if name in self.registers and name in _Probe.live]
        used = [name for name in tokens if name in self.registers]
        before = {name: self.registers[name].copy() for name in used}
        try:
            changed()
        except Fault:
            _Probe.change = np.inf
        after = {name: self.registers[name].copy() for name in names}
        for name in used:
            self.registers[name][...] = before[name]
        original()
        _Probe.runs += 1
        for name in names:
            mine, other = self.registers[name], after[name]
            if (mine == other).all():
                continue
            floats = self.kernel.instructions[_Probe.index].type == "f32" and mine.itemsize == 4
            old, new = (x.view(np.float32) if floats else x for x in (mine, other))
            gap = np.inf
            if floats and name == self.kernel.instructions[_Probe.index].operands[0]:
                apart = np.abs(old - new)[mine != other] / np.maximum(1, np.abs(old[mine != other]))
                gap = float(np.nan_to_num(apart, nan=np.inf).max())
            _Probe.change = max(_Probe.change, gap)


# Runs one call with a kernel in place of the compiler's: outputs, and how many threads ran each of
# its instructions.
Run = Callable[[Kernel], tuple[np.ndarray, np.ndarray]]


def _all_runs(variant: AnyVariant) -> list[Run]:
    """Runs of every trial, and of further calls."""
    if isinstance(variant, GemvVariant):
        return [_run_of_gemv(trial.call) for trial in gemv_trials.gemv_trials(variant)]
    trials = [(each.call, each.rows, each.parts) for each in mutant_trials.trials(variant)]
    return [_run_of(variant, *each) for each in (*trials, *_further(variant))]


def _run_of(variant: Variant, call: Call, rows: np.ndarray, parts: int) -> Run:
    def run(kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
        kernels = mutant_trials.kernels({variant.name: kernel})
        done = emulator.emulate(call, rows, kernels, parts=parts)
        return done.output, done.counts[variant].executed

    return run


def _run_of_gemv(call: GemvCall) -> Run:
    def run(kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
        output, counts = gemv.emulate(call, lambda variant: kernel)
        return output, counts.executed

    return run


@cache
def _further(variant: Variant) -> list[tuple[Call, np.ndarray, int]]:
    """Calls of every situation, unlike the trials."""
    made = []
    widths = (128, 112, 72) if variant.wide else (64, 40, 16, 8, 56)
    for index, situation in enumerate(calls.SITUATIONS):
        rng = np.random.default_rng([7, index])
        sizes = {"d": widths[index % len(widths)], "m": (34, 1, 7, 2)[index % 4], "b": 2, "q": 2}
        sizes["p"] = 1 if sizes["m"] > 7 else 1 + 2 * index
        call = calls.draw(rng, situation, dtype=variant.dtype, **sizes)
        rows = reference.all_rows(call)
        chosen = rows[np.sort(rng.permutation(len(rows))[:12])]
        made.append(
            (
                call,
                chosen,
                {"rows": 0, "split": 1 + index % 3, "merge": 2 + index % 8}[variant.kind],
            )
        )
    return made


def _change(variant: AnyVariant, kernel: Kernel, mutant: Mutant) -> float:
    """By how much the changed instruction's results differ, at most: relative to the original's, or
    to 1 where that is less. 0 where they never do; infinite where that cannot be said."""
    changed = parse_instruction(mutant.text)
    if changed.name in ("st", "red", "atom", "bar", "mma"):
        return np.inf
    if changed.name == "ld" and memory_of(changed) == "shared":
        return np.inf
    _Probe.of, _Probe.index, _Probe.changed = kernel.name, mutant.index, changed
    _Probe.live = _live_after(variant, kernel)[mutant.index]
    _Probe.change, _Probe.runs = 0.0, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator, "Machine", _Probe)
        for run in _all_runs(variant):
            run(kernel)
            if _Probe.change == np.inf:
                break
    return _Probe.change
