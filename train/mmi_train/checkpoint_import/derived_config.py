"""Configuration of a new model: the sizes of its parts, in the form of a preset.

The preset (`form`) decides how what is new is built: the published model's way (Q-Formers, null
slots, MMFS on the skip connections) or the paper's. A part that is not given is new and small, with
the sizes of the preset `tiny`.
"""

from __future__ import annotations

from dataclasses import replace

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import (
    ImageDecoderConfig,
    LlamaConfig,
    ModelConfig,
    ResamplerConfig,
    TokenConfig,
    VisionConfig,
)
from mmi_deploy.spec.presets import tiny
from mmi_train.checkpoint_import.parts import DiffusionPart, Parts, VisionPart

# Channels per head of MMFS and of the resamplers, as in the published model.
HEAD_WIDTH = 64


def derive_config(
    name: str, parts: Parts, form: ModelConfig, tokens: TokenConfig, vocab: int
) -> ModelConfig:
    """The configuration with the sizes of `parts` in the form of `form`; raises `ConfigError`.

    vocab: rows of the embedding, new tokens included.
    """
    llm = parts.llm
    context = llm.context if parts.context is None else parts.context
    if llm.window is not None and context > llm.window:
        raise ConfigError(
            f"{llm.source}: our blocks do not have sliding_window, and see all tokens",
            expected=f"at most the {llm.window} tokens of its window",
            got=context,
            fix=f"give --context {llm.window} or less, where both are the same",
        )
    if context > llm.context:
        raise ConfigError(
            f"{llm.source} was not trained for {context} tokens",
            expected=f"at most {llm.context}",
            fix="give a smaller --context",
        )
    vision = _vision(parts.vision)
    heads = _heads(vision.width)
    mmfs = replace(form.llm_mmfs, heads=heads, value_width=vision.width, base_grid=vision.grid)
    if parts.vision is None:
        small = tiny().llm_mmfs
        mmfs = replace(mmfs, points=small.points, levels=small.levels, base_grid=small.base_grid)
    return ModelConfig(
        name=name,
        tokens=tokens,
        vision=vision,
        vision_resampler=_resampler(
            form.vision_resampler,
            tiny().vision_resampler if parts.vision is None else None,
            vision.width,
        ),
        llama=LlamaConfig(
            vocab=vocab,
            width=llm.width,
            layers=llm.layers,
            heads=llm.heads,
            kv_heads=llm.kv_heads,
            mlp_width=llm.mlp_width,
            context=context,
            mmfs_every=form.llama.mmfs_every,
            eps=llm.eps,
            rope_theta=llm.rope_theta,
            channels_per_head=llm.channels_per_head,
            qkv_bias=llm.qkv_bias,
            qk_norm=llm.qk_norm,
            rope_divisors=llm.rope_divisors,
            layers_without_rope=llm.layers_without_rope,
        ),
        llm_mmfs=mmfs,
        image_decoder=_image_decoder(parts.diffusion, form.image_decoder, vision, llm.width),
    )


def _heads(width: int) -> int:
    return max(1, width // HEAD_WIDTH)


def _vision(part: VisionPart | None) -> VisionConfig:
    if part is None:
        small = tiny().vision
        return replace(small, pixel_mean=VisionConfig.pixel_mean, pixel_std=VisionConfig.pixel_std)
    return VisionConfig(
        image_size=part.image_size,
        patch_size=part.patch_size,
        width=part.width,
        layers=part.layers,
        heads=part.heads,
        mlp_width=part.mlp_width,
        adapter_heads=part.heads,
        activation="gelu" if part.activation == "gelu" else "quick_gelu",
        eps=part.eps,
        pixel_mean=part.pixel_mean,
        pixel_std=part.pixel_std,
        position_grid=part.image_size // part.patch_size,
    )


def _resampler(
    form: ResamplerConfig, small: ResamplerConfig | None, context: int, width: int | None = None
) -> ResamplerConfig:
    """A resampler of the form of `form`, with the sizes of `small` if it is not None.

    context: width of the tokens that it attends to. width: of its queries; None: as in the sizes.
    """
    sizes = form if small is None else small
    width = sizes.width if width is None else width
    return replace(
        form,
        queries=sizes.queries,
        width=width,
        context_width=context,
        layers=sizes.layers,
        heads=_heads(width),
        mlp_width=sizes.mlp_width,
    )


def _image_decoder(
    part: DiffusionPart | None, form: ImageDecoderConfig, vision: VisionConfig, llm_width: int
) -> ImageDecoderConfig:
    small = tiny().image_decoder
    mmfs = replace(form.mmfs, heads=_heads(vision.width), value_width=vision.width)
    if part is None:
        return ImageDecoderConfig(
            resampler=_resampler(form.resampler, small.resampler, llm_width),
            unet=replace(small.unet, mmfs_at=form.unet.mmfs_at),
            mmfs=replace(mmfs, points=small.mmfs.points, levels=small.mmfs.levels),
            vae=small.vae,
            diffusion=small.diffusion,
        )
    resampler = _resampler(form.resampler, None, llm_width, part.unet.condition_width)
    if part.null_condition is not None:
        resampler = replace(resampler, queries=part.null_condition.shape[1])
    return ImageDecoderConfig(
        resampler=resampler, unet=part.unet, mmfs=mmfs, vae=part.vae, diffusion=part.diffusion
    )
