"""Semantics of PTX instructions, bound to the registers of a launch: arithmetic, selection, moves.

`bind` dispatches on the instruction's first word. An unknown instruction or suffix is an error,
never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mmi_emulator.ptx import bits, conversions, rounding, transfers
from mmi_emulator.ptx.checks import INTEGERS, allow, elementwise, operands_of
from mmi_emulator.ptx.memory import Fault
from mmi_emulator.ptx.operands import (
    DTYPES,
    PACKED,
    Action,
    Mask,
    destination,
    pairs,
    parts,
    predicate,
    read,
    unsupported,
    writer,
)
from mmi_emulator.ptx.parser import WIDTHS, Instruction, PtxError

if TYPE_CHECKING:
    from mmi_emulator.ptx.machine import Machine

_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
_FLOATS = frozenset({"f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64"})


def bind(machine: Machine, instruction: Instruction) -> Action:
    """The instruction as a function of the mask of lanes that run it."""
    try:
        build = _BUILDERS[instruction.name]
    except KeyError:
        raise unsupported(instruction) from None
    try:
        return build(machine, instruction)
    except Fault:
        raise
    except PtxError as error:
        if instruction.text in str(error):
            raise
        raise PtxError(f"`{instruction.text}`: {error}") from None
    except (KeyError, IndexError, ValueError) as error:
        raise unsupported(instruction, str(error)) from None


def _floats(machine: Machine, operand: str, type_: str) -> Callable[[], np.ndarray]:
    """Reader of a float operand: float32 for f32, else float64; both are exact."""
    value = read(machine, operand, type_)
    if type_.startswith("bf16"):
        return lambda: rounding.from_bfloat16(value).astype(np.float64)
    if type_.startswith("f16"):
        return lambda: value.astype(np.float64)
    return lambda: value


def _float_result(
    machine: Machine, operand: str, type_: str, words: set[str]
) -> Callable[[np.ndarray, Mask], None]:
    """Writer that rounds to `type_` and applies `.ftz`, `.sat` and `.relu`."""
    target = destination(machine, operand, type_)
    twice = type_ in PACKED

    def write(value: np.ndarray, mask: Mask) -> None:
        if "sat" in words:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(value.dtype)
        if "relu" in words:
            value = np.where(np.isnan(value), value, np.maximum(value, 0)).astype(value.dtype)
        if type_.startswith("bf16"):
            value = rounding.bfloat16(value)
        elif type_.startswith("f16"):
            value = value.astype(np.float16)
            if "ftz" in words:
                value = np.where(np.abs(value) < np.float16(2.0**-14), np.float16(0) * value, value)
        elif "ftz" in words:
            value = rounding.flushed(value)
        np.copyto(target, value, where=pairs(mask) if twice else mask)

    return write


_ARITHMETIC: dict[str, np.ufunc] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
}


def _add_sub_mul(machine: Machine, instruction: Instruction) -> Action:
    type_, function = instruction.type, _ARITHMETIC[instruction.name]
    if type_ in _FLOATS:
        words = allow(instruction, "rn", "ftz", "sat")
        out, a, b = operands_of(instruction, 3)
        if type_ in ("f32", "f32x2", "f64") and not words - {"rn"}:
            return elementwise(machine, function, out, (a, b), type_)
        first, second = _floats(machine, a, type_), _floats(machine, b, type_)
        write = _float_result(machine, out, type_, words)
        if "ftz" in words and type_ == "f32":
            flushed = rounding.flushed
            return lambda mask: write(function(flushed(first()), flushed(second())), mask)
        return lambda mask: write(function(first(), second()), mask)
    if instruction.name == "mul":
        return _multiply(machine, instruction, add=False)
    allow(instruction, types=INTEGERS)
    out, a, b = operands_of(instruction, 3)
    return elementwise(machine, function, out, (a, b), type_)


def _multiply(machine: Machine, instruction: Instruction, add: bool) -> Action:
    """mul and mad of integers: `.lo`, `.hi`, `.wide`."""
    type_ = instruction.type
    words = allow(instruction, "lo", "hi", "wide", types=INTEGERS - {"b16", "b32", "b64"})
    if len(words) != 1:
        raise unsupported(instruction)
    (form,) = words
    result = _WIDER[type_] if form == "wide" else type_
    operands = operands_of(instruction, 4 if add else 3)
    a, b = (read(machine, operand, type_) for operand in operands[1:3])
    c = read(machine, operands[3], result) if add else None
    target = destination(machine, operands[0], result)

    def run(mask: Mask) -> None:
        if form == "lo":
            value = np.multiply(a, b)
        elif form == "wide":
            value = np.multiply(a, b, dtype=DTYPES[result])
        else:
            value = _high(a, b, type_)
        np.copyto(target, value if c is None else value + c, where=mask)

    return run


def _high(a: np.ndarray, b: np.ndarray, type_: str) -> np.ndarray:
    """The upper half of a product of integers."""
    dtype = DTYPES[type_]
    if dtype.itemsize < 8:
        wide = np.multiply(a, b, dtype=DTYPES[_WIDER[type_]])
        return (wide >> wide.dtype.type(8 * dtype.itemsize)).astype(dtype)
    x, y = np.asarray(a).view(np.uint64), np.asarray(b).view(np.uint64)
    low, half = np.uint64(0xFFFF_FFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    high = x1 * y1 + (middle >> half) + ((middle & low) + x0 * y1 >> half)
    if dtype.kind == "i":  # from the unsigned product
        high = high - np.where(np.asarray(a) < 0, y, np.uint64(0))
        high = high - np.where(np.asarray(b) < 0, x, np.uint64(0))
    return high.view(dtype)


def _multiply_add(machine: Machine, instruction: Instruction) -> Action:
    type_ = instruction.type
    if type_ not in _FLOATS:
        return _multiply(machine, instruction, add=True)
    words = allow(instruction, "rn", "ftz", "sat", "relu", types=_FLOATS - {"f64"})
    operands = operands_of(instruction, 4)
    a, b, c = (_floats(machine, operand, type_) for operand in operands[1:])
    if type_ in ("f32", "f32x2") and not words - {"rn"}:
        target, twice = destination(machine, operands[0], type_), type_ in PACKED
        return lambda mask: np.copyto(
            target, rounding.fma32(a(), b(), c()), where=pairs(mask) if twice else mask
        )
    write = _float_result(machine, operands[0], type_, words)
    if type_ in ("f32", "f32x2"):
        flush = rounding.flushed if "ftz" in words else np.asarray
        return lambda mask: write(rounding.fma32(flush(a()), flush(b()), flush(c())), mask)
    return lambda mask: write(rounding.sum_to_odd(a() * b(), c()), mask)


def _min_max(machine: Machine, instruction: Instruction) -> Action:
    type_ = instruction.type
    if type_ not in _FLOATS:
        allow(instruction, types=INTEGERS)
        out, *sources = operands_of(instruction, 3)
        return elementwise(machine, _ARITHMETIC[instruction.name], out, tuple(sources), type_)
    words = allow(instruction, "NaN", "ftz", types=_FLOATS)
    out, *sources = instruction.operands
    if len(sources) not in (2, 3):
        raise unsupported(instruction)
    names = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[instruction.name]
    function = names["NaN" in words]
    if type_ in ("f32", "f64") and not words and len(sources) == 2:
        return elementwise(machine, function, out, tuple(sources), type_)
    values = [_floats(machine, source, type_) for source in sources]
    write = _float_result(machine, out, type_, words)

    def run(mask: Mask) -> None:
        result = function(values[0](), values[1]())
        write(result if len(values) == 2 else function(result, values[2]()), mask)

    return run


def _divide(machine: Machine, instruction: Instruction) -> Action:
    """div and rem: integers towards zero; floats rounded to nearest, or `.approx`."""
    type_ = instruction.type
    out, a, b = operands_of(instruction, 3)
    x, y = read(machine, a, type_), read(machine, b, type_)
    if type_ in ("f32", "f64"):
        words = allow(instruction, "rn", "approx", "full", "ftz")
        if instruction.name == "rem":
            raise unsupported(instruction)
        write = _float_result(machine, out, type_, words)
        if words & {"approx", "full"}:
            return lambda mask: write(rounding.approximate(np.divide(x, y, dtype="f8"), 2), mask)
        return lambda mask: write(np.divide(x, y), mask)
    allow(instruction, types=frozenset({"s16", "u16", "s32", "u32", "s64", "u64"}))
    target, remainder = destination(machine, out, type_), instruction.name == "rem"

    def run(mask: Mask) -> None:
        zero = np.broadcast_to(np.asarray(y) == 0, target.shape)
        if (zero & mask).any():
            raise Fault("division by zero", int(np.flatnonzero(zero & mask)[0]))
        safe = np.where(zero, np.ones((), y.dtype), y)
        rest = np.fmod(x, safe)
        if remainder:
            np.copyto(target, rest, where=mask)
        else:
            np.copyto(target, (x - rest) // safe, where=mask)

    return run


def _one_operand(machine: Machine, instruction: Instruction) -> Action:
    """not, neg, abs."""
    type_, name = instruction.type, instruction.name
    out, a = operands_of(instruction, 2)
    if name == "not":
        allow(instruction, types=frozenset({"pred", "b16", "b32", "b64"}))
        return elementwise(machine, np.invert, out, (a,), type_)
    words = allow(instruction, "ftz")
    if type_.startswith("bf16"):
        sign, value = np.uint16(0x8000), read(machine, a, type_)
        write = writer(machine, out, type_)
        if name == "neg":
            return lambda mask: write(value ^ sign, mask)
        return lambda mask: write(value & ~sign, mask)
    function = {"neg": np.negative, "abs": np.absolute}[name]
    if words:
        source, result = read(machine, a, type_), _float_result(machine, out, type_, words)
        return lambda mask: result(function(source), mask)
    return elementwise(machine, function, out, (a,), type_)


# Exact function, and the error that the instruction set allows, in units in the last place.
_APPROXIMATE: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "rcp": (lambda x: 1.0 / x, 1),
    "sqrt": (np.sqrt, 1),
    "rsqrt": (lambda x: 1.0 / np.sqrt(x), 2),
    "ex2": (np.exp2, 2),
    "lg2": (np.log2, 2),
}


def _special_function(machine: Machine, instruction: Instruction) -> Action:
    """rcp, sqrt, rsqrt, ex2, lg2 of f32: rounded, or with the error that `.approx` allows."""
    words = allow(instruction, "approx", "rn", "ftz", types=frozenset({"f32"}))
    function, ulps = _APPROXIMATE[instruction.name]
    out, a = operands_of(instruction, 2)
    if ("rn" in words) == ("approx" in words) or (
        "rn" in words and instruction.name in ("ex2", "lg2")
    ):
        raise unsupported(instruction)
    value, write = read(machine, a, "f32"), _float_result(machine, out, "f32", words)

    def run(mask: Mask) -> None:
        x = rounding.flushed(value) if "ftz" in words else value
        exact = function(np.asarray(x, np.float64))
        rounded = exact.astype(np.float32) if "rn" in words else rounding.approximate(exact, ulps)
        write(rounded, mask)

    return run


_COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _comparison(
    machine: Machine, instruction: Instruction, type_: str, a: str, b: str
) -> Callable[[], np.ndarray]:
    """Comparison of two operands by the instruction's second word."""
    word = instruction.operation[1]
    x, y = _floats(machine, a, type_), _floats(machine, b, type_)
    if type_ not in _FLOATS:
        if word not in _COMPARISONS or (word in ("lo", "ls", "hi", "hs") and type_[0] != "u"):
            raise unsupported(instruction, word)
        if type_[0] == "b" and word not in ("eq", "ne"):
            raise unsupported(instruction, word)
        return lambda: _COMPARISONS[word](x(), y())
    if word in ("num", "nan"):
        return lambda: (np.isnan(x()) | np.isnan(y())) ^ (word == "num")
    unordered = word.endswith("u")
    compare = _COMPARISONS.get(word[:-1] if unordered else word)
    if compare is None or word in ("lo", "ls", "hi", "hs"):
        raise unsupported(instruction, word)

    def run() -> np.ndarray:
        first, second = x(), y()
        result = compare(first, second)
        unknown = np.isnan(first) | np.isnan(second)
        return result | unknown if unordered else result & ~unknown

    return run


