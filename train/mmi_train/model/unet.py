"""Stable Diffusion's U-Net with deformable multi-image attention (paper Sec. 3.2, Fig. 3).

The layers are those of diffusers' `UNet2DConditionModel`, under the same names. The forward pass is
our own, in factored form: deployment calls `step` many times, so what depends only on the timestep
(`time_rows`), only on the condition (`condition_keys_values`) or only on the images
(`image_values`) is computed apart from it.

Letters: b batch, y condition tokens, q queries, m image slots, n encoded images, s feature cells,
h heads, d channels per head, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmi_deploy.spec.config import MmfsConfig, UnetConfig
from mmi_train.model.attention import attend, join_heads, split_heads
from mmi_train.model.group_norm import with_exact_group_norms
from mmi_train.model.mmfs import Mmfs, take_levels
from mmi_train.model.positions import cell_centres, resize_table, table_2d

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepInputs:
    """Precomputed inputs of one step, each under the layer that takes it.

    `time_row`: the time projection [b|1, c] of a ResNet. `key_value`: the condition's key and value
    [b, y, c] of a transformer. `value`: the image values [n, s, h, d] of an MMFS block; empty
    leaves MMFS out. `image_slot` and `image_position` [b, m], `seeing`: as in `UNet.step`.
    """

    time_row: Mapping[nn.Module, Tensor]
    key_value: Mapping[nn.Module, KeyValue]
    value: Mapping[nn.Module, Tensor]
    image_slot: Tensor | None
    image_position: Tensor | None
    seeing: Tensor | None = None


class UNet(nn.Module):
    """Noisy latents, a timestep, condition tokens and image features to a prediction.

    `feature_width`, `level_sides`: channels and sides of the encoder's four maps.
    """

    def __init__(
        self, config: UnetConfig, mmfs: MmfsConfig, feature_width: int, level_sides: Sequence[int]
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        model = with_exact_group_norms(diffusers_unet(config))
        self.time_proj = model.time_proj
        self.time_embedding = model.time_embedding
        self.conv_in = model.conv_in
        self.down_blocks = model.down_blocks
        self.mid_block = model.mid_block
        self.up_blocks = model.up_blocks
        self.conv_norm_out = model.conv_norm_out
        self.conv_out = model.conv_out
        self.look_back = nn.ModuleList(
            MmfsBlock(mmfs, channels, side, config.latent_side, feature_width, level_sides)
            for channels, side in config.mmfs_maps
        )
        self._level_sides, self._levels = tuple(level_sides), mmfs.levels

    def time_rows(self, timestep: Tensor) -> Tensor:
        """Timesteps [b] to the time projections of all ResNets, in running order:
        [b, sum of widths]."""
        frequencies = self.time_proj(timestep).to(self.conv_in.weight.dtype)
        embedding = F.silu(self.time_embedding(frequencies))  # [b, c]
        return torch.cat([resnet.time_emb_proj(embedding) for resnet in self.resnets()], dim=1)

    def condition_keys_values(self, condition: Tensor) -> list[KeyValue]:
        """Condition tokens [b, y, c] to key and value [b, y, width] of every cross-attention, in
        running order."""
        return [
            (block.attn2.to_k(condition), block.attn2.to_v(condition))
            for transformer in self.transformers()
            for block in transformer.transformer_blocks
        ]

    def image_values(self, features: Tensor) -> list[Tensor]:
        """Features [n, s, c] of all levels to the values [n, s, h, d] of every MMFS block, s the
        cells of its own levels."""
        features = take_levels(features, self._level_sides, self._levels)
        return [self._run(cast(MmfsBlock, block).values, features) for block in self.look_back]

    def step(
        self,
        latents: Tensor,
        time_rows: Tensor,
        keys_values: Sequence[KeyValue],
        values: Sequence[Tensor] | None,
        image_slot: Tensor | None = None,
        image_position: Tensor | None = None,
        seeing: Tensor | None = None,
    ) -> Tensor:
        """One prediction from latents [b, c, side, side] and the three kinds of precomputed inputs.

        `time_rows` [b|1, sum of widths]. `image_slot` [b, m]: rows of the pool in `values`;
        `image_position` [b, m]: 0 hidden, 1 the nearest image; `seeing`: rows that see any, so
        that MMFS runs on no others (None: on all). `values` None leaves MMFS out.
        """
        return self.step_and_deep(
            latents, time_rows, keys_values, values, image_slot, image_position, seeing
        )[0]

    def step_and_deep(
        self,
        latents: Tensor,
        time_rows: Tensor,
        keys_values: Sequence[KeyValue],
        values: Sequence[Tensor] | None,
        image_slot: Tensor | None = None,
        image_position: Tensor | None = None,
        seeing: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`step`, and the deep features: the input of its last up block, without the skips.

        Deep features change little from step to step (DeepCache, Ma et al., CVPR 2024), so that
        `shallow_step` may reuse them.
        """
        inputs = StepInputs(
            self._by_resnet(time_rows),
            dict(zip(self.transformers(), keys_values, strict=True)),
            {} if values is None else dict(zip(self.look_back, values, strict=True)),
            image_slot,
            image_position,
            seeing,
        )
        skips = self._outer_skips(latents, inputs)
        x = skips[-1]  # [b, c, side, side]
        for above, block in pairwise(self.down_blocks):
            for downsample in above.downsamplers:
                x = downsample(x)
                skips.append(x)
            for resnet, transformer in _layers(block):
                x = self._layer(x, resnet, transformer, inputs)
                skips.append(x)

        first, last = self.mid_block.resnets
        x = self._layer(x, first, self.mid_block.attentions[0], inputs)
        x = self._layer(x, last, None, inputs)
        if self.config.mmfs_at == "skips":  # a block for each skip, the last for the middle block
            *of_skips, of_middle = self.look_back
            skips = [
                self._add_mmfs(block, skip, inputs)
                for block, skip in zip(of_skips, skips, strict=True)
            ]
            x = self._add_mmfs(of_middle, x, inputs)

        for index, block in enumerate(list(self.up_blocks)[:-1]):
            x = self._up(x, block, skips, inputs)
            for upsample in block.upsamplers or ():
                x = upsample(x)
            if self.config.mmfs_at == "up_blocks":
                x = self._add_mmfs(self.look_back[index], x, inputs)
        return self._outer_up(x, skips, inputs), x

    def shallow_step(
        self,
        latents: Tensor,
        deep: Tensor,
        time_rows: Tensor,
        keys_values: Sequence[KeyValue],
        values: Sequence[Tensor] | None,
        image_slot: Tensor | None = None,
        image_position: Tensor | None = None,
    ) -> Tensor:
        """`step` with the deep features [b, c, side, side] of an earlier step: runs the first down
        block and the last up block alone. `keys_values` and `values`: those of
        `config.outer_cross_attentions` and `config.outer_mmfs_blocks`.
        """
        transformers = list(self.transformers())
        outer = [transformers[index] for index in self.config.outer_cross_attentions]
        blocks = [self.look_back[index] for index in self.config.outer_mmfs_blocks]
        inputs = StepInputs(
            self._by_resnet(time_rows),
            dict(zip(outer, keys_values, strict=True)),
            {} if values is None else dict(zip(blocks, values, strict=True)),
            image_slot,
            image_position,
        )
        skips = self._outer_skips(latents, inputs)
        if self.config.mmfs_at == "skips":
            skips = [
                self._add_mmfs(block, skip, inputs)
                for block, skip in zip(blocks, skips, strict=True)
            ]
        return self._outer_up(deep, skips, inputs)

    def _by_resnet(self, time_rows: Tensor) -> dict[nn.Module, Tensor]:
        """`time_rows` [b|1, sum of widths] split into the time projection of each ResNet."""
        rows = time_rows.split(self.config.resnet_widths, dim=1)
        return dict(zip(self.resnets(), rows, strict=True))

    def _outer_skips(self, latents: Tensor, inputs: StepInputs) -> list[Tensor]:
        """Maps of the latents' own side on the way down: all skips of the last up block."""
        skips = [self.conv_in(latents)]
        for resnet, transformer in _layers(self.down_blocks[0]):
            skips.append(self._layer(skips[-1], resnet, transformer, inputs))
        return skips

    def _outer_up(self, x: Tensor, skips: list[Tensor], inputs: StepInputs) -> Tensor:
        """The last up block and the output convolution."""
        x = self._up(x, self.up_blocks[-1], skips, inputs)
        if self.config.mmfs_at == "up_blocks":
            x = self._add_mmfs(self.look_back[-1], x, inputs)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _up(self, x: Tensor, block: nn.Module, skips: list[Tensor], inputs: StepInputs) -> Tensor:
        """The layers of an up block; each takes the newest skip off the list and joins it."""
        for resnet, transformer in _layers(block):
            x = torch.cat([x, skips.pop()], dim=1)
            x = self._layer(x, resnet, transformer, inputs)
        return x

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        condition: Tensor,
        features: Tensor | None = None,
        image_slot: Tensor | None = None,
        image_position: Tensor | None = None,
        seeing: Tensor | None = None,
    ) -> Tensor:
        """Predict in one call: latents [b, c, side, side], timestep [b], condition [b, y, c],
        features [n, s, c] of all levels (None leaves MMFS out) -> [b, c, side, side]."""
        values = None if features is None else self.image_values(features)
        keys_values = self.condition_keys_values(condition)
        return self.step(
            latents,
            self.time_rows(timestep),
            keys_values,
            values,
            image_slot,
            image_position,
            seeing,
        )

    def resnets(self) -> Iterator[ResnetBlock2D]:
        """Every ResNet, in running order."""
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            yield from block.resnets

    def transformers(self) -> Iterator[Transformer2DModel]:
        """Every transformer, in running order."""
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            yield from getattr(block, "attentions", ())

    def _layer(
        self,
        x: Tensor,
        resnet: ResnetBlock2D,
        transformer: Transformer2DModel | None,
        inputs: StepInputs,
    ) -> Tensor:
        pair = None if transformer is None else inputs.key_value[transformer]
        return self._run(_run_layer, x, resnet, inputs.time_row[resnet], transformer, pair)

    def _add_mmfs(self, block: nn.Module, x: Tensor, inputs: StepInputs) -> Tensor:
        """MMFS on the map x [b, c, side, side]; without image values, x as it is."""
        if not inputs.value:
            return x
        assert inputs.image_slot is not None and inputs.image_position is not None
        seeing = () if inputs.seeing is None else (inputs.seeing,)  # exported blocks take none
        return self._run(
            block, x, inputs.value[block], inputs.image_slot, inputs.image_position, *seeing
        )

    def _run(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Call a function, which keeps only its arguments for the backward pass if gradients are
        checkpointed."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


class MmfsBlock(nn.Module):
    """MMFS on one map of the U-Net: every cell attends to the images before the picture.

    The published block, used at either placement: LayerNorm, position table, MMFS, a 1x1
    convolution that starts at zero, residual. The table is made for the U-Net's finest map and
    resized to this one.
    """

    def __init__(
        self,
        mmfs: MmfsConfig,
        channels: int,
        side: int,
        finest_side: int,
        feature_width: int,
        level_sides: Sequence[int],
    ) -> None:
        super().__init__()
        sides = [level_sides[level] for level in mmfs.levels]
        base_grid = mmfs.grid_scale * side if mmfs.base_grid is None else mmfs.base_grid
        self.query_norm = nn.LayerNorm(channels, eps=1e-6)
        self.value_norm = nn.LayerNorm(feature_width, eps=1e-6)
        self.mmfs = Mmfs(mmfs, channels, feature_width, channels, sides, base_grid)
        self.conv = nn.Conv2d(channels, channels, 1)
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)
        table = table_2d(finest_side, channels)
        self.register_buffer("table", table, persistent=False)  # published checkpoints hold it
        self.register_buffer("positions", resize_table(table, side), persistent=False)  # [q, c]
        self.register_buffer("reference", cell_centres(side), persistent=False)  # [q, 2]

    def values(self, features: Tensor) -> Tensor:
        """Features [n, s, c] of this block's levels -> values [n, s, h, d]."""
        return self.mmfs.values(self.value_norm(features))

    def forward(
        self,
        x: Tensor,
        value: Tensor,
        image_slot: Tensor,
        image_position: Tensor,
        seeing: Tensor | None = None,
    ) -> Tensor:
        """x [b, c, side, side], value [n, s, h, d], image_slot and image_position [b, m], seeing:
        rows that see any image -> [b, c, side, side]."""
        query = self.query_norm(_cells(x)) + self.positions  # [b, q, c]
        position = image_position[:, None]
        if seeing is None:
            seen = self.mmfs(query, value, image_slot, position, self.reference)
        else:
            # A picture that sees no image gets the null value in every cell: training batches are
            # full of such pictures.
            seen = self.mmfs.output_proj(self.mmfs.null_value).expand(query.shape)
            if len(seeing):
                found = self.mmfs(
                    query[seeing], value, image_slot[seeing], position[seeing], self.reference
                )
                seen = seen.index_copy(0, seeing, found.to(seen.dtype))
        return x + self.conv(_map(seen, x))


