"""A small model of the same making as a large one: what is proved where the large one cannot run.

A slice keeps all that decides which code runs and which graph comes out: both kinds of every layer,
forms of the resamplers, levels, points, grids, head widths of the language model, images, types. It
has fewer of what is repeated and less of what is only wide.
"""

from __future__ import annotations

from dataclasses import replace

from mmi_deploy.spec.config import (
    ImageDecoderConfig,
    LlamaConfig,
    MmfsConfig,
    ModelConfig,
    ResamplerConfig,
    UnetConfig,
    VaeConfig,
    VisionConfig,
)

_WIDTH = 128
"""Of vision, resamplers and conditions: room for a few heads, and for sin/cos tables."""

_HEADS = 2

_GROUPS = 8
"""Of the U-Net's norms. Over one channel of a few cells a norm magnifies rounding, as none of a
whole model does."""


def slice_of(config: ModelConfig) -> ModelConfig:
    """The slice of `config`; a model that is no larger than its slice in some part keeps it."""
    vision = _vision(config.vision)
    llama = _llama(config.llama)
    return replace(
        config,
        name=f"{config.name}_slice",
        vision=vision,
        vision_resampler=_resampler(config.vision_resampler, vision.width),
        llama=llama,
        llm_mmfs=_mmfs(config.llm_mmfs),
        image_decoder=_image_decoder(config.image_decoder, llama.width),
    )


def difference(config: ModelConfig) -> str:
    """How the slice differs, in words."""
    small = slice_of(config)
    return (
        f"a slice with random weights ({small.llama.layers} of {config.llama.layers} language "
        f"layers {small.llama.width} of {config.llama.width} wide, {small.vision.layers} of "
        f"{config.vision.layers} vision layers {small.vision.width} of {config.vision.width} wide, "
        f"U-Net {max(small.image_decoder.unet.block_widths)} of "
        f"{max(config.image_decoder.unet.block_widths)} wide)"
    )


def _vision(config: VisionConfig) -> VisionConfig:
    return replace(
        config,
        width=min(config.width, _WIDTH),
        heads=min(config.heads, _HEADS),
        layers=min(config.layers, config.interactions),
        mlp_width=min(config.mlp_width, 2 * _WIDTH),
        prior_width=min(config.prior_width, 16),
        adapter_heads=min(config.adapter_heads, _HEADS),
    )


def _resampler(config: ResamplerConfig, context_width: int) -> ResamplerConfig:
    same = config.context_width == config.width
    width = context_width if same else min(config.width, _WIDTH // 2 * 3)
    return replace(
        config,
        width=width,
        context_width=context_width,
        heads=min(config.heads, _HEADS),
        layers=min(config.layers, config.cross_every),
        mlp_width=min(config.mlp_width, 2 * _WIDTH),
    )


def _llama(config: LlamaConfig) -> LlamaConfig:
    """As many layers as show both kinds, and a second look back at images."""
    group = config.heads // config.kv_heads
    heads = group * min(config.kv_heads, _HEADS)
    return replace(
        config,
        width=heads * config.head_width,
        heads=heads,
        kv_heads=min(config.kv_heads, _HEADS),
        layers=min(config.layers, config.mmfs_every + 1),
        mlp_width=min(config.mlp_width, 2 * _WIDTH),
    )


def _mmfs(config: MmfsConfig) -> MmfsConfig:
    heads = min(config.heads, _HEADS)
    return replace(config, heads=heads, value_width=heads * config.head_width)


def _image_decoder(config: ImageDecoderConfig, llm_width: int) -> ImageDecoderConfig:
    unet = _unet(config.unet)
    resampler = _resampler(config.resampler, llm_width)
    return replace(
        config,
        resampler=replace(resampler, width=unet.condition_width),
        unet=unet,
        mmfs=_mmfs(config.mmfs),
        vae=_vae(config.vae),
    )


def _unet(config: UnetConfig) -> UnetConfig:
    width = max(config.norm_groups, _HEADS * 4)
    widths = tuple(width if index == 0 else 2 * width for index in range(len(config.block_widths)))
    return replace(
        config,
        latent_side=min(config.latent_side, 2 ** len(widths)),
        block_widths=widths,
        layers_per_block=1,
        condition_width=min(config.condition_width, _WIDTH),
        attention_heads=tuple(min(heads, _HEADS) for heads in config.attention_heads),
        norm_groups=min(config.norm_groups, _GROUPS),
    )


def _vae(config: VaeConfig) -> VaeConfig:
    return replace(
        config,
        block_widths=(config.norm_groups,) * len(config.block_widths),
        layers_per_block=1,
    )
