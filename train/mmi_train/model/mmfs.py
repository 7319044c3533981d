"""MMFS, the Multi-image Multi-scale Feature Synchronizer (paper Sec. 3.2, Fig. 4, Eq. 4).

Letters: b batch, q queries, m image slots, l levels, h heads, p points, d channels per head,
n encoded images, s feature cells, c channels, r table rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmi_deploy.spec.config import MmfsConfig
from mmi_train.model.deformable import multi_image_deformable_attention
from mmi_train.model.positions import with_values


def take_levels(features: Tensor, level_sides: Sequence[int], levels: Sequence[int]) -> Tensor:
    """Select levels: features [n,s,c] of all maps, of `level_sides` -> [n,s,c], s the cells of
    `levels`."""
    maps = features.split([side * side for side in level_sides], 1)
    return torch.cat([maps[level] for level in levels], 1)


class Mmfs(nn.Module):
    """MMFS layer: every query samples a few points of each image before it, on all levels.

    `level_sides`: sides of the sampled maps, finest first. `base_grid`: offsets are in cells of a
    grid of this side. `operator`: the computation of Eq. 4 between the projections; training may
    put a fused one in the place of the definition.
    """

    operator: Callable[..., Tensor] = staticmethod(multi_image_deformable_attention)

    def __init__(
        self,
        config: MmfsConfig,
        query_width: int,
        value_width_in: int,
        out_width: int,
        level_sides: Sequence[int],
        base_grid: float,
    ) -> None:
        super().__init__()
        self.config = config
        self.level_sides = tuple(level_sides)
        self.base_grid = float(base_grid)
        heads, points, levels = config.heads, config.points, len(self.level_sides)
        slots = points + 1 if config.null_slot else points  # the last one is unused, see `logits`
        self.query_proj = nn.Linear(query_width, query_width)  # W_q
        self.image_index = nn.Embedding(config.images, query_width)  # PosEmbed
        self.offset_proj = nn.Linear(query_width, heads * points * 2)  # W_p
        self.weight_proj = nn.Linear(query_width, heads * levels * slots)  # W_A
        self.value_proj = nn.Linear(value_width_in, config.value_width)
        self.output_proj = nn.Linear(config.value_width, out_width)
        if config.null_slot:
            self.null_value = nn.Parameter(torch.zeros(config.value_width))
        else:
            with with_values():
                null_value = torch.zeros(config.value_width)
            self.register_buffer("null_value", null_value, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise offsets to random points around the reference, the same for every query."""
        reach = self.config.offset_init
        nn.init.zeros_(self.offset_proj.weight)
        nn.init.uniform_(self.offset_proj.bias, -reach, reach)
        nn.init.trunc_normal_(self.image_index.weight, std=0.02)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.query_proj, self.weight_proj, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)

    def values(self, features: Tensor) -> Tensor:
        """Project the values, which depend on the image alone: normalised features [n,s,c] ->
        [n,s,h,d]."""
        return self.value_proj(features).unflatten(-1, (self.config.heads, -1))

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        image_slot: Tensor,
        image_position: Tensor,
        reference: Tensor,
    ) -> Tensor:
        """Eq. 4: query [b,q,c], value [n,s,h,d] from `values`, image_slot [b,m] (row of `value`),
        image_position [b,q|1,m] (0 hidden, 1 nearest), reference [q|1,2] in [0,1] -> [b,q,c].

        W_p and W_A are linear, so W(W_q f + PosEmbed(m)) is computed as W(W_q f) + W PosEmbed(m):
        no projection is repeated for every image.
        """
        projected = self.query_proj(query)  # [b, q, c]
        attended = self.operator(
            value,
            image_slot,
            self.offsets(self.offset_proj(projected)),
            self.logits(self.weight_proj(projected)),
            self.offsets(nn.functional.linear(self.image_index.weight, self.offset_proj.weight)),
            self.logits(nn.functional.linear(self.image_index.weight, self.weight_proj.weight)),
            image_position,
            reference,
            self.null_value.view(self.config.heads, -1),
            level_heights=self.level_sides,
            level_widths=self.level_sides,
            base_grid=self.base_grid,
            null_slot=self.config.null_slot,
        )
        return self.output_proj(attended)

    def offsets(self, flat: Tensor) -> Tensor:
        """Unflatten outputs of `offset_proj`: [..., h*p*2] -> [..., h, p, 2]."""
        return flat.unflatten(-1, (self.config.heads, self.config.points, 2))

    def logits(self, flat: Tensor) -> Tensor:
        """Unflatten outputs of `weight_proj`: [..., h*l*slots] -> [..., h, l, p].

        The released model also has an output per (head, level) for the null slot, which is unused:
        the logit of that slot is the constant 0.
        """
        shaped = flat.unflatten(-1, (self.config.heads, len(self.level_sides), -1))
        return shaped[..., : self.config.points]
