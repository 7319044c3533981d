"""Operand access: read and write a launch's registers, constants and addresses.

A register is one NumPy array [lanes], a number for each thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmi_emulator.ptx.parser import WIDTHS, Instruction, PtxError

if TYPE_CHECKING:
    from mmi_emulator.ptx.machine import Machine

# Active lanes: bool [lanes], or True for all.
Mask = np.ndarray | Literal[True]

# One instruction, bound to the registers of a launch.
Action = Callable[[Mask], None]

# Writes numbers, an array [lanes] or one for all lanes, into a register.
Writer = Callable[[Any, Mask], None]

WARP = 32

# NumPy type of each PTX type; packed types are twice as many numbers, the lower half first.
DTYPES = {
    **{f"{kind}{8 * width}": np.dtype(f"u{width}") for kind in "bu" for width in (1, 2, 4, 8)},
    **{f"s{8 * width}": np.dtype(f"i{width}") for width in (1, 2, 4, 8)},
    **{f"f{8 * width}": np.dtype(f"f{width}") for width in (2, 4, 8)},
    **{"bf16": np.dtype("u2"), "f16x2": np.dtype("f2"), "bf16x2": np.dtype("u2")},
    **{"f32x2": np.dtype("f4"), "pred": np.dtype("bool")},
}

PACKED = ("f16x2", "bf16x2", "f32x2")

_NUMBER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")
_ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


def unsupported(instruction: Instruction, why: str = "") -> PtxError:
    """Error for an instruction that the emulator does not support."""
    return PtxError(
        f"The PTX instruction `{instruction.text}` is not supported{why and ': ' + why}"
    )


def memory_of(instruction: Instruction) -> str:
    """Memory of an `ld` or `st`; `generic` where it names none."""
    for word in instruction.operation:
        if word.partition("::")[0] in ("global", "shared", "local", "param"):
            return word.partition("::")[0]
    return "generic"


def vector_length(instruction: Instruction) -> int:
    """Number of values that an `ld` or `st` moves."""
    return next((int(w[1:]) for w in instruction.operation if w in ("v2", "v4", "v8")), 1)


def access_bytes(instruction: Instruction) -> int:
    """Bytes that one thread moves with an `ld` or `st`."""
    return WIDTHS[instruction.type] * vector_length(instruction)


def parts(operand: str) -> list[str]:
    """The elements of `{a, b}`, or the operand itself."""
    return [part.strip() for part in operand.strip("{}").split(",")]


def number(text: str) -> int | None:
    """An integer constant of PTX, or None."""
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    digits = match[2]
    octal = len(digits) > 1 and digits.isdigit() and digits[0] == "0"
    value = int(digits, 8) if octal else int(digits, 0)
    return -value if match[1] else value


def read(machine: Machine, operand: str, type_: str) -> np.ndarray:
    """A live view of a register as `type_`, or the value of a constant, a special register or a
    variable's address."""
    dtype, packed = DTYPES[type_], type_ in PACKED
    if (register := machine.registers.get(operand)) is not None:
        if (register.dtype == bool) != (type_ == "pred"):
            raise PtxError(f"{operand} is read as {type_}")
        if type_ == "pred":
            return register
        wide = register.view(dtype)
        if packed and len(wide) == 2 * machine.lanes:
            return wide
        if len(wide) < machine.lanes:
            raise PtxError(f"{operand} is too narrow to be read as {type_}")
        return wide if packed else wide[:: len(wide) // machine.lanes]
    if type_ == "pred" and operand.startswith("!"):
        raise PtxError(f"{operand}: a negated predicate cannot be read here")
    if operand in machine.specials:
        special = machine.specials[operand]
        return special.astype(f"u{WIDTHS[type_]}").view(dtype)
    bits = _constant(machine, operand)
    raw = np.array([bits & ((1 << 8 * WIDTHS[type_]) - 1)], f"u{WIDTHS[type_]}")
    if type_ == "pred":
        return np.array(bool(bits))
    value = raw.view(dtype)
    return np.tile(value, machine.lanes) if packed else value[0]


def _constant(machine: Machine, operand: str) -> int:
    """The bits of a constant or the address of a variable."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", operand):
        return int(operand[2:], 16)
    if (value := number(operand)) is not None:
        return value
    kernel = machine.kernel
    for names in (kernel.shared, kernel.local, kernel.parameters):
        if operand in names:
            return names[operand]
    if operand == "WARP_SZ":
        return WARP
    raise PtxError(f"{kernel.name}: an operand is not understood", got=operand)


def predicate(machine: Machine, operand: str) -> Callable[[], np.ndarray]:
    """Reader of a predicate operand, which may be negated."""
    if operand.startswith("!"):
        register = read(machine, operand[1:].strip(), "pred")
        return lambda: ~register
    found = read(machine, operand, "pred")
    return lambda: found


def destination(machine: Machine, operand: str, type_: str) -> np.ndarray:
    """A live view of a register as `type_`, to compute into."""
    register = machine.registers.get(operand)
    if register is None or (register.dtype == bool) != (type_ == "pred"):
        raise PtxError(f"{machine.kernel.name}: {operand} cannot hold {type_}")
    if register.dtype.itemsize != WIDTHS[type_]:
        raise PtxError(f"{machine.kernel.name}: {operand} is wider or narrower than {type_}")
    return register if type_ == "pred" else register.view(DTYPES[type_])


def writer(machine: Machine, operand: str, type_: str) -> Writer:
    """Writer of `type_` into a register, which may be wider: sign or zero extended."""
    if operand == "_":
        return lambda value, mask: None
    register = machine.registers.get(operand)
    if register is None or (register.dtype == bool) != (type_ == "pred"):
        raise PtxError(f"{machine.kernel.name}: {operand} cannot hold {type_}")
    if register.dtype.itemsize < WIDTHS[type_]:
        raise PtxError(f"{machine.kernel.name}: {operand} is narrower than {type_}")
    if register.dtype.itemsize > WIDTHS[type_]:
        if type_[0] == "f":
            raise PtxError(f"{machine.kernel.name}: {operand} is wider than {type_}")
        kind = "i" if type_[0] == "s" else "u"
        view = register.view(f"{kind}{register.dtype.itemsize}")
    else:
        view = register if type_ == "pred" else register.view(DTYPES[type_])

    def write(value: Any, mask: Mask) -> None:
        np.copyto(view, value, where=pairs(mask) if len(view) != machine.lanes else mask)

    return write


def pairs(mask: Mask) -> Mask:
    """Mask for packed types: every lane twice."""
    return True if mask is True else np.repeat(mask, 2)


def selected(mask: Mask, lane: np.ndarray) -> np.ndarray:
    """Indices of the lanes in `mask`."""
    return lane if mask is True else np.flatnonzero(mask)


def fixed_address(machine: Machine, operand: str) -> int | None:
    """The address `[name + offset]` where it is the same for all threads, else None."""
    match = _ADDRESS.fullmatch(operand)
    offset = 0 if not match or match[2] is None else number(match[2])
    if not match or offset is None or match[1] in machine.registers:
        return None
    return (_constant(machine, match[1]) + offset) & (2**64 - 1)


def address(machine: Machine, operand: str) -> Callable[[np.ndarray], np.ndarray]:
    """Reader of an address operand `[base + offset]` for some lanes: uint64."""
    match = _ADDRESS.fullmatch(operand)
    offset = 0 if not match or match[2] is None else number(match[2])
    if not match or offset is None:
        raise PtxError(f"{machine.kernel.name}: an address is not understood", got=operand)
    fixed = fixed_address(machine, operand)
    if fixed is not None:
        return lambda lanes: np.full(lanes.shape, np.uint64(fixed))
    base = machine.registers[match[1]]
    if base.dtype.itemsize < 4:
        raise PtxError(f"{machine.kernel.name}: {match[1]} is too narrow for an address")
    wrapped = np.uint64(offset & (2**64 - 1))
    return lambda lanes: base[lanes].astype(np.uint64) + wrapped