def diffusers_unet(config: UnetConfig) -> UNet2DConditionModel:
    """Build diffusers' model of the same shape, freshly initialised and without MMFS."""
    down = [
        "CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention_blocks
    ]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in config.attention_blocks]
    return UNet2DConditionModel(
        sample_size=config.latent_side,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.block_widths,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple(down),
        up_block_types=tuple(reversed(up)),
        cross_attention_dim=config.condition_width,
        attention_head_dim=config.attention_heads,  # diffusers' name for the number of heads
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.norm_groups,
    )


def _layers(block: nn.Module) -> Iterator[tuple[ResnetBlock2D, Transformer2DModel | None]]:
    """Each ResNet of a down or up block with the transformer behind it, if the block has any."""
    resnets = cast(Sequence[ResnetBlock2D], block.resnets)
    transformers = getattr(block, "attentions", None) or [None] * len(resnets)
    return zip(resnets, transformers, strict=True)


def _run_layer(
    x: Tensor,
    resnet: ResnetBlock2D,
    time_row: Tensor,
    transformer: Transformer2DModel | None,
    pair: KeyValue | None,
) -> Tensor:
    """A ResNet with its time projection [b|1, c], then the transformer, if there is one."""
    x = _run_resnet(resnet, x, time_row)
    if transformer is None or pair is None:
        return x
    return _run_transformer(transformer, x, *pair)


