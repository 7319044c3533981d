"""Execution of a kernel: all threads of many blocks side by side, one NumPy lane each.

Threads execute in groups that share a program counter. The group with the lowest counter runs
until it diverges or reaches another group, so that branches reconverge where the compiler laid the
code out for it (a legal order for independent thread scheduling). Barriers, shuffles and votes wait
until all threads that they name have reached the same instruction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmi_emulator.ptx import warp
from mmi_emulator.ptx.instructions import bind
from mmi_emulator.ptx.memory import Fault, GlobalMemory, LocalMemory, SharedMemory
from mmi_emulator.ptx.operands import WARP, Action, Mask, access_bytes, memory_of
from mmi_emulator.ptx.parser import WIDTHS, Instruction, Kernel, PtxError
from mmi_emulator.ptx.warp import SYNCHRONISING

Dim = tuple[int, int, int]

# Program counter of threads that have ended: above every instruction, so that min() ignores it.
_LEFT = np.iinfo(np.int32).max
# Content of a register before its first write, by bytes: recognisable, and rarely a valid address.
_GARBAGE = {1: 0xA5, 2: 0xA5A5, 4: 0xA5A5A5A5, 8: 0xA5A5A5A5A5A5A5A5}


@dataclass
class Counts:
    """Executions of each instruction, counted in threads."""

    executed: np.ndarray
    kernel: Kernel

    @property
    def lane_instructions(self) -> int:
        """Executed instructions, each counted once for every thread."""
        return int(self.executed.sum())

    def by_name(self) -> Counter[str]:
        """Lane-instructions by the instruction's first word."""
        found: Counter[str] = Counter()
        for times, instruction in zip(self.executed, self.kernel.instructions, strict=True):
            found[instruction.name] += int(times)
        return found

    def bytes_by_kind(self) -> Counter[tuple[str, str, int]]:
        """Bytes moved by (`ld` or `st`, memory, bytes of one access)."""
        found: Counter[tuple[str, str, int]] = Counter()
        for times, instruction in zip(self.executed, self.kernel.instructions, strict=True):
            if instruction.name in ("ld", "st"):
                width = access_bytes(instruction)
                found[instruction.name, memory_of(instruction), width] += int(times) * width
        return found


@dataclass
class _Block:
    """Basic block: instructions [start, end), and that at `end`, which may jump or wait."""

    start: int
    end: int
    actions: list[Action] = field(default_factory=list)


class _Registers(dict[str, np.ndarray]):
    """Registers, allocated at first use and filled with garbage until they are written."""

    def __init__(self, types: dict[str, str], lanes: int) -> None:
        self._types, self._lanes = types, lanes

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self._types else default

    def __contains__(self, name: object) -> bool:
        return name in self._types

    def __missing__(self, name: str) -> np.ndarray:
        width = WIDTHS[self._types[name]]
        if self._types[name] == "pred":
            register = np.zeros(self._lanes, bool)
        else:
            register = np.full(self._lanes, _GARBAGE[width], f"u{width}")
        self[name] = register
        return register


