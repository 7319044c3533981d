"""Deformable sampling of feature pyramids, the core of MMFS and of the ViT-Adapter.

Letters: b batch, q queries, m image slots, l levels, h heads, p points, d channels per head,
n encoded images, s feature cells, r table rows.

Feature cells stand level by level, row-major in each. A sampled value is a weighted sum of rows of
`value`, so a whole query is one bag of rows, which `embedding_bag` reads in place. Nothing is
transposed, no image is copied for the queries that share it, and no [queries, points, channels]
tensor exists. On a CPU core, forward and backward together take 25 to 60 % of the time of one
`grid_sample` per level.

`mmi_plugins.torch.op` is the same operator as one opaque op, with a backward pass written by hand
and Triton kernels for CUDA. The two are separate programs on purpose: kernels and exported graphs
are compared with this one, it is plain tensor algebra that autograd and the exporter can follow,
and model code depends on no package but the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmi_train.model.autocast import without_autocast

# One side per square level, or one (height, width) per level.
Sides = Sequence[int] | Sequence[tuple[int, int]]


def level_shapes(sides: Sides) -> list[tuple[int, int]]:
    """(height, width) of every level."""
    return [(side, side) if isinstance(side, int) else (side[0], side[1]) for side in sides]


def sample_levels(value: Tensor, level_sides: Sides, location: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of bilinear samples; row i of the queries samples image i.

    value [n,s,h,d]; location [n,q,h,l|1,p,2] in [0,1], x first (1: shared by all levels);
    weight [n,q,h,l,p]. Returns [n,q,h*d]. Pixel centres at (i + 0.5) / side; zero outside the map.
    Source: Deformable DETR (Zhu et al. 2020), Eq. 3, without its projections.
    """
    if torch.compiler.is_exporting():  # standard operators only
        return _sample_by_grid(value, level_sides, location, weight)
    image_slot = torch.arange(value.shape[0], device=value.device)[:, None]  # [n, 1]
    return sample_pool(value, image_slot, level_sides, location.unsqueeze(3), weight.unsqueeze(3))


