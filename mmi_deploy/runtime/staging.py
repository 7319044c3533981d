"""Staging buffers: one fixed buffer per tensor of an engine, for what its caller holds elsewhere.

A CUDA graph fixes addresses, so the inputs that change from run to run are copied to buffers that
stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mmi_deploy.runtime.buffers import Array, Buffer
from mmi_deploy.runtime.device_memory import ALIGNMENT, DeviceMemory

# Largest input in bytes that is compared with its previous contents to save the copy.
_COMPARED = 1024


@dataclass
class _Place:
    buffer: Buffer
    contents: bytes | None = None  # of a small input, as last written; None: unknown


class Staging:
    """Staging buffers of one engine, by the name of their tensor."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._places: dict[str, _Place] = {}

    def __len__(self) -> int:
        """Number of buffers."""
        return len(self._places)

    def write(self, name: str, array: Array, *, overwritten: bool = False) -> Buffer:
        """Copy `array` to the buffer of `name`, unless it is known to hold the same.

        overwritten: the run writes into the buffer, so afterwards its contents are unknown.
        """
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        place, buffer = self._place(name, array.shape, array.dtype)
        contents = array.tobytes() if array.nbytes <= _COMPARED else None
        if contents is None or contents != place.contents:
            buffer.write(array)
        place.contents = None if overwritten else contents
        return buffer

    def reserve(self, name: str, shape: Sequence[int], dtype: np.dtype[Any]) -> Buffer:
        """Buffer of `name` with `shape`, whose contents the caller writes."""
        place, buffer = self._place(name, tuple(shape), dtype)
        place.contents = None
        return buffer

    def clear(self) -> None:
        """Free all buffers. Enqueued runs must not use them any more."""
        self._places.clear()

    def _place(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> tuple[_Place, Buffer]:
        """Buffer of a tensor, and the view of it with `shape`. One that is too small is replaced by
        one of the next power of two, so that addresses rarely change."""
        size = prod(shape) * dtype.itemsize
        place = self._places.get(name)
        if place is None or place.buffer.bytes < size:
            whole = max(ALIGNMENT, 1 << (size - 1).bit_length()) if size else ALIGNMENT
            place = self._places[name] = _Place(self._memory.allocate((whole,), np.uint8))
        inner = place.buffer
        return place, Buffer(self._memory, inner.pointer, shape, dtype, inner.owner)
