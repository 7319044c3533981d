"""Bit instructions: logic, shifts, fields, permutations, counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmi_emulator.ptx.checks import INTEGERS, allow, elementwise, operands_of
from mmi_emulator.ptx.operands import DTYPES, Action, Mask, destination, read, unsupported
from mmi_emulator.ptx.parser import WIDTHS, Instruction

if TYPE_CHECKING:
    from mmi_emulator.ptx.machine import Machine


def bitwise(machine: Machine, instruction: Instruction) -> Action:
    type_ = instruction.type
    allow(instruction, types=frozenset({"pred", "b16", "b32", "b64"}))
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    out, a, b = operands_of(instruction, 3)
    if type_ == "pred" and (a.startswith("!") or b.startswith("!")):
        raise unsupported(instruction)
    return elementwise(machine, function[instruction.name], out, (a, b), type_)


def shift(machine: Machine, instruction: Instruction) -> Action:
    """shl, shr: a shift by the width or more gives zeros, or sign bits."""
    type_, name = instruction.type, instruction.name
    allow(instruction, types=INTEGERS)
    out, a, b = operands_of(instruction, 3)
    value, count = read(machine, a, type_), read(machine, b, "u32")
    target = destination(machine, out, type_)
    bits, dtype = 8 * WIDTHS[type_], DTYPES[type_]

    def run(mask: Mask) -> None:
        small = np.minimum(count, np.uint32(bits - 1)).astype(dtype)
        shifted = np.left_shift(value, small) if name == "shl" else np.right_shift(value, small)
        if name == "shl" or dtype.kind == "u":
            shifted = np.where(count >= bits, np.zeros((), dtype), shifted)
        np.copyto(target, shifted, where=mask)

    return run


def funnel(machine: Machine, instruction: Instruction) -> Action:
    """shf.{l,r}.{wrap,clamp}.b32: a window of 32 bits out of 64."""
    words = allow(instruction, "l", "r", "wrap", "clamp", types=frozenset({"b32"}))
    out, low, high, count = operands_of(instruction, 4)
    a, b, c = (read(machine, operand, "u32") for operand in (low, high, count))
    target = destination(machine, out, "b32")

    def run(mask: Mask) -> None:
        wide = np.asarray(b, np.uint64) << np.uint64(32) | np.asarray(a, np.uint64)
        by = np.asarray(c & np.uint32(31) if "wrap" in words else np.minimum(c, np.uint32(32)))
        by = by.astype(np.uint64)
        moved = (wide << by) >> np.uint64(32) if "l" in words else wide >> by
        np.copyto(target, moved.astype(np.uint32), where=mask)

    return run


def bit_field(machine: Machine, instruction: Instruction) -> Action:
    """bfe: `length` bits from `position`, zero or sign extended; bfi: put them in."""
    type_ = instruction.type
    allow(instruction, types=frozenset({"u32", "s32", "u64", "s64", "b32", "b64"}))
    width = 8 * WIDTHS[type_]
    unsigned = np.dtype(f"u{WIDTHS[type_]}")
    insert = instruction.name == "bfi"
    operands = operands_of(instruction, 5 if insert else 4)
    sources = [read(machine, operand, f"b{width}") for operand in operands[1:-2]]
    position, length = (read(machine, operand, "u32") for operand in operands[-2:])
    target = destination(machine, operands[0], f"b{width}")
    one, zero = unsigned.type(1), unsigned.type(0)

    def run(mask: Mask) -> None:
        start = np.asarray(position & np.uint32(255))
        count = np.minimum(np.asarray(length & np.uint32(255)), width)
        shift = np.minimum(start, width - 1).astype(unsigned)
        field_ = np.where(
            count >= width, ~zero, (one << np.minimum(count, width - 1).astype(unsigned)) - one
        ).astype(unsigned)
        inside = np.where(start < width, field_ << shift, zero)
        if insert:
            value = (sources[1] & ~inside) | ((sources[0] << shift) & inside)
        else:
            value = np.where(start < width, (sources[0] >> shift) & field_, zero)
            if type_[0] == "s":
                last = np.minimum(start + count - np.uint32(1), width - 1).astype(unsigned)
                sign = (sources[0] >> last) & one
                left = width - start.astype(np.int64)
                kept = np.where(count < left, field_, np.where(left > 0, ~zero >> shift, zero))
                value = np.where((sign == 1) & (count > 0), value | ~kept, value)
        np.copyto(target, value, where=mask)

    return run


def permute(machine: Machine, instruction: Instruction) -> Action:
    """prmt.b32: four bytes chosen from eight, or their sign bits replicated."""
    allow(instruction, types=frozenset({"b32"}))
    out, *sources = operands_of(instruction, 4)
    a, b, pick = (read(machine, source, "u32") for source in sources)
    target = destination(machine, out, "b32")
    both = np.empty((machine.lanes, 2), np.uint32)
    shifts = np.arange(0, 16, 4, dtype=np.uint32)

    def run(mask: Mask) -> None:
        both[:, 0], both[:, 1] = a, b
        choices = (np.broadcast_to(pick, machine.lanes)[:, None] >> shifts) & np.uint32(15)
        chosen = np.take_along_axis(
            both.view(np.uint8), (choices & np.uint32(7)).astype(np.intp), 1
        )
        if (choices >= 8).any():
            sign = np.where(chosen >= 128, np.uint8(255), np.uint8(0))
            chosen = np.where(choices >= 8, sign, chosen)
        np.copyto(target, chosen.view(np.uint32)[:, 0], where=mask)

    return run


def logic(machine: Machine, instruction: Instruction) -> Action:
    """lop3.b32: any function of three bits, by its table."""
    allow(instruction, types=frozenset({"b32"}))
    out, *sources, table_text = operands_of(instruction, 5)
    a, b, c = (read(machine, source, "u32") for source in sources)
    table = int(table_text, 0)
    target = destination(machine, out, "b32")

    def run(mask: Mask) -> None:
        result = np.zeros(1, np.uint32)
        for row in range(8):
            if table >> row & 1:
                bits = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
                result = result | bits
        np.copyto(target, result, where=mask)

    return run


def count_bits(machine: Machine, instruction: Instruction) -> Action:
    """popc, clz, brev, bfind."""
    type_, name = instruction.type, instruction.name
    words = allow(instruction, "shiftamt")
    width = 8 * WIDTHS[type_]
    out, a = operands_of(instruction, 2)
    value = read(machine, a, f"u{width}")
    target = destination(machine, out, f"b{width}" if name == "brev" else "u32")
    if type_[0] == "s" or (name == "bfind") != (type_[0] == "u"):
        raise unsupported(instruction)

    def run(mask: Mask) -> None:
        bits = (
            np.asarray(value)[..., None] >> np.arange(width, dtype=value.dtype)
        ) & value.dtype.type(1)
        if name == "popc":
            result: Any = bits.sum(-1)
        elif name == "brev":
            result = (bits << np.arange(width - 1, -1, -1, dtype=value.dtype)).sum(
                -1, dtype=value.dtype
            )
        else:
            highest = np.where(bits.any(-1), width - 1 - np.argmax(bits[..., ::-1], -1), -1)
            result = width - 1 - highest if name == "clz" else highest
            if words:
                result = np.where(highest < 0, -1, width - 1 - highest)
        np.copyto(target, np.asarray(result).astype(target.dtype), where=mask)

    return run
