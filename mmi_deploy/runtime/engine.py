"""Engine: the interface to one graph, implemented by ONNX Runtime and TensorRT.

An engine checks named buffers against the contract (`mmi_deploy.spec.graphs`), then runs. An output
that the `Graph` declares in place shares the buffer of its input; other outputs go into the
caller's buffers, or into new ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from threading import Lock

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.buffers import Array, Buffer, Memory
from mmi_deploy.spec.graphs import Graph, Tensor

Buffers = Mapping[str, Buffer | Array]

# Combinations of input shapes cached per engine, after which the cache is cleared: every document
# adds its own, and an entry of the largest LLM takes 20 kB.
MAX_SHAPES = 256

# Elements up to which Python's min and max are faster than numpy's.
_FEW = 64


class Engine(ABC):
    """One graph, ready to run. Thread-safe: concurrent runs are serialised by a lock."""

    def __init__(self, graph: Graph, memory: Memory) -> None:
        self.graph = graph
        self.memory = memory
        # Runs launched from a CUDA graph (None: the engine has none), and the reason why the last
        # attempt to record one failed.
        self.launches: int | None = None
        self.refusal = ""
        self._lock: AbstractContextManager[object] = Lock()
        self._known_shapes: dict[tuple[object, ...], dict[str, int]] = {}

    def run(
        self, inputs: Buffers, outputs: Mapping[str, Buffer] | None = None
    ) -> dict[str, Buffer]:
        """Run once; returns all outputs that are not in place. On a device the run is asynchronous:
        it is enqueued, and reading a buffer waits for it.

        inputs: every input of the graph; arrays are copied to the engine's memory (on the host they
        are used directly). outputs: buffers to write to. Raises `EngineError` for a mismatch with
        the contract: names, types, shapes, ranges, indices out of range.
        """
        with self._lock:
            # All checks come before the run: an engine trusts its shapes and indices, and a bad one
            # would read or write foreign memory.
            held = {
                name: value if isinstance(value, Buffer) else self._to_buffer(name, value)
                for name, value in inputs.items()
            }
            sizes = self._sizes(held)
            check_indices(self.graph, inputs, sizes)
            written = self._outputs(sizes, outputs or {})
            shared = {new: held[old] for new, old in self.graph.in_place.items()}
            self._execute(held, {**written, **shared})
        return written

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> BoundPlan:
        """Check all inputs and outputs once, for repeated runs on the same buffers. Raises
        `EngineError` as `run` does, and for an output that is missing."""
        with self._lock:
            sizes = self._sizes(inputs)
            check_indices(self.graph, inputs, sizes)
            names = {tensor.name for tensor in self.graph.outputs} - set(self.graph.in_place)
            if wrong := sorted(names ^ set(outputs)):
                raise EngineError(f"{self.graph.name}: bound outputs differ in {', '.join(wrong)}")
            written = self._outputs(sizes, outputs)
            shared = {new: inputs[old] for new, old in self.graph.in_place.items()}
            return BoundPlan(self, dict(inputs), {**written, **shared}, sizes)

    def _prepare(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """Return the function that runs on these checked buffers again and again."""
        return partial(self._execute, inputs, outputs)

    def _to_buffer(self, name: str, array: Array) -> Buffer:
        """Make a buffer with the contents of `array` that the engine reads as its input `name`."""
        return self.memory.from_array(array)

    @abstractmethod
    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run on checked buffers; the buffer of an in-place output is that of its input."""

    def save_kernels(self) -> None:
        """Keep what was compiled so far for the next start, where the engine compiles at all."""
        return

    def close(self) -> None:
        """Free the engine's resources."""
        return

    def _sizes(self, held: Mapping[str, Buffer]) -> dict[str, int]:
        """Sizes of the dynamic dimensions, checked once per combination of shapes and cached."""
        key = tuple((name, buffer.shape, buffer.dtype) for name, buffer in held.items())
        if key not in self._known_shapes:
            if len(self._known_shapes) == MAX_SHAPES:
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


class BoundPlan:
    """Repeated runs of an engine on fixed buffers, made by `Engine.bind`.

    Inputs in host memory may be written between runs: only their indices are checked again.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        sizes: Mapping[str, int],
    ) -> None:
        self._engine, self._sizes = engine, sizes
        # Buffers on a device are not read, and arrays are views: made once, they show new contents.
        self._arrays = {
            tensor.name: inputs[tensor.name].read()
            if inputs[tensor.name].memory.device == "cpu"
            else inputs[tensor.name]
            for tensor in engine.graph.inputs
            if tensor.below is not None
        }
        self._start = engine._prepare(inputs, outputs)

    def run(self) -> None:
        """Run once; asynchronous on a device. Raises `EngineError` for an index out of range."""
        with self._engine._lock:
            check_indices(self._engine.graph, self._arrays, self._sizes)
            self._start()


def dynamic_sizes(graph: Graph, given: Mapping[str, Buffer]) -> dict[str, int]:
    """Derive the size of every dynamic dimension from the inputs' shapes; raises `EngineError`."""
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
    """Match `shape` with that of `tensor`; letters not yet in `sizes` are added to it."""
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
    """Raise `EngineError` for an index out of its range, with which an engine would read foreign
    memory or silently give a wrong result. Buffers on a device are not checked: reading them would
    wait for the device."""
    for tensor in graph.inputs:
        if tensor.below is None:
            continue
        value = inputs[tensor.name]
        if isinstance(value, Buffer):
            if value.memory.device != "cpu":
                continue
            value = value.read()
        below = sizes[tensor.below] if isinstance(tensor.below, str) else tensor.below
        if not value.size:
            continue
        if value.size <= _FEW:
            values = value.ravel().tolist()
            least, largest = min(values), max(values)
        else:
            least, largest = value.min(), value.max()
        if not (tensor.min <= least and largest < below):
            raise EngineError(
                f"{graph.name}: {tensor.name} is out of range",
                expected=f"{tensor.min} to {below - 1}",
                got=f"{least} to {largest}",
            )
