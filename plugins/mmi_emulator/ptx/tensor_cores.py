"""mma.sync.m16n8k16 with fp16 or bf16 factors and fp32 sums, with the rounding of tensor cores.

The instruction set does not define the inner rounding. Measurements on GPUs (Fasi et al. 2021,
"Numerical behavior of NVIDIA tensor cores"): products are exact; the products of a block and the
sum so far are truncated to the 24 bits of the largest, added, and truncated again, towards zero.
Blocks of 8 without extra bits, the least precise of the architectures that the kernels are built
for, are emulated here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmi_emulator.ptx import rounding
from mmi_emulator.ptx.operands import WARP, destination, parts, read, unsupported
from mmi_emulator.ptx.parser import Instruction

if TYPE_CHECKING:
    from mmi_emulator.ptx.machine import Machine

_FORM = ("mma", "sync", "aligned", "m16n8k16", "row", "col", "f32")
_BLOCK = 8
_EXPONENT = np.int64(0x7FF0_0000_0000_0000)
# Smallest exponent bits, 2^-959: below every fp32 sum, and keeps the scale below finite.
_LEAST = np.int64(1 << 52) * 64


def multiply(machine: Machine, instruction: Instruction, here: np.ndarray) -> None:
    """d = a b + c by whole warps: `mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32 d, a, b, c`."""
    words = instruction.operation
    kind = words[7] if len(words) == 10 else ""
    if words[:7] != _FORM or kind not in ("f16", "bf16") or words[7:] != (kind, kind, "f32"):
        raise unsupported(instruction)
    d, a, b, c = (parts(operand) for operand in instruction.operands)
    if [len(names) for names in (d, a, b, c)] != [4, 4, 2, 4]:
        raise unsupported(instruction)
    rows = here.reshape(-1, WARP)
    warps = np.flatnonzero(rows.all(1))

    # Lane 4 g + t holds two neighbouring numbers in every register (PTX ISA, fragments).
    left = _pairs(machine, a, kind, warps).reshape(
        -1, 2, 2, 8, 4, 2
    )  # [warps, inner half, row half, g, t, 2]
    left = left.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 16, 16)  # [warps, row, inner]
    right = _pairs(machine, b, kind, warps).reshape(-1, 2, 8, 4, 2)  # [warps, inner half, g, t, 2]
    right = right.transpose(0, 2, 1, 3, 4).reshape(-1, 8, 16)  # [warps, column, inner]
    sums = np.stack([_chosen(read(machine, name, "f32"), machine, warps) for name in c], 1)
    total = sums.reshape(-1, 2, 2, 8, 4).transpose(0, 1, 3, 4, 2).reshape(-1, 16, 8)

    for first in range(0, 16, _BLOCK):
        part = slice(first, first + _BLOCK)
        products = left[:, :, None, part] * right[:, None, :, part]  # [warps, row, column, inner]
        total = _truncated_sum(products, total)

    result = total.reshape(-1, 2, 8, 4, 2).transpose(0, 1, 4, 2, 3).reshape(-1, 4, WARP)
    for index, name in enumerate(d):
        target = destination(machine, name, "f32").reshape(-1, WARP)
        target[warps] = result[:, index]


def _chosen(register: np.ndarray, machine: Machine, warps: np.ndarray) -> np.ndarray:
    return np.broadcast_to(register, machine.lanes).reshape(-1, WARP)[warps]


def _pairs(machine: Machine, names: list[str], kind: str, warps: np.ndarray) -> np.ndarray:
    """The numbers in `names`, [warps, register, lane, 2], float64."""
    bits = np.stack([_chosen(read(machine, name, "b32"), machine, warps) for name in names], 1)
    halves = np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2)
    if kind == "bf16":
        return rounding.from_bfloat16(halves).astype(np.float64)
    return halves.view(np.float16).astype(np.float64)


def _truncated_sum(products: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """`sums` [warps, row, column] plus `products` [..., inner], truncated to the largest's bits."""
    start = sums.astype(np.float64)
    largest = (products.view(np.int64) & _EXPONENT).max(-1)
    largest = np.maximum(largest, start.view(np.int64) & _EXPONENT)
    if (largest == _EXPONENT).any():  # infinite or not a number: no bits to lose
        plain = (products.sum(-1) + start).astype(np.float32)
        ordinary = np.where(largest == _EXPONENT, 0, 1)
        safe = np.where(ordinary[..., None] == 1, products, 0.0)
        cut = _truncated_sum(safe, np.where(ordinary == 1, sums, np.float32(0)))
        return np.where(ordinary == 1, cut, plain)
    unit = (np.maximum(largest, _LEAST) - (np.int64(23) << np.int64(52))).view(np.float64)
    exact = np.trunc(products / unit[..., None]).sum(-1) + np.trunc(start / unit)
    exact *= unit
    rounded = exact.astype(np.float32)
    over = np.abs(rounded) > np.abs(exact)
    return np.where(over, np.nextafter(rounded, np.float32(0)), rounded)