class Machine:
    """One launch of `kernel`.

    `parameters` are the argument bytes, `grid` and `block` as in CUDA; `blocks` (numbers counted
    with x fastest) are those to run, by default all. Raises `Fault` for what a GPU would not
    define, naming block, thread and instruction, and `PtxError` for an unsupported instruction.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        grid: Dim,
        block: Dim,
        parameters: bytes,
        dynamic_shared: int = 0,
        blocks: Sequence[int] | np.ndarray | None = None,
        most_instructions: int = 10_000_000,
    ) -> None:
        if len(parameters) != kernel.parameter_bytes:
            raise Fault(
                f"{kernel.name} takes {kernel.parameter_bytes} bytes of arguments; "
                f"it was given {len(parameters)}"
            )
        self.kernel, self.memory, self.grid, self.block = kernel, memory, grid, block
        self.parameters, self._most = parameters, most_instructions
        threads = block[0] * block[1] * block[2]
        if kernel.threads and threads > int(np.prod(kernel.threads)):
            raise Fault(f"{kernel.name} was compiled for {kernel.threads} threads, not {block}")
        self.width = -(-threads // WARP) * WARP
        numbers = np.arange(grid[0] * grid[1] * grid[2]) if blocks is None else np.asarray(blocks)
        self.lanes = len(numbers) * self.width
        thread = np.tile(np.arange(self.width), len(numbers))
        self.lane = np.arange(self.lanes)
        self._number = np.repeat(numbers, self.width)
        self.specials = self._special_registers(thread)
        self._counter = np.where(thread < threads, 0, _LEFT).astype(np.int32)
        self._waiting = np.zeros(self.lanes, bool)
        self.registers = _Registers(kernel.registers, self.lanes)
        self.shared = SharedMemory(
            len(numbers), kernel.shared_bytes + dynamic_shared, self.width, _shared_unit(kernel)
        )
        self.local = LocalMemory(self.lanes, kernel.local_bytes)
        self._executed = np.zeros(len(kernel.instructions), np.int64)
        self._leaders = _leaders(kernel)
        self._blocks: dict[int, _Block] = {}
        self._now = 0

    def run(self) -> Counts:
        """Run all threads to the end. Raises `Fault` and `PtxError`."""
        done = 0
        with np.errstate(all="ignore"):
            while (start := self._pick()) is not None:
                mask, stop = start[1:]
                position: int | None = start[0]
                lanes = self.lanes if mask is True else int(np.count_nonzero(mask))
                while position is not None:
                    block = self._blocks.get(position) or self._bind(position)
                    position = self._run_block(block, mask, lanes, stop)
                    done += block.end - block.start + 1
                    if done > self._most:
                        raise Fault(f"{self.kernel.name} does not end")
        return Counts(self._executed, self.kernel)

    def _pick(self) -> tuple[int, Mask, int] | None:
        """The group with the lowest program counter: the counter, its threads, and the next counter
        at which other threads are; None once all threads have ended."""
        ready = np.where(self._waiting, _LEFT, self._counter)
        position = int(ready.min())
        if position == _LEFT:
            if self._waiting.any():
                lane = int(np.flatnonzero(self._waiting)[0])
                self._now = int(self._counter[lane])
                raise self._located(Fault("threads wait for others that never come", lane))
            return None
        mask = self._counter == position
        # Those that wait at this instruction try again: a late thread may have arrived.
        self._waiting[mask] = False
        later = self._counter[self._counter > position]
        return position, True if mask.all() else mask, int(later.min()) if later.size else _LEFT

    def _run_block(self, block: _Block, mask: Mask, lanes: int, stop: int) -> int | None:
        """Run one basic block. Returns the next one if the group goes on as a whole, else None."""
        # Counted for all threads; a guarded instruction subtracts those that its guard excludes.
        self._executed[block.start : block.end] += lanes
        index = block.start
        try:
            for action in block.actions:
                action(mask)
                index += 1
            self._now = index
            following = self._last(index, mask, lanes)
        except Fault as fault:
            self._now = index
            raise self._located(fault) from None
        if following is None:
            return None
        # Stop where another group is (`stop`), so that the groups merge; and after a jump back
        # while threads wait, since these may now have the lowest counter.
        if following >= stop or (following <= index and self._waiting.any()):
            self._go(mask, following)
            return None
        return following

    def _last(self, index: int, mask: Mask, lanes: int) -> int | None:
        """Run the instruction that ends a block, at `index`, which may jump, wait or exit."""
        instructions = self.kernel.instructions
        if index >= len(instructions):
            self._go(mask, _LEFT)
            return None
        instruction = instructions[index]
        if instruction.name not in ("bra", "ret", "exit", *SYNCHRONISING):
            return index  # not a jump: the block ends here because something jumps to `index`
        taken = self._guarded(instruction, mask)
        if instruction.name in SYNCHRONISING:
            return self._synchronise(index, instruction, mask, taken, lanes)
        if taken is not mask:
            times = int(np.count_nonzero(taken))
            self._executed[index] += times
        else:
            times = lanes
            self._executed[index] += lanes
        target = self.kernel.labels[instruction.operands[0]] if instruction.name == "bra" else _LEFT
        if times == 0:
            return index + 1
        if times == lanes and target != _LEFT:
            return target
        # Divergence. All threads first move on, then those that jump: the order lets `taken` win.
        self._go(mask, index + 1)
        self._go(taken, target)
        return None

    def _synchronise(
        self, index: int, instruction: Instruction, mask: Mask, taken: Mask, lanes: int
    ) -> int | None:
        if taken is not mask:
            raise Fault(f"a predicate on {instruction.name} is not supported")
        if (self._waiting & (self._counter == index)).any():
            self._go(mask, index)  # threads wait here already: `_pick` takes all of them together
            return None
        ready = warp.ready(self, instruction, mask)
        if ready is not mask:
            # Late threads keep their counter, marked as waiting, so that `_pick` runs the others
            # first; those that are ready proceed now.
            late = mask & ~ready if mask is not True else ~ready
            self._go(mask, index)
            self._waiting |= late
            lanes = int(np.count_nonzero(ready))
            if lanes:
                self._executed[index] += lanes
                warp.perform(self, instruction, ready)
                self._go(ready, index + 1)
            return None
        self._executed[index] += lanes
        warp.perform(self, instruction, mask)
        return index + 1

    def _go(self, mask: Mask, position: int) -> None:
        self._counter[... if mask is True else mask] = position

    def _bind(self, start: int) -> _Block:
        """The basic block from `start`, its instructions bound to this launch's registers."""
        end = start
        instructions = self.kernel.instructions
        actions: list[Action] = []
        while end < len(instructions):
            instruction = instructions[end]
            if instruction.name in ("bra", "ret", "exit", *SYNCHRONISING):
                break
            # A block must not run past an instruction at which another group can join it.
            if end > start and end in self._leaders:
                break
            try:
                action = bind(self, instruction)
            except Fault as fault:
                self._now = end
                raise self._located(fault) from None
            if instruction.guard:
                action = self._with_guard(end, instruction, action)
            actions.append(action)
            end += 1
        block = _Block(start, end, actions)
        self._blocks[start] = block
        return block

    def _with_guard(self, index: int, instruction: Instruction, action: Action) -> Action:
        """`action` for only those threads whose guard holds."""

        def run(mask: Mask) -> None:
            taken = self._guarded(instruction, mask)
            missed = (self.lanes if mask is True else np.count_nonzero(mask)) - np.count_nonzero(
                taken
            )
            self._executed[index] -= missed
            action(taken)

        return run

    def _guarded(self, instruction: Instruction, mask: Mask) -> Mask:
        if instruction.guard is None:
            return mask
        guard = self.predicate(instruction.guard)
        guard = ~guard if instruction.negated else guard
        # A copy: the register is live, and the instruction may write to it.
        return guard.copy() if mask is True else guard & mask

    def predicate(self, name: str) -> np.ndarray:
        """A predicate register: the array itself, not a copy."""
        register = self.registers.get(name)
        if register is None or register.dtype != bool:
            raise PtxError(f"{self.kernel.name}: {name} is not a predicate register")
        return register

    def left(self) -> np.ndarray:
        """Lanes that have ended, and those that fill up the last warp of a block: bool [lanes]."""
        return self._counter == _LEFT

    def _located(self, fault: Fault) -> Fault:
        """`fault` with block, thread and instruction."""
        text = self.kernel.instructions[self._now].text
        where = f"{self.kernel.name}, instruction {self._now} `{text}`"
        if fault.lane is not None:
            block = int(self._number[fault.lane])
            where += f", block {block}, thread {fault.lane % self.width}"
        return Fault(f"{fault} ({where})")

    def _special_registers(self, thread: np.ndarray) -> dict[str, np.ndarray]:
        block, grid, number = self.block, self.grid, self._number
        sides = {
            "%tid": (
                thread % block[0],
                thread // block[0] % block[1],
                thread // (block[0] * block[1]),
            ),
            "%ctaid": (
                number % grid[0],
                number // grid[0] % grid[1],
                number // (grid[0] * grid[1]),
            ),
            "%ntid": block,
            "%nctaid": grid,
        }
        found = {
            f"{name}.{axis}": np.broadcast_to(np.asarray(value, np.uint32), (self.lanes,))
            for name, values in sides.items()
            for axis, value in zip("xyz", values, strict=True)
        }
        lane = (thread % WARP).astype(np.uint32)
        one = np.uint32(1)
        found["%laneid"], found["%warpid"] = lane, (thread // WARP).astype(np.uint32)
        found["%lanemask_eq"] = one << lane
        found["%lanemask_lt"] = (one << lane) - one
        found["%lanemask_le"] = found["%lanemask_lt"] | found["%lanemask_eq"]
        found["%lanemask_ge"] = ~found["%lanemask_lt"]
        found["%lanemask_gt"] = ~found["%lanemask_le"]
        return found


def _leaders(kernel: Kernel) -> frozenset[int]:
    """Instructions at which groups can join: targets of jumps, and instructions that wait."""
    waits = (
        index
        for index, instruction in enumerate(kernel.instructions)
        if instruction.name in SYNCHRONISING
    )
    return frozenset({*kernel.labels.values(), *waits})


def _shared_unit(kernel: Kernel) -> int:
    """Bytes of the smallest access to shared memory: the unit of race detection."""
    widths = [
        WIDTHS[instruction.type]
        for instruction in kernel.instructions
        if instruction.name in ("ld", "st", "atom", "red")
        and memory_of(instruction) in ("shared", "generic")
        and instruction.type in WIDTHS
    ]
    return min(widths, default=4)
