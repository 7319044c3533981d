"""Visual tokenizer: pixels to visual tokens and four feature maps (paper Sec. 3.1).

Letters: n encoded images, v visual tokens, c channels, g patches per side, s feature cells.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmi_deploy.spec.config import ResamplerConfig, VisionConfig
from mmi_train.model.positions import resize_table, table_2d
from mmi_train.model.resampler import Resampler
from mmi_train.model.spatial_prior import map_to_tokens, tokens_to_map
from mmi_train.model.vit_adapter import VitAdapter


class VisualFeatures(NamedTuple):
    """`tokens` [n, v, c] of the LLM's width; `maps`: four [n, c, side, side], finest first."""

    tokens: Tensor
    maps: tuple[Tensor, Tensor, Tensor, Tensor]


def flatten_maps(maps: tuple[Tensor, ...]) -> Tensor:
    """Maps [n, c, side, side], finest first -> features [n, s, c]: by level, row-major in each."""
    return torch.cat([map_to_tokens(level) for level in maps], 1)


class VisualTokenizer(nn.Module):
    """CLIP with a ViT-Adapter, then a resampler to a fixed number of visual tokens.

    The sin/cos position table of a grid of `position_grid` cells, with a row of zeros for the class
    token, is resized (bicubic) to the grid of the patches and of every map.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    position_table: Tensor
    token_positions: Tensor

    def __init__(self, vision: VisionConfig, resampler: ResamplerConfig, out_width: int) -> None:
        super().__init__()
        self.config = vision
        width, grid = vision.width, vision.grid
        self.encoder = VitAdapter(vision)
        self.position_proj = nn.Linear(width, width)
        self.position_norm = nn.LayerNorm(width, eps=1e-6)
        self.post_norm = nn.LayerNorm(width, eps=1e-6)
        self.resampler = Resampler(resampler, _query_start(vision, resampler))
        self.output_proj = nn.Linear(resampler.width, out_width)
        nn.init.xavier_uniform_(self.position_proj.weight)
        nn.init.zeros_(self.position_proj.bias)
        # The resampler ends in a LayerNorm: visual tokens start at the scale of word embeddings.
        nn.init.normal_(self.output_proj.weight, std=0.02 * resampler.width**-0.5)
        nn.init.zeros_(self.output_proj.bias)

        table = table_2d(vision.position_grid, width)
        no_position = torch.from_numpy(np.zeros((1, width), np.float32))  # the class token's
        self._constant("position_table", torch.cat([no_position, table]))
        self._constant(
            "token_positions", torch.cat([no_position, resize_table(table, grid)])
        )  # [1 + g * g, c]
        for index, side in enumerate(vision.level_sides):
            self._constant(
                f"map_positions_{index}", tokens_to_map(resize_table(table, side)[None], side)
            )
        self._constant(
            "pixel_mean",
            torch.from_numpy(np.array(vision.pixel_mean, np.float32).reshape(1, 3, 1, 1)),
        )
        self._constant(
            "pixel_std",
            torch.from_numpy(np.array(vision.pixel_std, np.float32).reshape(1, 3, 1, 1)),
        )

    def _constant(self, name: str, value: Tensor) -> None:
        """Register a buffer that follows from the configuration and is not in checkpoints."""
        self.register_buffer(name, value, persistent=False)

    def forward(self, pixels: Tensor) -> VisualFeatures:
        """Pixels [n, 3, image_size, image_size] in [0, 1] to visual tokens and feature maps."""
        hidden, maps = self.encoder((pixels - self.pixel_mean) / self.pixel_std)
        maps = tuple(
            level + getattr(self, f"map_positions_{index}").to(level.dtype)
            for index, level in enumerate(maps)
        )
        context = self.position_norm(self.position_proj(hidden)) + self.token_positions
        # [n, 1 + g * g, c] -> [n, v, c]
        tokens = self.output_proj(self.resampler(self.post_norm(context)))
        return VisualFeatures(tokens, maps)


def _query_start(vision: VisionConfig, resampler: ResamplerConfig) -> Tensor | None:
    """Initial positions of a perceiver's queries: a grid over the image if they form a square."""
    side = round(resampler.queries**0.5)
    if resampler.form != "perceiver" or side * side != resampler.queries:
        return None
    return table_2d(side, vision.width, cells=vision.position_grid)
