"""Deformable sampling of feature pyramids, the core of MMFS and of the ViT-Adapter.

Letters: b batch, q queries, m images, l levels, h heads, p points, d channels per head, n pool of
encoded images, s feature cells of one image (levels one after another, row-major), r table rows.

A sampled value is a weighted sum of rows of `value`, so a whole query is one bag of rows:
`embedding_bag` reads them in place. Nothing is transposed, no image is copied for the queries that
share it, and no [queries, points, channels] tensor exists. On one CPU core this is 2.6 times as fast
forward and 1.6 times backward as one `grid_sample` per level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Sides = Sequence[int] | Sequence[tuple[int, int]]
"""One side per square level, or one (height, width) per level."""


def level_shapes(sides: Sides) -> list[tuple[int, int]]:
    """(height, width) of every level."""
    return [(side, side) if isinstance(side, int) else (side[0], side[1]) for side in sides]


def sample_levels(value: Tensor, level_sides: Sides, location: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of bilinear samples, every row of queries on its own image.

    value [n,s,h,d]; location [n,q,h,l|1,p,2] in [0,1], x first (1: shared by all levels);
    weight [n,q,h,l,p]. Returns [n,q,h*d]. Pixel centres at (i + 0.5) / side; zero outside the map.
    Source: Deformable DETR (Zhu et al. 2020), Eq. 3, without its projections.
    """
    if torch.compiler.is_exporting():  # standard operators only
        return _sample_by_grid(value, level_sides, location, weight)
    own = torch.arange(value.shape[0], device=value.device)[:, None]
    return sample_pool(value, own, level_sides, location.unsqueeze(3), weight.unsqueeze(3))


def sample_pool(
    value: Tensor, image_slot: Tensor, level_sides: Sides, location: Tensor, weight: Tensor
) -> Tensor:
    """The same over several images per query, taken from a pool.

    value [n,s,h,d]; image_slot [b,m] rows of the pool, in range; location [b,q,h,m,l|1,p,2];
    weight [b,q,h,m,l,p]. Returns [b,q,h*d] in `value`'s type; computed in fp32 (or fp64).
    """
    n, s, h, d = value.shape
    b, q = weight.shape[:2]
    wide = torch.promote_types(value.dtype, torch.float32)
    with torch.autocast(value.device.type, enabled=False):
        cell, share = _corners(level_sides, location.to(wide), weight.to(wide))
        image = image_slot.to(torch.int32)[:, None, None, :, None, None, None]
        head = torch.arange(h, dtype=torch.int32, device=value.device).view(h, 1, 1, 1, 1)
        row = (cell + image * s) * h + head  # [b, q, h, m, l, p, 4]
        bags = F.embedding_bag(
            row.view(b * q * h, -1),
            value.to(wide).reshape(n * s * h, d),
            per_sample_weights=share.reshape(b * q * h, -1),
            mode="sum",
        )
    return bags.view(b, q, h * d).to(value.dtype)


def _corners(level_sides: Sides, location: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The four cells around every point and what each contributes; both [..., l, p, 4].

    A corner outside its map contributes nothing; its cell is clamped so that it can be read.
    """
    shapes, device = level_shapes(level_sides), location.device
    size = torch.tensor([(w, h) for h, w in shapes], device=device)[:, None, :]  # [l, 1, 2]
    starts = [0]
    for height, width in shapes[:-1]:
        starts.append(starts[-1] + height * width)
    start = torch.tensor(starts, dtype=torch.int32, device=device)[:, None, None, None]
    stride = size[..., :1, None].to(torch.int32)

    pixel = location * size - 0.5  # [..., l, p, 2]
    low = pixel.detach().floor()
    part = pixel - low
    corner = torch.stack((low, low + 1), -1)  # [..., l, p, xy, 2]
    last = (size - 1).unsqueeze(-1)
    inside = (corner >= 0) & (corner <= last)
    share = torch.stack((1 - part, part), -1) * inside
    cell = corner.clamp(min=0).minimum(last).to(torch.int32)

    across, down = cell.unbind(-2)  # [..., l, p, 2]
    share_x, share_y = share.unbind(-2)
    share_y = share_y * weight.unsqueeze(-1)
    cells = down.unsqueeze(-1) * stride + across.unsqueeze(-2) + start
    shares = share_y.unsqueeze(-1) * share_x.unsqueeze(-2)  # [..., l, p, 2, 2]
    return cells.flatten(-2), shares.flatten(-2)


def _sample_by_grid(value: Tensor, level_sides: Sides, location: Tensor, weight: Tensor) -> Tensor:
    """`sample_levels` as one `grid_sample` per level: what other runtimes understand."""
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
    """Operator `mmi::MultiImageDeformableAttention`, version 1: its definition. Returns [b,q,h*d].

    value [n,s,h,d] pool of encoded images; image_slot [b,m] rows of the pool; offsets [b,q,h,p,2]
    (cells of a grid of `base_grid` cells a side, x first) and logits [b,q,h,l,p] of the query;
    offset_table [r,h,p,2] and logit_table [r,h,l,p] by image position; image_position [b,q|1,m]
    (0 hidden, 1 nearest); reference [q|1,2] in [0,1]; null_value [h,d].

    A sample lies at reference + (offsets + offset_table[position]) / base_grid on every level. Its
    weight is the softmax over all visible (image, level, point), with one more logit of 0 that
    stands for `null_value` where `null_slot`. Where it is not set and nothing is visible, 0. Slots
    and positions out of range count as hidden. Paper Eq. 4 and, with the null slot, the released
    model.
    """
    n, d = value.shape[0], value.shape[3]
    b, q, h, l, p = logits.shape
    wide = torch.promote_types(value.dtype, torch.float32)
    in_pool = (image_slot >= 0) & (image_slot < n)
    in_table = (image_position > 0) & (image_position < offset_table.shape[0])
    visible = in_pool[:, None] & in_table  # [b, q|1, m]
    position = torch.where(visible, image_position, 0).long()
    slot = torch.where(in_pool, image_slot, 0)

    with torch.autocast(value.device.type, enabled=False):
        moved = offset_table.to(wide)[position].transpose(2, 3)  # [b, q|1, h, m, p, 2]
        moved = offsets.to(wide).unsqueeze(3) + moved
        location = reference.to(wide)[None, :, None, None, None] + moved / base_grid

        score = logits.to(wide).unsqueeze(3) + logit_table.to(wide)[position].transpose(2, 3)
        hidden = ~visible[:, :, None, :, None, None]
        score = score.masked_fill(hidden, torch.finfo(wide).min).flatten(3)  # [b, q, h, m*l*p]
        if null_slot:
            weight = F.pad(score, (0, 1)).softmax(-1)
            weight, null_weight = weight[..., :-1], weight[..., -1:]
        else:
            weight = score.softmax(-1)
        weight = weight.unflatten(-1, (-1, l, p))  # [b, q, h, m, l, p]
        if not null_slot:  # all hidden: the softmax is uniform and must give nothing
            weight = weight.masked_fill(hidden, 0.0)
        levels = list(zip(level_heights, level_widths, strict=True))
        out = sample_pool(value, slot, levels, location.unsqueeze(4), weight)
        if null_slot:
            null = (null_weight * null_value.to(wide)).view(b, q, h * d)
            out = (out.to(wide) + null).to(value.dtype)
    return out
