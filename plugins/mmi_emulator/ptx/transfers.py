"""ld, st and cvta: transfers between registers and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmi_emulator.ptx.memory import LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW, Fault
from mmi_emulator.ptx.operands import (
    DTYPES,
    Action,
    Mask,
    address,
    destination,
    fixed_address,
    memory_of,
    parts,
    read,
    selected,
    unsupported,
    vector_length,
    writer,
)
from mmi_emulator.ptx.parser import WIDTHS, Instruction

if TYPE_CHECKING:
    from mmi_emulator.ptx.machine import Machine

# Suffixes of ld and st that only concern speed, or are handled here.
_HINTS = frozenset(
    {
        *("global", "shared", "shared::cta", "local", "param", "nc", "v2", "v4", "v8"),
        *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "weak", "volatile"),
        *("L1::evict_first", "L1::evict_last", "L1::evict_normal", "L1::evict_unchanged"),
        *("L1::no_allocate", "L2::64B", "L2::128B", "L2::256B"),
        *("L2::evict_first", "L2::evict_last", "L2::evict_normal"),
    }
)

_WINDOWS = {"global": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAMETER_WINDOW}


def load(machine: Machine, instruction: Instruction) -> Action:
    """ld: one number or a vector, from any memory."""
    memory, type_, names = _form(instruction, instruction.operands[0])
    source = instruction.operands[1]
    if len(instruction.operands) != 2:
        raise unsupported(instruction)
    width = WIDTHS[type_]
    where = address(machine, source)
    dtype = DTYPES[type_]
    targets = [_register(machine, name, type_) for name in names]
    if memory == "param" and (place := fixed_address(machine, source)) is not None:
        where_all = np.array([place], np.uint64)
        constants = _parameters(machine, where_all, width, len(names), machine.lane[:1])

        def fill(mask: Mask) -> None:
            for target, values in zip(targets, constants, strict=True):
                if target is not None:
                    np.copyto(target, values.view(dtype), where=mask)

        return fill

    def run(mask: Mask) -> None:
        lanes = selected(mask, machine.lane)
        if not lanes.size:
            return
        loaded = _read(machine, memory, where(lanes), width, len(names), lanes)
        for target, values in zip(targets, loaded, strict=True):
            if target is not None:
                target[lanes] = values.view(dtype)

    return run


def store(machine: Machine, instruction: Instruction) -> Action:
    """st: one number or a vector, to any memory but the parameters."""
    memory, type_, names = _form(instruction, instruction.operands[1])
    if memory == "param" or "nc" in instruction.operation or len(instruction.operands) != 2:
        raise unsupported(instruction)
    where = address(machine, instruction.operands[0])
    values = [read(machine, name, f"b{8 * WIDTHS[type_]}") for name in names]

    def run(mask: Mask) -> None:
        lanes = selected(mask, machine.lane)
        if not lanes.size:
            return
        places = where(lanes)
        columns = [np.broadcast_to(value, machine.lanes)[lanes] for value in values]
        for space, chosen, inside in _spaces(machine, memory, places, lanes):
            if space == "param":
                raise Fault("a store into the parameters", int(lanes[0]))
            _memory(machine, space).store(inside, [c[chosen] for c in columns], lanes[chosen])

    return run


def convert_address(machine: Machine, instruction: Instruction) -> Action:
    """cvta: between an address in one memory and a generic one."""
    *words, size = instruction.operation[1:]
    space = words[-1].partition("::")[0]
    if size not in ("u64", "u32") or space not in _WINDOWS or words[:-1] not in ([], ["to"]):
        raise unsupported(instruction)
    out, a = instruction.operands
    value, target = read(machine, a, size), destination(machine, out, size)
    window = _WINDOWS[space] if size == "u64" else 0
    move = target.dtype.type((-window if words[:-1] else window) & (2 ** (8 * WIDTHS[size]) - 1))
    return lambda mask: np.copyto(target, value + move, where=mask)


def _form(instruction: Instruction, operand: str) -> tuple[str, str, list[str]]:
    """Memory, type and registers of an ld or st."""
    unknown = [word for word in instruction.operation[1:-1] if word not in _HINTS]
    names = parts(operand)
    if unknown or len(names) != vector_length(instruction) or instruction.type not in WIDTHS:
        raise unsupported(instruction, ", ".join(unknown))
    return memory_of(instruction), instruction.type, names


def _register(machine: Machine, name: str, type_: str) -> np.ndarray | None:
    """The register that a loaded number goes to, as an array that takes it extended."""
    if name == "_":
        return None
    writer(machine, name, type_)  # says what is wrong with the register, if anything is
    register = machine.registers[name]
    if register.dtype.itemsize == WIDTHS[type_]:
        return register.view(DTYPES[type_])
    return register.view(f"{'i' if type_[0] == 's' else 'u'}{register.dtype.itemsize}")


def _memory(machine: Machine, space: str):  # type: ignore[no-untyped-def]
    return {"global": machine.memory, "shared": machine.shared, "local": machine.local}[space]


def _read(
    machine: Machine, memory: str, places: np.ndarray, width: int, count: int, lanes: np.ndarray
) -> list[np.ndarray]:
    """`count` numbers of `width` bytes at each place."""
    spaces = _spaces(machine, memory, places, lanes)
    found = []
    for space, chosen, inside in spaces:
        if space == "param":
            found.append((chosen, _parameters(machine, inside, width, count, lanes[chosen])))
        else:
            found.append(
                (chosen, _memory(machine, space).load(inside, width, count, lanes[chosen]))
            )
    if len(found) == 1:
        return found[0][1]
    whole = [np.empty(lanes.shape, f"u{width}") for _ in range(count)]
    for chosen, columns in found:
        for target, column in zip(whole, columns, strict=True):
            target[chosen] = column
    return whole


def _spaces(
    machine: Machine, memory: str, places: np.ndarray, lanes: np.ndarray
) -> list[tuple[str, np.ndarray | slice, np.ndarray]]:
    """The memories that contain the addresses, each with its lanes and the addresses inside it."""
    if memory != "generic":
        return [(memory, slice(None), places)]
    window = places & np.uint64(SHARED_WINDOW | LOCAL_WINDOW | PARAMETER_WINDOW)
    found = []
    for space, base in _WINDOWS.items():
        chosen = window == base
        if chosen.any():
            found.append((space, chosen, places[chosen] - np.uint64(base)))
    if sum(int(chosen.sum()) for _, chosen, _ in found) != len(lanes):
        raise Fault("a generic address outside every memory", int(lanes[0]))
    return found


def _parameters(
    machine: Machine, inside: np.ndarray, width: int, count: int, lanes: np.ndarray
) -> list[np.ndarray]:
    if (inside == inside[0]).all():  # as nearly always
        inside = inside[:1]
    place = inside.astype(np.int64)
    bad = (place < 0) | (place + width * count > len(machine.parameters))
    bad |= place % (width * count) != 0
    if bad.any():
        what = f"{width * count} bytes at {int(place[bad][0])} of the parameters"
        raise Fault(f"{what}: outside or misaligned", int(lanes[np.argmax(bad)]))
    raw = np.frombuffer(machine.parameters, np.uint8)
    spread = raw[place[:, None] + np.arange(width * count)]
    columns = np.ascontiguousarray(spread).view(f"u{width}")
    return [np.broadcast_to(columns[:, part], lanes.shape) for part in range(count)]