def sample_pool(
    value: Tensor, image_slot: Tensor, level_sides: Sides, location: Tensor, weight: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples over several images of a pool per query.

    value [n,s,h,d]; image_slot [b,m] rows of the pool, in range; location [b,q,h,m,l|1,p,2];
    weight [b,q,h,m,l,p]. Returns [b,q,h*d] in the type of `value`; computed in fp32 (or fp64).
    """
    n, s, h, d = value.shape
    b, q = weight.shape[:2]
    wide = torch.promote_types(value.dtype, torch.float32)
    with without_autocast(value.device):
        cell, share = _corners(level_sides, location.to(wide), weight.to(wide))
        image = image_slot.to(torch.int32)[:, None, None, :, None, None] * (s * h)
        head = torch.arange(h, dtype=torch.int32, device=value.device).view(h, 1, 1, 1)
        row = cell * h + (image + head)  # [b, q, h, m, l*4, p]
        table = value.to(wide).reshape(n * s * h, d)
        out = _sum_rows(table, row.view(b * q * h, -1), share.view(b * q * h, -1))
    return out.view(b, q, h * d).to(value.dtype)


def _corners(level_sides: Sides, location: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The four cells around every point and the bilinear weight of each, both [b,q,h,m,l*4,p].

    A corner outside its map has weight 0; its cell is clamped to one that can be read. Computed
    level by level and axis by axis, so that every operation runs over long contiguous rows.
    """
    x, y = location.unbind(-1)  # [b, q, h, m, l|1, p]
    per_level = x.shape[-2] > 1
    cells, shares, start = [], [], 0
    for level, (height, width) in enumerate(level_shapes(level_sides)):
        across = _axis(x[..., level if per_level else 0, :], width)
        down = _axis(y[..., level if per_level else 0, :], height)
        for line, line_share in down:
            first = line * width + start
            line_share = line_share * weight[..., level, :]
            for column, column_share in across:
                cells.append(first + column)
                shares.append(line_share * column_share)
        start += height * width
    return torch.stack(cells, -2), torch.stack(shares, -2)


def _axis(location: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The two cells next to a location along one axis: (index, share), share 0 outside.

    The clamp acts on integers, not floats: a NaN location then has an index in range and share NaN.
    """
    pixel = location * size - 0.5
    low = pixel.detach().floor()
    part = pixel - low
    high = low + 1
    return [
        (neighbour.int().clamp(0, size - 1), share * ((neighbour >= 0) & (neighbour < size)))
        for neighbour, share in ((low, 1 - part), (high, part))
    ]


class _SumRows(torch.autograd.Function):
    """out[i] = sum over j of share[i,j] * table[row[i,j]], with a fast gradient of the table.

    PyTorch scatters that gradient row by row. Sorted by row, the same sum is a second embedding
    bag: for every row of the table, the weighted sum of the output gradients that read it.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, row: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(table, row, share)
        return F.embedding_bag(row, table, per_sample_weights=share, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        table, row, share = ctx.saved_tensors
        grad = grad.contiguous()
        grad_table = grad_share = None
        if ctx.needs_input_grad[0]:
            sorted_row, order = row.flatten().sort(stable=True)
            every = torch.arange(len(table) + 1, dtype=row.dtype, device=row.device)
            # Where each row's run begins; counting the rows would wait for a GPU.
            offsets = torch.searchsorted(sorted_row, every)
            grad_table = F.embedding_bag(
                order // row.shape[1],
                grad,
                offsets,
                per_sample_weights=share.flatten().index_select(0, order),
                mode="sum",
                include_last_offset=True,
            )
        if ctx.needs_input_grad[2]:
            with torch.enable_grad():
                leaf = share.detach().requires_grad_()
                out = F.embedding_bag(row, table.detach(), per_sample_weights=leaf, mode="sum")
            (grad_share,) = torch.autograd.grad(out, leaf, grad)
        return grad_table, None, grad_share


_sum_rows = _SumRows.apply


def _sample_by_grid(value: Tensor, level_sides: Sides, location: Tensor, weight: Tensor) -> Tensor:
    """`sample_levels` as one `grid_sample` per level: standard ONNX operators."""
    n, _, h, d = value.shape
    q, p = weight.shape[1], weight.shape[4]
    shapes = level_shapes(level_sides)
    maps = value.float().split([height * width for height, width in shapes], 1)
    grid = (2 * location.float() - 1).expand(-1, -1, -1, len(shapes), -1, -1)
    total = value.new_zeros((n * h, d, q), dtype=torch.float32)
    for level, (height, width) in enumerate(shapes):
        planes = maps[level].permute(0, 2, 3, 1).reshape(n * h, d, height, width)
        points = grid[:, :, :, level].transpose(1, 2).reshape(n * h, q, p, 2)
        share = weight[:, :, :, level].float().transpose(1, 2).reshape(n * h, 1, q, p)
        samples = F.grid_sample(planes, points, padding_mode="zeros", align_corners=False)
        total = total + (samples * share).sum(-1)
    return total.view(n, h * d, q).transpose(1, 2).to(value.dtype)


def multi_image_deformable_attention(
    value: Tensor,
    image_slot: Tensor,
    offsets: Tensor,
    logits: Tensor,
    offset_table: Tensor,
    logit_table: Tensor,
    image_position: Tensor,
    reference: Tensor,
    null_value: Tensor,
    *,
    level_heights: Sequence[int],
    level_widths: Sequence[int],
    base_grid: float,
    null_slot: bool,
) -> Tensor:
    """Definition of the operator `mmi::MultiImageDeformableAttention`, version 1.

    value [n,s,h,d] pool of encoded images; image_slot [b,m] rows of the pool; offsets [b,q,h,p,2]
    (cells of a grid of side `base_grid`, x first) and logits [b,q,h,l,p] of the query; offset_table
    [r,h,p,2] and logit_table [r,h,l,p] by image position; image_position [b,q|1,m] (0 hidden,
    1 nearest); reference [q|1,2] in [0,1]; null_value [h,d]. Returns [b,q,h*d].

    A sample lies at reference + (offsets + offset_table[position]) / base_grid on every level. The
    weights are a softmax over all visible (image, level, point); `null_slot` adds a logit of 0 with
    the value `null_value`. Without the null slot, a query that sees no image gets 0. Slots and
    positions out of range count as hidden. Paper Eq. 4 and, with the null slot, the released model.
    """
    b, q, heads, levels, points = logits.shape
    wide = torch.promote_types(value.dtype, torch.float32)
    in_pool = (image_slot >= 0) & (image_slot < value.shape[0])
    in_table = (image_position > 0) & (image_position < offset_table.shape[0])
    visible = in_pool[:, None] & in_table  # [b, q|1, m]
    hidden = ~visible[:, :, None, :, None, None]
    position = torch.where(visible, image_position, 0)
    slot = torch.where(in_pool, image_slot, 0)
    shapes = list(zip(level_heights, level_widths, strict=True))

    def by_position(table: Tensor) -> Tensor:
        """Rows of a table at the image positions: [r,h,...] -> [b,q|1,h,m,...]."""
        rows = F.embedding(position, table.to(wide).flatten(1))
        return rows.unflatten(-1, table.shape[1:]).transpose(2, 3)

    with without_autocast(value.device):
        offset = offsets.to(wide).unsqueeze(3) + by_position(offset_table)  # [b, q, h, m, p, 2]
        location = reference.to(wide)[None, :, None, None, None] + offset / base_grid
        score = logits.to(wide).unsqueeze(3) + by_position(logit_table)  # [b, q, h, m, l, p]
        score = score.masked_fill(hidden, torch.finfo(wide).min).flatten(3)
        if null_slot:
            weight = F.pad(score, (0, 1)).softmax(-1)
            weight, null_weight = weight[..., :-1], weight[..., -1:]
        else:
            weight = score.softmax(-1)
        weight = weight.unflatten(-1, (-1, levels, points))  # [b, q, h, m, l, p]
        if not null_slot:  # with every image hidden the softmax is uniform, but must be 0
            weight = weight.masked_fill(hidden, 0.0)
        out = sample_pool(value, slot, shapes, location.unsqueeze(4), weight)
        if null_slot:
            null = (null_weight * null_value.to(wide)).view(b, q, -1)
            out = (out.to(wide) + null).to(value.dtype)
    return out
