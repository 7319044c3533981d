"""Lazy tensors: shape and type at once, values in pieces when they are read.

A checkpoint of 60 GB is a mapping of names to `StoredTensor`. Values are read in pieces of a few
megabytes, in row-major order. Tensors in memory (`InMemory`), computed ones (`Computed`), rows of a
tensor (`Rows`) and stacked tensors (`Stacked`) have the same interface, so that a converted
checkpoint is written without more than a piece of it in memory.
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

# Bytes of one piece, unless a single row is larger.
PIECE_BYTES = 16 << 20

# Types of weights that are read. Others (8-bit floats, integers with scales) mean nothing without
# the code that quantised them.
PLAIN_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class StoredTensor(Protocol):
    """Interface of a lazy tensor."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the stored tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored values."""

    def read(self) -> Tensor:
        """Read the whole tensor."""

    def pieces(self) -> Iterator[Tensor]:
        """Read flat pieces of about `PIECE_BYTES`, in row-major order."""


class StoredRows(StoredTensor, Protocol):
    """Lazy tensor of which some rows can be read without the others."""

    def read_rows(self, start: int, end: int) -> Tensor:
        """Read the rows from `start` to `end` (exclusive) along the first axis."""


@dataclass(frozen=True)
class InMemory:
    """A tensor in memory."""

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
    """Values in a file from the byte `offset` on.

    strides: in values, None: contiguous in row-major order.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...] | None = None

    @property
    def span(self) -> int:
        """Number of values from the first to the last, gaps included."""
        if self.strides is None or not prod(self.shape):
            return prod(self.shape)
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((side - 1) * step for side, step in steps)

    def read(self) -> Tensor:
        values = self._values(0, self.span)
        if self.strides is None:
            return values.view(self.shape)
        return values.as_strided(self.shape, self.strides).contiguous()

    def read_rows(self, start: int, end: int) -> Tensor:
        if self.strides is not None:
            return self.read()[start:end]
        row = prod(self.shape[1:])
        values = self._values(start * row, (end - start) * row)
        return values.view(end - start, *self.shape[1:])

    def pieces(self) -> Iterator[Tensor]:
        if self.strides is not None:
            yield from _cut(self.read())
            return
        total, step = prod(self.shape), PIECE_BYTES // self.dtype.itemsize
        for start in range(0, total, step):
            yield self._values(start, min(step, total - start))

    def _values(self, start: int, count: int) -> Tensor:
        """Read `count` values from position `start` on, flat; raises `WeightsError`."""
        data = torch.empty(count * self.dtype.itemsize, dtype=torch.uint8)
        position = self.offset + start * self.dtype.itemsize
        rest = data.numpy().data
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            while len(rest):  # one call may read less than was asked for
                got = os.preadv(descriptor, [rest], position)
                if not got:
                    raise WeightsError(
                        f"{self.path} ends in the middle of a tensor",
                        expected=f"at least {position + len(rest)} bytes",
                        got=os.fstat(descriptor).st_size,
                        fix="download it again",
                    )
                rest, position = rest[got:], position + got
        finally:
            os.close(descriptor)
        return data.view(self.dtype)


@dataclass(frozen=True)
class Computed:
    """A tensor whose values are computed when they are read.

    whole: computes all of it. rows: computes the rows from `start` to `end` (exclusive); None: rows
    cannot be computed alone.
    """

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
        rest = prod(self.shape)
        for piece in self.tensor.pieces():
            yield piece[:rest]
            rest -= piece.numel()
            if rest <= 0:
                return


@dataclass(frozen=True)
class Stacked:
    """Tensors concatenated along their rows, read in the type of the first."""

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
class Shards:
    """A tensor whose rows are spread over `parts`, in this order."""

    parts: Sequence[StoredRows]

    @property
    def shape(self) -> torch.Size:
        return Stacked(self.parts).shape

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def read(self) -> Tensor:
        return Stacked(self.parts).read()

    def pieces(self) -> Iterator[Tensor]:
        return Stacked(self.parts).pieces()

    def read_rows(self, start: int, end: int) -> Tensor:
        found, first = [], 0
        for part in self.parts:
            rows = part.shape[0]
            own = max(start - first, 0), min(end - first, rows)
            if own[0] < own[1]:
                found.append(part.read_rows(*own))
            first += rows
        if len(found) == 1:
            return found[0]
        return torch.cat(found) if found else torch.empty(0, *self.shape[1:], dtype=self.dtype)


@dataclass(frozen=True)
class Reshaped:
    """View of a stored tensor in another shape, values in the same order."""

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
    """Flat pieces of a tensor in memory."""
    step = PIECE_BYTES // value.dtype.itemsize
    flat = value.reshape(-1)
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step]
