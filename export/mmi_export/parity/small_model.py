"""Small model with the structure of a large one; it is proved if the large one cannot run.

A slice keeps every setting that decides which code runs and which graph is exported: both kinds of
every layer, forms of the resamplers, levels, points, grids, head widths of the language model,
images, types. It has fewer layers, heads and channels.
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

# Width of vision, resamplers and conditions: enough for a few heads and for sin/cos tables.
_WIDTH = 128

_HEADS = 2

# Groups of the U-Net's norms. A norm over one channel of a few cells would amplify rounding errors
# more than any norm of a whole model.
_GROUPS = 8


def slice_of(config: ModelConfig) -> ModelConfig:
    """Derive the slice of `config`; parts that are already as small stay as they are."""
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
    """Describe the slice of `config` for receipts: its sizes beside those of the model."""
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
    """Keep enough layers for both kinds, for a second MMFS layer, and for one without rotary
    positions."""
    group = config.heads // config.kv_heads
    heads = group * min(config.kv_heads, _HEADS)
    layers = max([config.mmfs_every, *config.layers_without_rope[:1]]) + 1
    return replace(
        config.cut(min(config.layers, layers)),
        width=heads * (config.width // config.heads),
        heads=heads,
        kv_heads=min(config.kv_heads, _HEADS),
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
