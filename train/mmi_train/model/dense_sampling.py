"""Deformable sampling of small maps as a matrix product, for training the tiny preset on a CPU.

Gathering rows one by one and summing their gradients is slow on a CPU; matrix products are fast. So
the bilinear samples of a query become one row of weights over all cells, zero but for the corners
that the samples touch, and that matrix is multiplied with the values. The result is that of
`deformable.sample_levels`. It pays off while a row of cells is short: on one core, forward and
backward, 2 to 3 times as fast over 16 to 84 cells, no faster over 336.

Every level is padded with a border of one cell, which is zero: the outside of the map. `padded`
counts the cells of all levels with their borders.

Letters: n encoded images, q queries, h heads, l levels, p points, d channels per head,
s feature cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmi_train.model.attention import trains_on_cpu

MAX_CELLS = 128


def prefer_dense(value: Tensor, location: Tensor) -> bool:
    """True where `sample_dense` is faster: training on a CPU over at most `MAX_CELLS` cells."""
    return (trains_on_cpu(value) or trains_on_cpu(location)) and value.shape[1] <= MAX_CELLS


def sample_dense(
    value: Tensor, level_sides: Sequence[int], location: Tensor, weight: Tensor
) -> Tensor:
    """Compute `deformable.sample_levels` for square levels: value [n, s, h, d], weight
    [n, q, h, l, p], location [n, q, h, l|1, p, 2] in [0, 1], x first -> [n, q, h * d]."""
    sides = tuple(level_sides)
    mixing = _Mixing.apply(location, weight, sides).to(value.dtype)  # [n, q, h, padded]
    levels = value.split([side * side for side in sides], 1)
    border = (0, 0, 0, 0, 1, 1, 1, 1)  # around both axes of the grid, not heads and channels
    padded = [
        F.pad(level.unflatten(1, (side, side)), border).flatten(1, 2)
        for level, side in zip(levels, sides, strict=True)
    ]
    rows = mixing.transpose(1, 2) @ torch.cat(padded, 1).transpose(1, 2)  # [n, h, q, d]
    return rows.transpose(1, 2).flatten(2)


class _Mixing(torch.autograd.Function):
    """location [..., l|1, p, 2], weight [..., l, p] -> the weight of every cell, [..., padded]."""

    @staticmethod
    def forward(ctx: Any, location: Tensor, weight: Tensor, sides: tuple[int, ...]) -> Tensor:
        size = location.new_tensor(sides)[:, None, None]  # [l, 1, 1]
        stride = size[..., 0] + 2
        areas = [(side + 2) ** 2 for side in sides]
        start = torch.tensor([sum(areas[:level]) for level in range(len(areas))])

        # In pixels of the level, centres at whole numbers; those of the border are -1 and side.
        pixel = location * size - 0.5  # [..., l, p, 2]
        inside = (pixel > -1) & (pixel < size)
        pixel = pixel.clamp_(min=-1).minimum(size)
        low = pixel.floor().minimum(size - 1)
        x, y = (pixel - low).unbind(-1)
        first = low[..., 1] * stride + low[..., 0] + (stride + 1)  # the upper left of four cells
        # A NaN location gets a valid cell and a NaN share; the training loop reports the NaN loss.
        first = first.long().clamp_(min=0) + start[:, None]
        corner = torch.stack([stride * 0, stride * 0 + 1, stride, stride + 1], -1).long()
        cells = (first[..., None] + corner).flatten(-3)  # [..., l * p * 4]

        w = weight.to(location.dtype)
        lower = w * y
        upper = w - lower
        upper_right, lower_right = upper * x, lower * x
        shares = torch.stack(
            [upper - upper_right, upper_right, lower - lower_right, lower_right], -1
        )
        mixing = location.new_zeros(*weight.shape[:-2], sum(areas))
        mixing.scatter_add_(-1, cells, shares.flatten(-3))
        ctx.save_for_backward(cells, x, y, w, size, inside)
        ctx.shared, ctx.weight_type = location.shape[-3] != len(sides), weight.dtype
        return mixing

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        cells, x, y, w, size, inside = ctx.saved_tensors
        a, b, c, d = gradient.gather(-1, cells).view(*w.shape, 4).unbind(-1)
        upper, lower = torch.lerp(a, b, x), torch.lerp(c, d, x)
        to_weight = torch.lerp(upper, lower, y)
        to_pixel = torch.stack([torch.lerp(b - a, d - c, y) * w, (lower - upper) * w], -1)
        to_location = to_pixel * inside.all(-1, keepdim=True) * size
        if ctx.shared:
            to_location = to_location.sum(-3, keepdim=True)
        return to_location, to_weight.to(ctx.weight_type), None