def _set_predicate(machine: Machine, instruction: Instruction) -> Action:
    """setp.comparison[.and|or|xor].type p[|q], a, b[, c]."""
    type_, words = instruction.type, set(instruction.operation[2:-1])
    joins: dict[str, Any] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    join = [word for word in instruction.operation[2:-1] if word in joins]
    if type_ in PACKED or len(join) > 1 or words - {*joins, "ftz"}:
        raise unsupported(instruction)
    outs, a, b, *rest = operands_of(instruction, 4 if join else 3)
    compare = _comparison(machine, instruction, type_, a, b)
    other = predicate(machine, rest[0]) if rest else None
    names = [name.strip() for name in outs.split("|")]
    writers = [writer(machine, name, "pred") for name in names]

    def run(mask: Mask) -> None:
        result = compare()
        values = [result, ~result][: len(writers)]
        for write, value in zip(writers, values, strict=True):
            write(joins[join[0]](value, other()) if other else value, mask)

    return run


def _set(machine: Machine, instruction: Instruction) -> Action:
    """set.comparison.result.type d, a, b: all bits, or 1.0, where it holds."""
    if len(instruction.operation) != 4 or instruction.operation[2] not in ("u32", "s32", "f32"):
        raise unsupported(instruction)
    result, type_ = instruction.operation[2:]
    out, a, b = operands_of(instruction, 3)
    compare, target = (
        _comparison(machine, instruction, type_, a, b),
        destination(machine, out, result),
    )
    yes = target.dtype.type(1.0 if result == "f32" else -1 if result == "s32" else 0xFFFF_FFFF)
    return lambda mask: np.copyto(
        target, np.where(compare(), yes, target.dtype.type(0)), where=mask
    )


