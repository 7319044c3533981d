"""Injectors and extractors: attention between CLIP's patches and the pyramid (ViT-Adapter, 3.3).

The pyramid is the token list of the maps of sides 2g, g and g/2.

Letters: n encoded images, q queries, s feature cells, h heads, l levels, p points, c channels,
d channels per head, g patches per side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_train.model.deformable import sample_levels
from mmi_train.model.dense_sampling import prefer_dense, sample_dense
from mmi_train.model.spatial_prior import map_to_tokens, tokens_to_map

EXTRA_EXTRACTORS = 2  # after the last interaction, as in ViT-Adapter


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, Eq. 3), `ratio * width` value channels.

    Offsets are in cells of the level they sample: location = reference + offset / level side.
    """

    def __init__(
        self, width: int, heads: int, points: int, ratio: float, level_sides: Sequence[int]
    ) -> None:
        super().__init__()
        levels, value_width = len(level_sides), int(width * ratio)
        if value_width % heads:
            raise ValueError(f"{value_width} value channels do not divide into {heads} heads")
        self.heads, self.points, self.level_sides = heads, points, tuple(level_sides)
        self.offset_proj = nn.Linear(width, heads * levels * points * 2)
        self.weight_proj = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, value_width)
        self.output_proj = nn.Linear(value_width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as Deformable DETR: head i samples along direction i, point j at j + 1 cells.

        (The published training began with all offsets at zero, as its loader reset these biases.)
        """
        for layer in (self.offset_proj, self.weight_proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # on the unit square
        distance = torch.arange(1, self.points + 1)[:, None]
        ring = direction[:, None, None] * distance  # [h, 1, p, 2]
        with torch.no_grad():
            self.offset_proj.bias.copy_(ring.expand(-1, len(self.level_sides), -1, -1).flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, reference: Tensor, feature: Tensor) -> Tensor:
        """query [n, q, c], reference [q, 2] in [0, 1], feature [n, s, c] -> [n, q, c]"""
        h, levels, p = self.heads, len(self.level_sides), self.points
        value = self.value_proj(feature).unflatten(-1, (h, -1))  # [n, s, h, d]
        offset = (
            self.offset_proj(query).unflatten(-1, (h, levels, p, 2)).float()
        )  # [n, q, h, l, p, 2]
        weight = self.weight_proj(query).unflatten(-1, (h, levels * p)).softmax(-1)
        weight = weight.unflatten(-1, (levels, p))  # [n, q, h, l, p]
        cell = offset.new_tensor([1.0 / side for side in self.level_sides])  # [l]
        location = reference[:, None, None, None] + offset * cell[:, None, None]
        sample = sample_dense if prefer_dense(value, location) else sample_levels
        return self.output_proj(sample(value, self.level_sides, location, weight))


class ConvFeedForward(nn.Module):
    """Linear, depth-wise 3x3 convolution of each level (one kernel for all), GELU, linear."""

    def __init__(self, width: int, hidden: int, level_sides: Sequence[int]) -> None:
        super().__init__()
        self.level_sides = tuple(level_sides)
        self.fc1 = nn.Linear(width, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, width)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, s, c] -> [n, s, c]"""
        levels = self.fc1(x).split([side * side for side in self.level_sides], 1)
        maps = [
            self.conv(tokens_to_map(level, side))
            for level, side in zip(levels, self.level_sides, strict=True)
        ]
        return self.fc2(F.gelu(torch.cat([map_to_tokens(level) for level in maps], 1)))


class Injector(nn.Module):
    """Patch tokens attend to the pyramid; `gamma` starts at 0, so that training starts from
    CLIP."""

    def __init__(
        self, width: int, heads: int, points: int, ratio: float, level_sides: Sequence[int]
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.feature_norm = nn.LayerNorm(width)
        self.attention = DeformableAttention(width, heads, points, ratio, level_sides)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, patches: Tensor, reference: Tensor, pyramid: Tensor) -> Tensor:
        """patches [n, g * g, c], their centres `reference` [g * g, 2], pyramid [n, s, c] ->
        patches [n, g * g, c]."""
        return patches + self.gamma * self.attention(
            self.query_norm(patches), reference, self.feature_norm(pyramid)
        )


class Extractor(nn.Module):
    """The pyramid attends to the patch tokens, then passes a convolutional feed-forward layer."""

    def __init__(
        self,
        width: int,
        heads: int,
        points: int,
        ratio: float,
        hidden: int,
        grid: int,
        level_sides: Sequence[int],
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.feature_norm = nn.LayerNorm(width)
        self.attention = DeformableAttention(width, heads, points, ratio, (grid,))
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = ConvFeedForward(width, hidden, level_sides)

    def forward(self, pyramid: Tensor, reference: Tensor, patches: Tensor) -> Tensor:
        """pyramid [n, s, c], its centres `reference` [s, 2], patches [n, g * g, c] -> pyramid
        [n, s, c]."""
        pyramid = pyramid + self.attention(
            self.query_norm(pyramid), reference, self.feature_norm(patches)
        )
        return pyramid + self.ffn(self.ffn_norm(pyramid))
