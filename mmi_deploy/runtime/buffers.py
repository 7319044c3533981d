"""Memory of tensors, on the host or on a device, that engines read and write where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Buffer:
    """One C-contiguous tensor at a fixed address. `owner` keeps its memory alive."""

    memory: Memory
    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object

    def rows(self, first: int, last: int) -> Buffer:
        """Rows `first` to `last` (exclusive) of the outermost dimension, at their address."""
        if not 0 <= first <= last <= self.shape[0]:
            raise IndexError(f"rows {first}:{last} of {self.shape[0]}")
        row = prod(self.shape[1:]) * self.dtype.itemsize
        shape = (last - first, *self.shape[1:])
        return replace(self, pointer=self.pointer + first * row, shape=shape)

    def reshaped(self, shape: Sequence[int]) -> Buffer:
        """The same memory seen in another shape of as many elements."""
        if prod(shape) != prod(self.shape):
            raise ValueError(f"cannot see {self.shape} as {tuple(shape)}")
        return replace(self, shape=tuple(shape))

    def write(self, array: Array) -> None:
        """Copy `array`, of the same shape and type, into it."""
        self.memory.write(self, array)

    def read(self) -> Array:
        """The contents. On the host this is the memory itself: copy it to keep it."""
        return self.memory.read(self)


class Memory(Protocol):
    """Where buffers live. `device` is `cpu` or `cuda`, `device_id` counts from 0."""

    device: str
    device_id: int

    def allocate(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """A new buffer of zeros."""

    def hold(self, array: Array) -> Buffer:
        """A buffer with the contents of `array`; on the host `array` itself."""

    def write(self, buffer: Buffer, array: Array) -> None:
        """Copy `array` into `buffer`."""

    def read(self, buffer: Buffer) -> Array:
        """The contents of `buffer`; on the host its memory itself."""


class HostMemory:
    """Memory of the process: numpy arrays. Zeros cost nothing until they are touched."""

    device = "cpu"
    device_id = 0

    def allocate(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        return self.hold(np.zeros(shape, dtype))

    def hold(self, array: Array) -> Buffer:
        array = np.ascontiguousarray(array).reshape(np.shape(array))  # keeps scalars 0-dimensional
        return Buffer(self, array.ctypes.data, array.shape, array.dtype, array)

    def write(self, buffer: Buffer, array: Array) -> None:
        if buffer.shape != array.shape or buffer.dtype != array.dtype:
            raise ValueError(
                f"cannot write {array.dtype} {array.shape} into {buffer.dtype} {buffer.shape}"
            )
        buffer.read()[...] = array

    def read(self, buffer: Buffer) -> Array:
        assert isinstance(buffer.owner, np.ndarray)
        memory = buffer.owner.reshape(-1).view(np.uint8)
        first = buffer.pointer - buffer.owner.ctypes.data
        last = first + prod(buffer.shape) * buffer.dtype.itemsize
        return memory[first:last].view(buffer.dtype).reshape(buffer.shape)


HOST = HostMemory()