def _select(machine: Machine, instruction: Instruction) -> Action:
    type_ = instruction.type
    allow(instruction)
    out, a, b, which = operands_of(instruction, 4)
    x, y = read(machine, a, type_), read(machine, b, type_)
    choose, target = predicate(machine, which), destination(machine, out, type_)
    return lambda mask: np.copyto(target, np.where(choose(), x, y), where=mask)


def _move(machine: Machine, instruction: Instruction) -> Action:
    """mov: of a value, or between a register and a tuple of narrower ones."""
    type_ = instruction.type
    allow(instruction)
    out, source = operands_of(instruction, 2)
    if out.startswith("{"):
        names = parts(out)
        part = f"b{8 * WIDTHS[type_] // len(names)}"
        whole = np.ascontiguousarray(np.broadcast_to(read(machine, source, type_), machine.lanes))
        shared = np.shares_memory(whole, machine.registers.get(source, np.zeros(1)))
        if not shared and source in machine.registers:
            raise unsupported(instruction)
        columns = whole.view(DTYPES[part]).reshape(machine.lanes, len(names))
        writers = [writer(machine, name, part) for name in names]

        def unpack(mask: Mask) -> None:
            for column, write in enumerate(writers):
                write(columns[:, column], mask)

        return unpack
    if source.startswith("{"):
        names = parts(source)
        part = f"b{8 * WIDTHS[type_] // len(names)}"
        values = [read(machine, name, part) for name in names]
        into = (
            destination(machine, out, type_).view(DTYPES[part]).reshape(machine.lanes, len(names))
        )

        def pack(mask: Mask) -> None:
            for column, value in enumerate(values):
                np.copyto(into[:, column], value, where=mask)

        return pack
    target, value = destination(machine, out, type_), read(machine, source, type_)
    return lambda mask: np.copyto(target, value, where=mask)