def _run_resnet(resnet: ResnetBlock2D, x: Tensor, time_row: Tensor) -> Tensor:
    y = resnet.conv1(F.silu(resnet.norm1(x))) + time_row[:, :, None, None]
    y = resnet.conv2(F.silu(resnet.norm2(y)))
    return y + (x if resnet.conv_shortcut is None else resnet.conv_shortcut(x))


def _run_transformer(
    transformer: Transformer2DModel, x: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Self-attention, cross-attention to precomputed keys and values [b, y, c], feed-forward."""
    linear = transformer.use_linear_projection
    y = transformer.norm(x)
    y = transformer.proj_in(_cells(y)) if linear else _cells(transformer.proj_in(y))  # [b, q, c]
    for block in transformer.transformer_blocks:
        y = _run_transformer_block(block, y, key, value)
    y = _map(transformer.proj_out(y), x) if linear else transformer.proj_out(_map(y, x))
    return x + y


def _run_transformer_block(
    block: BasicTransformerBlock, y: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    normed = block.norm1(y)
    y = y + _run_attention(block.attn1, normed, block.attn1.to_k(normed), block.attn1.to_v(normed))
    y = y + _run_attention(block.attn2, block.norm2(y), key, value)
    return y + block.ff(block.norm3(y))


def _run_attention(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Queries [b, q, c], keys and values [b, y, c] (before the split into heads) -> [b, q, c]."""
    q, k, v = (split_heads(y, attention.heads) for y in (attention.to_q(query), key, value))
    return attention.to_out[0](join_heads(attend(q, k, v)))


def _cells(x: Tensor) -> Tensor:
    """[b, c, side, side] -> [b, q, c], row-major."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _map(y: Tensor, like: Tensor) -> Tensor:
    """[b, q, c] -> [b, c, side, side] with the side of `like`."""
    return y.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)
