"""CLIP's vision transformer with a ViT-Adapter: patch tokens and a pyramid of four feature maps.

Patches are g * g tokens; the pyramid is the token list of the maps of sides 2g, g and g/2.

Letters: n encoded images, s feature cells, c channels, g patches per side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import VisionConfig
from mmi_train.model.attention import CLIP_IMPLEMENTATION
from mmi_train.model.interactions import EXTRA_EXTRACTORS, Extractor, Injector
from mmi_train.model.positions import cell_centres, resize_table, table_2d, with_values
from mmi_train.model.spatial_prior import SpatialPrior, map_to_tokens, resize_map, tokens_to_map


class Interaction(nn.Module):
    """Injector, a group of CLIP layers, extractor; the last interaction has two extractors more."""

    def __init__(self, config: VisionConfig, extra_extractors: int) -> None:
        super().__init__()
        sides = config.level_sides[1:]
        attention = (
            config.width,
            config.adapter_heads,
            config.adapter_points,
            config.adapter_value_ratio,
        )
        hidden = int(config.width * config.adapter_mlp_ratio)
        self.injector = Injector(*attention, sides)
        self.extractor = Extractor(*attention, hidden, config.grid, sides)
        self.extra_extractors = nn.ModuleList(
            Extractor(*attention, hidden, config.grid, sides) for _ in range(extra_extractors)
        )
        self.register_buffer("patch_centres", cell_centres(config.grid), persistent=False)
        self.register_buffer(
            "pyramid_centres", torch.cat([cell_centres(side) for side in sides]), persistent=False
        )

    def forward(
        self, class_token: Tensor, patches: Tensor, pyramid: Tensor, layers: Sequence[nn.Module]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """class_token [n, 1, c], patches [n, g * g, c], pyramid [n, s, c] -> the same three."""
        patches = self.injector(patches, self.patch_centres, pyramid)
        tokens = torch.cat([class_token, patches], 1)
        for layer in layers:
            tokens = layer(tokens, None)
        class_token, patches = tokens[:, :1], tokens[:, 1:]
        for extractor in (self.extractor, *self.extra_extractors):
            pyramid = extractor(pyramid, self.pyramid_centres, patches)
        return class_token, patches, pyramid


class VitAdapter(nn.Module):
    """CLIP without its last norm, with the adapter around it. For another image size, resize CLIP's
    position table with `resize_positions`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if config.image_size % config.patch_size or config.grid % 2:
            raise ConfigError(
                "the image must be an even number of patches wide",
                expected=f"a multiple of {2 * config.patch_size} pixels",
                got=f"{config.image_size} pixels",
            )
        if config.layers % config.interactions:
            raise ConfigError(
                "the vision layers do not divide into its interactions",
                expected=f"a multiple of {config.interactions}",
                got=config.layers,
            )
        clip = CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=config.activation,
            layer_norm_eps=config.eps,
            attn_implementation=CLIP_IMPLEMENTATION,
        )
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = CLIPVisionEmbeddings(clip)
        with with_values():  # the library's own buffer has none on the meta device
            position_ids = torch.arange(1 + config.grid**2)[None]
        self.embeddings.register_buffer("position_ids", position_ids, persistent=False)
        self.pre_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.layers = nn.ModuleList(CLIPEncoderLayer(clip) for _ in range(config.layers))
        self.spatial_prior = SpatialPrior(config.prior_width, config.width)
        self.level_embed = nn.Parameter(torch.zeros(3, config.width))
        last = config.interactions - 1
        self.interactions = nn.ModuleList(
            Interaction(config, EXTRA_EXTRACTORS if index == last else 0)
            for index in range(config.interactions)
        )
        self.upsample = nn.ConvTranspose2d(config.width, config.width, 2, 2)
        self._reset_clip()

    def _reset_clip(self) -> None:
        """Initialise as CLIP, for training from scratch; patch positions start as sin/cos."""
        width, layers = self.config.width, self.config.layers
        nn.init.normal_(self.embeddings.class_embedding, std=width**-0.5)
        with torch.no_grad():
            self.embeddings.position_embedding.weight[1:] = 0.3 * table_2d(self.config.grid, width)
            self.embeddings.position_embedding.weight[0] = 0
        to_residual = width**-0.5 * (2 * layers) ** -0.5
        std = {"out_proj": to_residual, "fc2": to_residual, "fc1": (2 * width) ** -0.5}
        for name, module in self.layers.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std.get(name.split(".")[-1], width**-0.5))
                nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Normalised pixels [n, 3, image_size, image_size] -> tokens [n, 1 + g * g, c], the class
        token first, and four maps [n, c, side, side], finest first."""
        grid = self.config.grid
        tokens = self.pre_norm(self.embeddings(pixels))
        class_token, patches = tokens[:, :1], tokens[:, 1:]

        # The prior halves its input four times to get to the grid of the patches.
        image = resize_map(pixels, 16 * grid)
        image = image.contiguous(memory_format=torch.channels_last)
        c1, *coarser = self.spatial_prior(image)
        # Under autocast the pyramid, by far the longest token list, stays in the convolutions'
        # type.
        embed = self.level_embed.to(c1.dtype)
        pyramid = torch.cat(
            [map_to_tokens(level) + embed[index] for index, level in enumerate(coarser)], 1
        )  # [n, s, c]

        stages: list[Tensor] = []
        group = self.config.layers // self.config.interactions
        for index, interaction in enumerate(self.interactions):
            state = (
                class_token,
                patches,
                pyramid,
                self.layers[index * group : (index + 1) * group],
            )
            if self.gradient_checkpointing and self.training:
                class_token, patches, pyramid = checkpoint(interaction, *state, use_reentrant=False)
            else:
                class_token, patches, pyramid = interaction(*state)
            stages.append(tokens_to_map(patches.to(pyramid.dtype), grid))

        tokens = torch.cat([class_token, patches], 1)  # [n, 1 + g * g, c]
        return tokens, self._maps(c1, pyramid, stages)

    def _maps(
        self, c1: Tensor, pyramid: Tensor, stages: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum the finest map of the prior, the pyramid [n, s, c] and the patch maps [n, c, g, g]
        after each interaction -> four maps [n, c, side, side], finest first."""
        side1, side2, side3, side4 = self.config.level_sides
        levels = pyramid.split([side2 * side2, side3 * side3, side4 * side4], 1)
        c2, c3, c4 = (
            tokens_to_map(level, side)
            for level, side in zip(levels, (side2, side3, side4), strict=True)
        )
        c1 = self.upsample(c2) + c1
        # Each map takes one stage. If there are more or fewer than four stages, they are spaced
        # evenly and the last map takes the last stage.
        x1, x2, x3, x4 = (stages[-(-i * len(stages) // 4) - 1] for i in range(1, 5))
        return (
            c1 + resize_map(x1, side1),
            c2 + resize_map(x2, side2),
            c3 + x3,
            c4 + resize_map(x4, side4),
        )


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Resize CLIP's position table, the row of the class token first, to [1 + grid * grid, c]:
    bicubic with align_corners=True as published, so that corner patches keep their positions."""
    patches = resize_table(table[1:], grid, align_corners=True)
    return torch.cat([table[:1], patches])