def _nothing(machine: Machine, instruction: Instruction) -> Action:
    """Fences and hints do nothing: memory is sequentially consistent here, and races are faults."""
    return lambda mask: None


_BUILDERS: dict[str, Callable[[Machine, Instruction], Action]] = {
    **dict.fromkeys(("add", "sub", "mul"), _add_sub_mul),
    **dict.fromkeys(("mad", "fma"), _multiply_add),
    **dict.fromkeys(("min", "max"), _min_max),
    **dict.fromkeys(("div", "rem"), _divide),
    **dict.fromkeys(("and", "or", "xor"), bits.bitwise),
    **dict.fromkeys(("not", "neg", "abs"), _one_operand),
    **dict.fromkeys(("shl", "shr"), bits.shift),
    **dict.fromkeys(("bfe", "bfi"), bits.bit_field),
    **dict.fromkeys(("popc", "clz", "brev", "bfind"), bits.count_bits),
    **dict.fromkeys(_APPROXIMATE, _special_function),
    **dict.fromkeys(("membar", "fence", "griddepcontrol", "nanosleep"), _nothing),
    "shf": bits.funnel,
    "prmt": bits.permute,
    "lop3": bits.logic,
    "setp": _set_predicate,
    "set": _set,
    "selp": _select,
    "mov": _move,
    "cvt": conversions.convert,
    "cvta": transfers.convert_address,
    "ld": transfers.load,
    "st": transfers.store,
}
