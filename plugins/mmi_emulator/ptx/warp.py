"""Warp and block instructions: barriers, shuffles, votes, reductions, tensor-core products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmi_emulator.ptx import tensor_cores
from mmi_emulator.ptx.memory import Fault
from mmi_emulator.ptx.operands import WARP, Mask, predicate, read, unsupported, writer
from mmi_emulator.ptx.parser import Instruction

if TYPE_CHECKING:
    from mmi_emulator.ptx.machine import Machine

# First words of the instructions that wait for other threads.
SYNCHRONISING = ("bar", "barrier", "shfl", "vote", "redux", "mma")


def ready(machine: Machine, instruction: Instruction, mask: Mask) -> Mask:
    """The lanes at `instruction` for which all lanes that they wait for have arrived; `mask` itself
    where that is all of them. Raises `Fault` where a lane waits for a thread that has ended."""
    here = np.ones(machine.lanes, bool) if mask is True else mask
    if _is_block_barrier(instruction):
        blocks = here.reshape(-1, machine.width)
        come = blocks.sum(1)
        if len(instruction.operands) == 2:
            needed = np.asarray(read(machine, instruction.operands[1], "u32"))
            everyone = come == (needed if needed.ndim == 0 else needed[:: machine.width])
        else:
            ended = machine.left().reshape(-1, machine.width)
            threads = machine.block[0] * machine.block[1] * machine.block[2]
            gone = ended[:, :threads].any(1) & blocks.any(1)
            if gone.any():
                block = int(np.flatnonzero(gone)[0])
                raise Fault(
                    "a barrier after a thread of the block has ended", block * machine.width
                )
            everyone = come == threads
        complete = np.repeat(everyone, machine.width)
    elif mask is True and _members(machine, instruction).ndim == 0:
        complete = here
        _check_members(machine, instruction, mask)
    else:
        members = _check_members(machine, instruction, mask)
        bits = here.reshape(-1, WARP) @ (1 << np.arange(WARP, dtype=np.uint64))
        present = np.repeat(bits.astype(np.uint32), WARP)
        missing = members & ~present
        if (missing[here] != 0).any() and machine.left().any():
            ended = machine.left().reshape(-1, WARP) @ (1 << np.arange(WARP, dtype=np.uint64))
            vain = (missing & np.repeat(ended.astype(np.uint32), WARP) != 0) & here
            if vain.any():
                raise Fault("the mask names a thread that has ended", int(np.flatnonzero(vain)[0]))
        alone = (missing == 0) | ~here
        # Lanes that wait for one another proceed together.
        complete = np.repeat(alone.reshape(-1, WARP).all(1), WARP) | (missing == 0)
    done = complete & here
    return mask if done.sum() == here.sum() else done


def perform(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Run `instruction` for the lanes of `mask`, which are ready."""
    here = np.ones(machine.lanes, bool) if mask is True else mask
    name = instruction.name
    if _is_block_barrier(instruction):
        machine.shared.block_time[here.reshape(-1, machine.width).any(1)] += 1
    elif name in ("bar", "barrier"):
        _warp_barrier(machine, instruction, here)
    elif name == "shfl":
        _shuffle(machine, instruction, here)
    elif name == "vote":
        _vote(machine, instruction, here)
    elif name == "mma":
        tensor_cores.multiply(machine, instruction, here)
    elif name == "redux":
        _reduce(machine, instruction, here)
    else:
        raise unsupported(instruction)


def _is_block_barrier(instruction: Instruction) -> bool:
    words = instruction.operation
    if words in (("bar", "warp", "sync"),):
        return False
    if words[0] in ("bar", "barrier"):
        if words[1:] in (
            ("sync",),
            ("sync", "aligned"),
            ("cta", "sync"),
            ("cta", "sync", "aligned"),
        ):
            return True
        raise unsupported(instruction)
    return False


def _members(machine: Machine, instruction: Instruction) -> np.ndarray:
    """The member mask: the last operand; all threads for a tensor-core product."""
    if instruction.name == "mma":
        return np.asarray(np.uint32(0xFFFF_FFFF))
    return np.asarray(read(machine, instruction.operands[-1], "u32"))


def _check_members(machine: Machine, instruction: Instruction, mask: Mask) -> np.ndarray:
    """The member mask of every lane. Raises `Fault` where a mask leaves out its own lane."""
    members = np.broadcast_to(_members(machine, instruction), machine.lanes)
    own = (members >> (machine.lane % WARP).astype(np.uint32)) & np.uint32(1)
    outside = (own == 0) if mask is True else (own == 0) & mask
    if outside.any():
        raise Fault("the mask does not name its own thread", int(np.flatnonzero(outside)[0]))
    return members


