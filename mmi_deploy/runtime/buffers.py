"""Buffers: tensors in host or device memory, which engines read and write without a copy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mmi_deploy.errors import EngineError

Array = NDArray[Any]


def element_type(name: DTypeLike) -> np.dtype[Any]:
    """numpy dtype of a name; `bfloat16` comes from `ml_dtypes`. Raises `EngineError`."""
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise EngineError(
                "bfloat16 needs ml_dtypes, which is not installed",
                fix="install it with: pip install ml_dtypes",
            ) from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@dataclass(frozen=True, slots=True)
class Buffer:
    """One C-contiguous tensor at a fixed address. `owner` keeps its memory alive."""

    memory: Memory
    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object

    def rows(self, first: int, last: int) -> Buffer:
        """View of rows `first` to `last` (exclusive) of the outermost dimension."""
        if not 0 <= first <= last <= self.shape[0]:
            raise IndexError(f"rows {first}:{last} of {self.shape[0]}")
        row = prod(self.shape[1:]) * self.dtype.itemsize
        shape = (last - first, *self.shape[1:])
        return Buffer(self.memory, self.pointer + first * row, shape, self.dtype, self.owner)

    def reshaped(self, shape: Sequence[int]) -> Buffer:
        """View of the same memory with another shape of as many elements."""
        if prod(shape) != prod(self.shape):
            raise ValueError(f"cannot reshape {self.shape} to {tuple(shape)}")
        return Buffer(self.memory, self.pointer, tuple(shape), self.dtype, self.owner)

    def write(self, array: Array) -> None:
        """Copy `array`, of the same shape and dtype, into the buffer."""
        self.memory.write(self, array)

    def read(self) -> Array:
        """Read the contents after all enqueued work. On the host the array is a view of the memory:
        copy it to keep it."""
        return self.memory.read(self)

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class Mark(Protocol):
    """A moment in the order of the enqueued work."""

    def wait(self) -> None:
        """Wait until the work before the mark is done."""

    def seconds_since(self, earlier: Any) -> float:
        """Seconds from an `earlier` mark of the same memory to this one. Waits for this one."""


class Memory(Protocol):
    """Memory that buffers are allocated in. `device` is `cpu` or `cuda`.

    Device operations are asynchronous and run in order; only `read` and `wait` wait for them. An
    array passed to `write` or `from_array` may be changed afterwards on a device; on the host
    `from_array` shares its memory.
    """

    device: str

    def allocate(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """Allocate a buffer of zeros."""

    def from_array(self, array: Array) -> Buffer:
        """Make a buffer with the contents of `array`; on the host it shares memory with `array`."""

    def write(self, buffer: Buffer, array: Array) -> None:
        """Copy `array` into `buffer`."""

    def read(self, buffer: Buffer) -> Array:
        """Read the contents of `buffer`; on the host a view of its memory."""

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy `source` into `target`, of the same shape and dtype and without an overlap."""

    def wait(self) -> None:
        """Wait until all enqueued work is done."""

    def mark(self) -> Mark:
        """Mark the present end of the enqueued work. Does not wait."""


def check_alike(buffer: Buffer, other: Buffer | Array) -> None:
    """Raise `ValueError` unless both have the same shape and dtype, as a copy requires."""
    if buffer.shape != other.shape or buffer.dtype != other.dtype:
        raise ValueError(
            f"cannot copy {other.dtype} {other.shape} into {buffer.dtype} {buffer.shape}"
        )


class HostMark:
    """A moment on the host, where all work is done at once."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def wait(self) -> None:
        return

    def seconds_since(self, earlier: HostMark) -> float:
        return self._time - earlier._time


class HostMemory:
    """Memory of the process: numpy arrays. The system commits pages of zeros at first access."""

    device = "cpu"

    def allocate(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        return self.from_array(np.zeros(shape, element_type(dtype)))

    def from_array(self, array: Array) -> Buffer:
        array = np.ascontiguousarray(array).reshape(np.shape(array))  # keeps scalars 0-dimensional
        return Buffer(self, array.ctypes.data, array.shape, array.dtype, array)

    def write(self, buffer: Buffer, array: Array) -> None:
        check_alike(buffer, array)
        buffer.read()[...] = array

    def read(self, buffer: Buffer) -> Array:
        assert isinstance(buffer.owner, np.ndarray)
        memory = buffer.owner.reshape(-1).view(np.uint8)
        first = buffer.pointer - buffer.owner.ctypes.data
        return memory[first : first + buffer.bytes].view(buffer.dtype).reshape(buffer.shape)

    def copy(self, source: Buffer, target: Buffer) -> None:
        check_alike(target, source)
        target.read()[...] = source.read()

    def wait(self) -> None:
        return

    def mark(self) -> HostMark:
        return HostMark()


HOST = HostMemory()
