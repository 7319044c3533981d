"""MMFS computed as in the published code, the baseline of speed comparisons.

The result and the weights are those of `model.mmfs.Mmfs`, the order is the published one: the query
is repeated for every image and projected for each, offsets and logits come from the sum of that and
the image's index, and sampling is Deformable DETR's reference in PyTorch, one `grid_sample` per
image and level with all samples kept until the weighted sum. (The published code has a kernel for
the last part on a GPU, and this on a CPU.)

Letters: b batch, q queries, m image slots, l levels, h heads, p points, d channels per head,
n encoded images, s feature cells, c channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.model.mmfs import Mmfs

# Added by the published code to the logits of an image that a query must not see.
HIDDEN = -10000.0


class PublishedMmfs(nn.Module):
    """Replacement for an `Mmfs`, with its weights."""

    def __init__(self, mmfs: Mmfs) -> None:
        super().__init__()
        self.mmfs = mmfs

    def values(self, features: Tensor) -> Tensor:
        """Normalised features [n,s,c] -> [n,s,h,d]."""
        return self.mmfs.values(features)

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        image_slot: Tensor,
        image_position: Tensor,
        reference: Tensor,
    ) -> Tensor:
        """Same inputs and output as `Mmfs.forward`."""
        mmfs, config = self.mmfs, self.mmfs.config
        images, queries = image_slot.shape[1], query.shape[1]
        position = image_position.expand(-1, queries, -1).transpose(1, 2)  # [b, m, q]
        repeated = query[:, None].repeat(1, images, 1, 1)
        projected = mmfs.query_proj(repeated) + mmfs.image_index(position)  # [b, m, q, c]
        offset = mmfs.offsets(mmfs.offset_proj(projected)) / mmfs.base_grid  # [b, m, q, h, p, 2]
        location = reference[None, None, :, None, None] + offset
        weight = self._weights(mmfs.weight_proj(projected), position)  # [b, q, h, m, l, p (+ 1)]
        attended = self._sample(value[image_slot], location, weight[..., : config.points])
        if config.null_slot:
            unseen = weight[..., config.points :].sum((3, 4))  # [b, q, h, 1]
            attended = attended + unseen * mmfs.null_value.view(config.heads, -1)
        return mmfs.output_proj(attended.flatten(2))

    def _weights(self, flat: Tensor, position: Tensor) -> Tensor:
        """Softmax over all images, levels and points, including the null slots of each level."""
        config, levels = self.mmfs.config, len(self.mmfs.level_sides)
        logits = flat.unflatten(-1, (config.heads, levels, -1))  # [b, m, q, h, l, p (+ 1)]
        hidden = (position == 0)[..., None, None, None]
        logits = logits + hidden * HIDDEN
        if config.null_slot:
            logits[..., config.points] = -math.log(logits.shape[1] * levels)
        logits = logits.permute(0, 2, 3, 1, 4, 5)  # [b, q, h, m, l, p (+ 1)]
        weight = logits.flatten(3).softmax(-1).view(logits.shape)
        if not config.null_slot:  # the paper's reading: a query that sees no image gets 0
            weight = weight * ~hidden.permute(0, 2, 3, 1, 4, 5)
        return weight

    def _sample(self, value: Tensor, location: Tensor, weight: Tensor) -> Tensor:
        """value [b,m,s,h,d], location [b,m,q,h,p,2], weight [b,q,h,m,l,p] -> [b,q,h,d]."""
        b, m, _, h, d = value.shape
        sides = self.mmfs.level_sides
        grid = (2 * location - 1).permute(1, 0, 3, 2, 4, 5).flatten(1, 2)  # [m, b*h, q, p, 2]
        samples = []
        for image in range(m):
            for level, side in zip(
                value[:, image].split([side * side for side in sides], 1), sides, strict=True
            ):
                planes = level.permute(0, 2, 3, 1).reshape(b * h, d, side, side)
                samples.append(
                    F.grid_sample(planes, grid[image], padding_mode="zeros", align_corners=False)
                )
        stacked = torch.stack(samples, -2)  # [b*h, d, q, m*l, p]
        shares = weight.transpose(1, 2).flatten(3, 4).flatten(0, 1).unsqueeze(1)
        attended = (stacked * shares).flatten(-2).sum(-1)  # [b*h, d, q]
        return attended.unflatten(0, (b, h)).permute(0, 3, 1, 2)


def as_published(model: MMInterleaved) -> MMInterleaved:
    """Replace every MMFS of `model`, in place, by the published computation; returns `model`."""
    for block in (*model.llm.mmfs_layers, *model.image_decoder.unet.look_back):
        if isinstance(block.mmfs, Mmfs):
            block.mmfs = PublishedMmfs(block.mmfs)
    return model