def _warp_barrier(machine: Machine, instruction: Instruction, here: np.ndarray) -> None:
    """Order memory for the members. Race detection counts only barriers of whole warps."""
    whole = (here | machine.left()).reshape(-1, WARP).all(1) & here.reshape(-1, WARP).any(1)
    members = np.broadcast_to(_members(machine, instruction), machine.lanes).reshape(-1, WARP)
    named = np.where(here.reshape(-1, WARP), members, np.uint32(0xFFFF_FFFF))
    bits = here.reshape(-1, WARP) @ (1 << np.arange(WARP, dtype=np.uint64))
    whole &= (named & bits.astype(np.uint32)[:, None] == bits.astype(np.uint32)[:, None]).all(1)
    machine.shared.warp_time[whole] += 1


def _shuffle(machine: Machine, instruction: Instruction, here: np.ndarray) -> None:
    """shfl.sync.mode.b32 d[|p], a, b, c, members."""
    if len(instruction.operation) != 4 or instruction.operation[1] != "sync":
        raise unsupported(instruction)
    mode = instruction.operation[2]
    outs, a, b, c, _ = instruction.operands
    value = np.broadcast_to(read(machine, a, "b32"), machine.lanes)
    move = np.asarray(read(machine, b, "u32"), np.int64) & 31
    control = np.asarray(read(machine, c, "u32"), np.int64)
    lane = machine.lane % WARP
    clamp, segment = control & 31, control >> 8 & 31
    last, first = (lane & segment) | (clamp & ~segment), lane & segment
    if mode == "up":
        source = lane - move
        inside = source >= last
    else:
        targets = {"down": lane + move, "bfly": lane ^ move, "idx": first | (move & ~segment)}
        if mode not in targets:
            raise unsupported(instruction)
        source = targets[mode]
        inside = source <= last
    source = np.where(inside, source, lane)
    origin = machine.lane - lane + source
    idle = here & ~here[origin]
    if idle.any():
        raise Fault("a shuffle from a thread that does not take part", int(np.flatnonzero(idle)[0]))
    result = value[origin].copy()
    names = [name.strip() for name in outs.split("|")]
    writer(machine, names[0], "b32")(result, here)
    if len(names) == 2:
        writer(machine, names[1], "pred")(inside, here)


def _vote(machine: Machine, instruction: Instruction, here: np.ndarray) -> None:
    """vote.sync.{any,all,uni,ballot}."""
    words = instruction.operation
    if (
        len(words) != 4
        or words[1] != "sync"
        or words[2:]
        not in (
            ("any", "pred"),
            ("all", "pred"),
            ("uni", "pred"),
            ("ballot", "b32"),
        )
    ):
        raise unsupported(instruction)
    out, asked, _ = instruction.operands
    holds = np.broadcast_to(predicate(machine, asked)(), machine.lanes)
    weight = 1 << np.arange(WARP, dtype=np.uint64)
    present = (here.reshape(-1, WARP) @ weight).astype(np.uint32)
    ballot = ((here & holds).reshape(-1, WARP) @ weight).astype(np.uint32)
    members = np.broadcast_to(_members(machine, instruction), machine.lanes)
    voters, votes = np.repeat(present, WARP) & members, np.repeat(ballot, WARP) & members
    every, some = votes == voters, votes != 0
    result = {"any": some, "all": every, "uni": every | ~some, "ballot": votes}[words[2]]
    writer(machine, out, words[3])(result, here)


def _reduce(machine: Machine, instruction: Instruction, here: np.ndarray) -> None:
    """redux.sync.{add,min,max,and,or,xor} of whole warps."""
    words = instruction.operation
    functions = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    if len(words) != 4 or words[2] not in functions or words[3] not in ("u32", "s32", "b32"):
        raise unsupported(instruction)
    out, a, _ = instruction.operands
    rows = np.broadcast_to(read(machine, a, words[3]), machine.lanes).reshape(-1, WARP)
    if here.reshape(-1, WARP).any(1).sum() != here.reshape(-1, WARP).all(1).sum():
        raise unsupported(instruction, "by part of a warp")
    result = functions[words[2]].reduce(rows, axis=1, dtype=rows.dtype)
    writer(machine, out, words[3])(np.repeat(result, WARP), here)
