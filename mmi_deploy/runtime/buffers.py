"""Memory of tensors, on the host or on a device, that engines read and write where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mmi_deploy.errors import EngineError

Array = NDArray[Any]


def element_type(name: DTypeLike) -> np.dtype[Any]:
    """numpy's type of that name; `bfloat16` is that of `ml_dtypes`. Raises `EngineError`."""
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
        """The contents, once all that writes them is done. On the host this is the memory itself:
        copy it to keep it."""
        return self.memory.read(self)

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return prod(self.shape) * self.dtype.itemsize


class Memory(Protocol):
    """Where buffers live. `device` is `cpu` or `cuda`.

    A device works through what it is asked for in order and behind the caller's back: only `read`
    and `wait` wait for it. What is given to `write` or `hold` may be changed afterwards on a
    device, and is the memory itself on the host.
    """

    device: str

    def allocate(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """A new buffer of zeros."""

    def from_array(self, array: Array) -> Buffer:
        """A buffer with the contents of `array`; on the host `array` itself."""

    def write(self, buffer: Buffer, array: Array) -> None:
        """Copy `array` into `buffer`."""

    def read(self, buffer: Buffer) -> Array:
        """The contents of `buffer`; on the host its memory itself."""

    def copy(self, source: Buffer, target: Buffer, backwards: bool = False) -> None:
        """Copy `source` into `target`, of the same shape and type and not overlapping;
        `backwards`: the last row of the outermost dimension first."""

    def wait(self) -> None:
        """Return when all that was asked for is done."""


def check_alike(buffer: Buffer, other: Buffer | Array) -> None:
    """Raise `ValueError` unless both have one shape and type, so that one may be copied."""
    if buffer.shape != other.shape or buffer.dtype != other.dtype:
        raise ValueError(
            f"cannot copy {other.dtype} {other.shape} into {buffer.dtype} {buffer.shape}"
        )


class HostMemory:
    """Memory of the process: numpy arrays. Zeros cost nothing until they are touched."""

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

    def copy(self, source: Buffer, target: Buffer, backwards: bool = False) -> None:
        check_alike(target, source)
        rows = source.read()
        target.read()[...] = rows[::-1] if backwards else rows

    def wait(self) -> None:
        return


HOST = HostMemory()
