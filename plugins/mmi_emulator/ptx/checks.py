"""Checks of suffixes and operands, which every instruction builder shares: none is ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmi_emulator.ptx.operands import PACKED, Action, destination, pairs, read, unsupported
from mmi_emulator.ptx.parser import Instruction

if TYPE_CHECKING:
    from mmi_emulator.ptx.machine import Machine

# Types of integer arithmetic.
INTEGERS = frozenset({f"{kind}{bits}" for kind in "sub" for bits in (16, 32, 64)})


def allow(instruction: Instruction, *words: str, types: frozenset[str] | None = None) -> set[str]:
    """The suffixes between name and type, all of which must be among `words`."""
    suffixes = instruction.operation[1:-1]
    unknown = [word for word in suffixes if word not in words]
    if unknown or (types is not None and instruction.type not in types):
        raise unsupported(instruction, ", ".join(unknown) or instruction.type)
    return set(suffixes)


def operands_of(instruction: Instruction, count: int) -> tuple[str, ...]:
    if len(instruction.operands) != count:
        raise unsupported(instruction, f"{len(instruction.operands)} operands")
    return instruction.operands


def elementwise(
    machine: Machine, function: np.ufunc, out: str, sources: tuple[str, ...], type_: str
) -> Action:
    """Apply a NumPy function in place, from registers into a register."""
    target = destination(machine, out, type_)
    values = [read(machine, source, type_) for source in sources]
    if type_ in PACKED:
        return lambda mask: function(*values, out=target, where=pairs(mask))
    return lambda mask: function(*values, out=target, where=mask)
