"""Mutation testing of PTX kernels: one-token mutants that a set of cases must detect.

Every instruction is changed in every way below, one change at a time: its operation, type, rounding
or comparison, its guard, a constant, a register or predicate, an address offset, the target of a
jump.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mmi_emulator.ptx.parser import WIDTHS, Instruction, Kernel, parse_instruction

# Replacements for a word of an operation. A type changes its sign only where the sign matters.
_WORDS: dict[str, tuple[str, ...]] = {
    "add": ("sub",),
    "sub": ("add",),
    "mul": ("add",),
    "min": ("max",),
    "max": ("min",),
    "and": ("or",),
    "or": ("and", "xor"),
    "xor": ("or",),
    "shl": ("shr",),
    "shr": ("shl",),
    "div": ("rem",),
    "rem": ("div",),
    "neg": ("abs",),
    "abs": ("neg",),
    "ex2": ("lg2",),
    "rcp": ("sqrt",),
    "popc": ("clz",),
    "lo": ("hi",),
    "hi": ("lo",),
    "rni": ("rmi",),
    "rmi": ("rpi", "rzi"),
    "rzi": ("rmi",),
    "eq": ("ne",),
    "ne": ("eq",),
    "neu": ("equ",),
    "equ": ("neu",),
    "lt": ("le", "ge"),
    "le": ("lt", "gt"),
    "gt": ("ge", "le"),
    "ge": ("gt", "lt"),
    "ltu": ("geu",),
    "leu": ("gtu",),
    "gtu": ("leu",),
    "geu": ("ltu",),
    "bfly": ("down", "idx"),
    "down": ("bfly",),
    "up": ("down",),
    "idx": ("bfly",),
    "any": ("all",),
    "all": ("any",),
    "s32": ("u32",),
    "u32": ("s32",),
    "s64": ("u64",),
    "u64": ("s64",),
    "s16": ("u16",),
    "u16": ("s16",),
    "f16": ("bf16",),
    "bf16": ("f16",),
    "f16x2": ("bf16x2",),
    "bf16x2": ("f16x2",),
}

# Operations in which the sign of a type matters.
_SIGNED = ("div", "rem", "mul", "mad", "min", "max", "setp", "shr", "cvt", "set", "bfe")

_TOKEN = re.compile(r"[%$\w.]+")
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})")


@dataclass(frozen=True)
class Mutant:
    """Instruction `index` of a kernel, changed to `text`; `kind`: the kind of the change."""

    index: int
    kind: str
    before: str
    text: str

    def of(self, kernel: Kernel) -> Kernel:
        """`kernel` with this mutation."""
        return kernel.with_instruction(self.index, self.text)

    def __str__(self) -> str:
        return f"{self.index}: {self.before} -> {self.text} ({self.kind})"


def mutants(kernel: Kernel, seed: int = 0) -> Iterator[Mutant]:
    """Every one-token mutant of the kernel. `seed` chooses the replacing registers and labels."""
    rng = np.random.default_rng(seed)
    near = _Neighbours(kernel, rng)
    for index, instruction in enumerate(kernel.instructions):
        made = {instruction.text}
        for kind, text in _changes(index, instruction, kernel, near):
            if text not in made:
                made.add(text)
                parse_instruction(text)
                yield Mutant(index, kind, instruction.text, text)


class _Neighbours:
    """Replacements: registers of the same type from nearby instructions, and other labels."""

    def __init__(self, kernel: Kernel, rng: np.random.Generator) -> None:
        self._kernel, self._rng = kernel, rng
        self._written = [_TOKEN.findall(each.text) for each in kernel.instructions]

    def register(self, index: int, name: str) -> str | None:
        """Another register of the type of `name`, used shortly before `index`, or None."""
        types = self._kernel.registers
        found: list[str] = []
        for tokens in reversed(self._written[max(0, index - 60) : index]):
            for token in tokens:
                same = types.get(token) == types[name] and token != name and token not in found
                found += [token] if same else []
            if len(found) >= 3:
                break
        return str(found[int(self._rng.integers(len(found)))]) if found else None

    def label(self, name: str) -> str | None:
        """Another label, or None."""
        others = [label for label in self._kernel.labels if label != name]
        return str(others[int(self._rng.integers(len(others)))]) if others else None


def _changes(
    index: int, instruction: Instruction, kernel: Kernel, near: _Neighbours
) -> Iterator[tuple[str, str]]:
    """Kind and text of every mutation of one instruction."""
    text = instruction.text
    if instruction.guard:
        bare = text.split(None, 1)[1]
        sign = "" if instruction.negated else "!"
        yield "guard", f"@{sign}{instruction.guard} {bare}"
        yield "guard", bare
    yield from _operations(instruction)
    start = text.index(".".join(instruction.operation)) + len(".".join(instruction.operation))
    for match in _TOKEN.finditer(text, start):
        token, rest = match[0], (text[: match.start()], text[match.end() :])
        if token in kernel.registers:
            other = near.register(index, token)
            if other:
                yield "register", other.join(rest)
        elif token in kernel.labels:
            other = near.label(token)
            if other:
                yield "label", other.join(rest)
        elif number := _FLOAT.fullmatch(token):
            for value in _other_floats(int(number[1], 16)):
                yield "constant", f"0f{value:08X}".join(rest)
        elif _INTEGER.fullmatch(token):
            kind = "offset" if "[" in rest[0][start:] and "]" not in rest[0][start:] else "constant"
            step = WIDTHS.get(instruction.type, 1) if kind == "offset" else 1
            value = int(token.rstrip("U"), 0)
            for other_value in (value + step, value - step):
                yield kind, str(other_value).join(rest)


def _operations(instruction: Instruction) -> Iterator[tuple[str, str]]:
    """Mutations of one word of the operation."""
    words = instruction.operation
    whole = ".".join(words)
    for place, word in enumerate(words):
        for other in _WORDS.get(word, ()):
            sign = word[0] in "su" and word[1:].isdigit()
            if sign and (words[0] not in _SIGNED or words[0] == "mul" and "lo" in words):
                continue
            if sign and words[0] == "mad" and "lo" in words:
                continue
            if words[0] in ("ld", "st") or (words[0] == "mma" and place < 7):
                continue
            changed = list(words)
            changed[place] = other
            if not _possible(tuple(changed), instruction):
                continue
            kind = "comparison" if words[0] in ("setp", "set") and place == 1 else "operation"
            yield kind, instruction.text.replace(whole, ".".join(changed), 1)


def _possible(words: tuple[str, ...], instruction: Instruction) -> bool:
    """Test that the changed operation exists in PTX and takes these operands."""
    name, type_ = words[0], words[-1]
    changed = name != instruction.name
    if name in ("shl", "shr"):
        return type_ == instruction.type and not (name == "shl" and type_[0] != "b")
    if changed and instruction.name == "mul":
        return type_[0] == "f" or "wide" not in words and "lo" not in words
    if name in ("neg", "abs", "clz", "sqrt", "div", "rem"):
        return not (name == "abs" and type_.startswith("pred"))
    if name == "mma":
        return words[7] == words[8]
    if name == "setp" and type_ in ("b16", "b32", "b64"):
        return words[1] in ("eq", "ne")
    if name == "lg2" or name == "ex2":
        return "approx" in words
    if name in ("cvt",) and type_ == "bf16" and "f16x2" in words:
        return False
    if (
        len(words) > 2
        and name == "cvt"
        and words[-2] in ("bf16", "f16")
        and type_ in ("bf16", "f16")
    ):
        return False
    return True


def _other_floats(bits: int) -> Iterator[int]:
    """The number negated (1 for 0), doubled, and an eighth larger."""
    value = np.array([bits], np.uint32).view(np.float32)[0]
    yield bits ^ 0x8000_0000 if value != 0 else 0x3F80_0000
    for factor in (2.0, 1.125):
        other = np.array([float(value) * factor])
        if 0 < abs(other[0]) < 3e38:
            yield int(other.astype(np.float32).view(np.uint32)[0])
