"""What runs a graph: one interface, whatever executes it.

An engine takes named buffers, checks them against the contract (`mmi_deploy.spec.graphs`) and runs.
What a `Graph` declares in place shares its buffer with the input; all other outputs go where the
caller says, or into new buffers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from math import prod
from threading import Lock

import numpy as np

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.buffers import Array, Buffer, Memory
from mmi_deploy.spec.graphs import Graph, Tensor

Buffers = Mapping[str, Buffer | Array]

MOST_SHAPES = 256
"""Combinations of shapes that an engine remembers; then it forgets them: documents never stop
differing, and one of the largest LLM takes 20 kB."""


class Engine(ABC):
    """One graph, ready to run. Several threads may share it: they take turns."""

    def __init__(self, graph: Graph, memory: Memory) -> None:
        self.graph = graph
        self.memory = memory
        # Launches from a CUDA graph, None where there are none, and why a run was not recorded.
        self.launches: int | None = None
        self.refusal = ""
        self._turn: AbstractContextManager[object] = Lock()
        self._known_shapes: dict[tuple[object, ...], dict[str, int]] = {}

    def run(
        self, inputs: Buffers, outputs: Mapping[str, Buffer] | None = None
    ) -> dict[str, Buffer]:
        """Run once and return all outputs that are not in place; on a device it is only begun.

        `inputs`: every input of the graph; arrays are brought to the engine's memory (on the host
        they are used as they are). `outputs`: buffers to write to. Raises `EngineError` for what
        does not fit the contract: names, types, shapes, ranges, indices out of range.
        """
        with self._turn:
            held = {
                name: value if isinstance(value, Buffer) else self._hold(name, value)
                for name, value in inputs.items()
            }
            sizes = self._sizes(held)
            check_indices(self.graph, inputs, sizes)
            written = self._outputs(sizes, outputs or {})
            shared = {new: held[old] for new, old in self.graph.in_place.items()}
            self._execute(held, {**written, **shared})
        return written

    def _hold(self, name: str, array: Array) -> Buffer:
        """The contents of `array` where the engine reads its input `name`."""
        return self.memory.hold(array)

    @abstractmethod
    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run on checked buffers; an output in place has its input's buffer."""

    def close(self) -> None:
        """Give back what the engine holds; it is not run again."""
        return

    def _sizes(self, held: Mapping[str, Buffer]) -> dict[str, int]:
        """Sizes of the dynamic dimensions; checked once for each combination of shapes."""
        key = tuple((name, buffer.shape, buffer.dtype) for name, buffer in held.items())
        if key not in self._known_shapes:
            if len(self._known_shapes) == MOST_SHAPES:
                self._known_shapes.clear()
            self._known_shapes[key] = dynamic_sizes(self.graph, held)
        return self._known_shapes[key]

    def _outputs(self, sizes: Mapping[str, int], given: Mapping[str, Buffer]) -> dict[str, Buffer]:
        written = {}
        for tensor in self.graph.outputs:
            if tensor.name in self.graph.in_place:
                continue
            shape, buffer = tensor.resolve(**sizes), given.get(tensor.name)
            if buffer is None:
                buffer = self.memory.allocate(shape, tensor.dtype)
            elif buffer.shape != shape or buffer.dtype != tensor.dtype:
                raise EngineError(
                    f"{self.graph.name}: the buffer for {tensor.name} does not fit",
                    expected=f"{tensor.dtype} {shape}",
                    got=f"{buffer.dtype} {buffer.shape}",
                )
            written[tensor.name] = buffer
        return written


def dynamic_sizes(graph: Graph, given: Mapping[str, Buffer]) -> dict[str, int]:
    """The size of every dynamic dimension, from the inputs' shapes; raises `EngineError`."""
    names = {tensor.name for tensor in graph.inputs}
    if wrong := sorted(names ^ set(given)):
        kind = "lacks the input" if wrong[0] in names else "has no input"
        raise EngineError(f"{graph.name} {kind} {', '.join(wrong)}")
    sizes: dict[str, int] = {}
    for tensor in graph.inputs:
        buffer = given[tensor.name]
        if buffer.dtype != tensor.dtype or not _fits(tensor, buffer.shape, sizes):
            shape = tuple(
                sizes.get(side, side) if isinstance(side, str) else side for side in tensor.shape
            )
            raise EngineError(
                f"{graph.name}: {tensor.name} does not fit",
                expected=f"{tensor.dtype} ({', '.join(map(str, shape))})",
                got=f"{buffer.dtype} {buffer.shape}",
            )
    for letter, size in sizes.items():
        allowed = graph.ranges.get(letter)
        if allowed and not allowed.min <= size <= allowed.max:
            raise EngineError(
                f"{graph.name}: dimension {letter} is out of range",
                expected=f"{allowed.min} to {allowed.max}",
                got=size,
                fix="export the bundle with larger limits",
            )
    return sizes


def _fits(tensor: Tensor, shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Whether `shape` is one of `tensor`; learns the sizes of letters that are new."""
    if len(shape) != len(tensor.shape):
        return False
    for side, size in zip(tensor.shape, shape, strict=True):
        if isinstance(side, int):
            if side != size:
                return False
            continue
        factor, star, letter = side.rpartition("*")
        count, rest = divmod(size, int(factor) if star else 1)
        if rest or sizes.setdefault(letter, count) != count:
            return False
    return True


def check_indices(graph: Graph, inputs: Buffers, sizes: Mapping[str, int]) -> None:
    """Raise `EngineError` for an index out of its range: an engine would read foreign memory, or
    count it as hidden and give a wrong answer. Only what is on the host can be looked at."""
    for tensor in graph.inputs:
        if tensor.below is None:
            continue
        value = inputs[tensor.name]
        if isinstance(value, Buffer):
            if value.memory.device != "cpu":
                continue
            value = value.read()
        below = sizes[tensor.below] if isinstance(tensor.below, str) else tensor.below
        if prod(np.shape(value)) and not (tensor.min <= value.min() and value.max() < below):
            raise EngineError(
                f"{graph.name}: {tensor.name} is out of range",
                expected=f"{tensor.min} to {below - 1}",
                got=f"{value.min()} to {value.max()}",
            )
