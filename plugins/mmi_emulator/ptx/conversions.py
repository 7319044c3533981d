"""cvt: conversion between number types, with the supported roundings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mmi_emulator.ptx import rounding
from mmi_emulator.ptx.operands import DTYPES, Action, Mask, destination, read, unsupported, writer
from mmi_emulator.ptx.parser import Instruction

if TYPE_CHECKING:
    from mmi_emulator.ptx.machine import Machine

_FLOATS = ("f16", "bf16", "f32", "f64")
_TO_INTEGER: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def convert(machine: Machine, instruction: Instruction) -> Action:
    """cvt[.rounding][.ftz][.sat].to.from d, a; and the packed form with two sources."""
    to, from_ = instruction.operation[-2:]
    words = set(instruction.operation[1:-2])
    if words - {*_TO_INTEGER, "rn", "rz", "rm", "rp", "ftz", "sat", "relu"}:
        raise unsupported(instruction)
    if to in ("f16x2", "bf16x2"):
        return _pack(machine, instruction, to, from_, words)
    if len(instruction.operands) != 2 or to not in DTYPES or from_ not in DTYPES:
        raise unsupported(instruction)
    out, a = instruction.operands
    value = read(machine, a, from_)
    compute = _function(instruction, to, from_, words)
    # Narrow results may go into wider registers; floats keep their size.
    write = writer(machine, out, "b16" if to in ("f16", "bf16") else to)
    if to == "f16":
        return lambda mask: write(compute(value).view(np.uint16), mask)
    return lambda mask: write(compute(value), mask)


def _function(
    instruction: Instruction, to: str, from_: str, words: set[str]
) -> Callable[[np.ndarray], np.ndarray]:
    """The conversion, on numbers in the registers' NumPy types."""
    if words & {"rz", "rm", "rp", "relu"}:
        raise unsupported(instruction)
    whole = words & set(_TO_INTEGER)
    dtype = DTYPES[to]
    if from_ in _FLOATS and to in _FLOATS:
        return _between_floats(instruction, to, from_, words)
    if from_ in _FLOATS:
        if len(whole) != 1 or "rn" in words:
            raise unsupported(instruction)
        return lambda value: _integers(_TO_INTEGER[whole.copy().pop()](_wide(value, from_)), dtype)
    if whole or to == "pred" or from_ == "pred":
        raise unsupported(instruction)
    if to in _FLOATS:
        if "rn" not in words or to == "bf16":
            raise unsupported(instruction)
        if to == "f16":  # float64 is exact up to 53 bits; larger numbers are infinite in fp16
            return lambda value: np.asarray(value, np.float64).astype(np.float16)
        return lambda value: np.asarray(value).astype(dtype)
    if "sat" in words:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        if DTYPES[from_].itemsize > 4:
            raise unsupported(instruction)
        return lambda value: np.clip(np.asarray(value, np.int64), low, high).astype(dtype)
    return lambda value: np.asarray(value).astype(dtype)


def _between_floats(
    instruction: Instruction, to: str, from_: str, words: set[str]
) -> Callable[[np.ndarray], np.ndarray]:
    whole = words & set(_TO_INTEGER)
    narrowing = _FLOATS.index(to) < _FLOATS.index(from_)
    if to == from_ == "bf16" or len(whole) > 1 or narrowing != ("rn" in words):
        raise unsupported(instruction)
    flush = "ftz" in words

    def run(value: np.ndarray) -> np.ndarray:
        if from_ == "bf16":
            value = rounding.from_bfloat16(value)
        if flush and value.dtype == np.float32:
            value = rounding.flushed(value)
        for mode in whole:
            value = _TO_INTEGER[mode](value)
        if "sat" in words:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(value.dtype)
        if to == "bf16":
            return rounding.bfloat16(np.asarray(value))
        return np.asarray(value).astype(DTYPES[to])

    return run


def _wide(value: np.ndarray, type_: str) -> np.ndarray:
    """Floats as float64."""
    return np.asarray(rounding.from_bfloat16(value) if type_ == "bf16" else value, np.float64)


def _integers(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Integral float64 numbers as integers: clamped; NaN is 0, or 2^63 in 64 bits."""
    limits = np.iinfo(dtype)
    if limits.bits <= 32:  # all limits are float64 numbers
        return np.clip(np.where(np.isnan(value), 0.0, value), limits.min, limits.max).astype(dtype)
    # float64 rounds the 64-bit limit up by one: clamp to the number just below.
    top = np.nextafter(2.0 ** (limits.bits - (dtype.kind == "i")), 0)
    inside = np.clip(value, float(limits.min), min(float(limits.max), top))
    result = np.nan_to_num(inside).astype(dtype)
    result = np.where(value > top, dtype.type(limits.max), result)
    return np.where(np.isnan(value), np.array(1 << 63, np.uint64).astype(dtype), result)


def _pack(
    machine: Machine, instruction: Instruction, to: str, from_: str, words: set[str]
) -> Action:
    """cvt.rn.f16x2.f32 d, a, b: a becomes the upper half."""
    if (
        from_ != "f32"
        or words - {"rn", "relu"}
        or "rn" not in words
        or len(instruction.operands) != 3
    ):
        raise unsupported(instruction)
    out, high, low = instruction.operands
    upper, lower = read(machine, high, "f32"), read(machine, low, "f32")
    halves = destination(machine, out, "b32").view(np.uint16).reshape(machine.lanes, 2)

    def narrow(value: np.ndarray) -> np.ndarray:
        value = np.asarray(value)
        if "relu" in words:
            value = np.where(np.isnan(value), value, np.maximum(value, np.float32(0)))
        if to == "bf16x2":
            return rounding.bfloat16(value)
        return value.astype(np.float16).view(np.uint16)

    def run(mask: Mask) -> None:
        first, second = narrow(lower), narrow(upper)
        np.copyto(halves[:, 0], first, where=mask)
        np.copyto(halves[:, 1], second, where=mask)

    return run
