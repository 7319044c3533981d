"""Tensors that lie in files, and are read piece by piece when they are needed.

A checkpoint of 60 GB is a mapping of names to `StoredTensor`: shapes and types are known at once,
numbers are read in pieces of a few megabytes, in row-major order. Whole tensors in memory
(`InMemory`), some rows of one (`Rows`) and several on top of each other (`Stacked`) are of the same
kind, so that what is made of a checkpoint can be written without holding more than a piece of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mmi_deploy.errors import WeightsError

PIECE_BYTES = 16 << 20
"""Of one piece, unless a single row is larger."""

PLAIN_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What weights may be stored as. Others (8-bit floats, integers with scales) mean nothing without
the code that quantised them."""


class StoredTensor(Protocol):
    """A tensor that is somewhere: known at once is its form, read are its numbers."""

    @property
    def shape(self) -> torch.Size:
        """As it lies there."""

    @property
    def dtype(self) -> torch.dtype:
        """As it lies there."""

    def read(self) -> Tensor:
        """All of it."""

    def pieces(self) -> Iterator[Tensor]:
        """Flat pieces of about `PIECE_BYTES`, in row-major order."""


@dataclass(frozen=True)
class InMemory:
    """A tensor that is there already."""

    value: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def read(self) -> Tensor:
        return self.value

    def pieces(self) -> Iterator[Tensor]:
        yield from _cut(self.value.detach())


@dataclass(frozen=True)
class InFile:
    """Plain numbers in a file, from the byte `offset` on. `strides` (in numbers): None means
    row-major without gaps."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...] | None = None

    @property
    def span(self) -> int:
        """Numbers from the first to the last of them, gaps included."""
        if self.strides is None or not prod(self.shape):
            return prod(self.shape)
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((side - 1) * step for side, step in steps)

    def read(self) -> Tensor:
        numbers = self._numbers(0, self.span)
        if self.strides is None:
            return numbers.view(self.shape)
        return numbers.as_strided(self.shape, self.strides).contiguous()

    def pieces(self) -> Iterator[Tensor]:
        if self.strides is not None:
            yield from _cut(self.read())
            return
        numbers, step = prod(self.shape), PIECE_BYTES // self.dtype.itemsize
        for start in range(0, numbers, step):
            yield self._numbers(start, min(step, numbers - start))

    def _numbers(self, start: int, count: int) -> Tensor:
        """`count` numbers from the one at `start` on, flat."""
        data = torch.empty(count * self.dtype.itemsize, dtype=torch.uint8)
        position = self.offset + start * self.dtype.itemsize
        left = data.numpy().data
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            while len(left):
                got = os.preadv(descriptor, [left], position)
                if not got:
                    raise WeightsError(
                        f"{self.path} ends in the middle of a tensor",
                        expected=f"at least {position + len(left)} bytes",
                        got=os.fstat(descriptor).st_size,
                        fix="download it again",
                    )
                left, position = left[got:], position + got
        finally:
            os.close(descriptor)
        return data.view(self.dtype)


@dataclass(frozen=True)
class Computed:
    """A tensor whose numbers are computed when they are read. `rows`: computes those from the first
    to before the last of two given rows; None: only the whole can be computed."""

    shape: torch.Size
    dtype: torch.dtype
    whole: Callable[[], Tensor]
    rows: Callable[[int, int], Tensor] | None = None

    def read(self) -> Tensor:
        return self.whole()

    def pieces(self) -> Iterator[Tensor]:
        if self.rows is None:
            yield from _cut(self.read())
            return
        step = max(1, PIECE_BYTES // (prod(self.shape[1:]) * self.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(start + step, self.shape[0])).reshape(-1)


@dataclass(frozen=True)
class Rows:
    """The first `count` rows of a tensor."""

    tensor: StoredTensor
    count: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.count, *self.tensor.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor.read()[: self.count]

    def pieces(self) -> Iterator[Tensor]:
        left = prod(self.shape)
        for piece in self.tensor.pieces():
            yield piece[:left]
            left -= piece.numel()
            if left <= 0:
                return


@dataclass(frozen=True)
class Stacked:
    """Tensors that differ at most in their number of rows, one below the other."""

    parts: Sequence[StoredTensor]

    @property
    def shape(self) -> torch.Size:
        rows = sum(part.shape[0] for part in self.parts)
        return torch.Size((rows, *self.parts[0].shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def read(self) -> Tensor:
        return torch.cat([part.read().to(self.dtype) for part in self.parts])

    def pieces(self) -> Iterator[Tensor]:
        for part in self.parts:
            yield from part.pieces()


@dataclass(frozen=True)
class Reshaped:
    """The same numbers in the same order, in another form."""

    tensor: StoredTensor
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor.read().reshape(self.shape)

    def pieces(self) -> Iterator[Tensor]:
        return self.tensor.pieces()


def _cut(value: Tensor) -> Iterator[Tensor]:
    step = PIECE_BYTES // value.dtype.itemsize
    flat = value.reshape(-1)
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step]
