"""Presets: named model configurations. Each preset is a function that returns a `ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import (
    DiffusionConfig,
    ImageDecoderConfig,
    LlamaConfig,
    MmfsConfig,
    ModelConfig,
    ResamplerConfig,
    TokenConfig,
    UnetConfig,
    VaeConfig,
    VisionConfig,
)


def tiny() -> ModelConfig:
    """The paper's reading at 64 px, trained from scratch on synthetic scenes; runs anywhere."""
    return ModelConfig(
        name="tiny",
        tokens=TokenConfig(bos=1, eos=2, pad=0, boi=3, image=4),
        vision=VisionConfig(
            image_size=64,
            patch_size=16,
            width=128,
            layers=4,
            heads=2,
            mlp_width=384,
            prior_width=32,
            adapter_heads=4,
            adapter_points=4,
            pixel_mean=(0.5, 0.5, 0.5),
            pixel_std=(0.5, 0.5, 0.5),
            position_grid=4,
        ),
        vision_resampler=ResamplerConfig(
            form="perceiver",
            queries=16,
            width=128,
            context_width=128,
            layers=2,
            heads=2,
            mlp_width=384,
            eps=1e-6,
        ),
        llama=LlamaConfig(
            vocab=112,
            width=192,
            layers=6,
            heads=3,
            kv_heads=3,
            mlp_width=512,
            context=512,
            mmfs_every=2,
        ),
        llm_mmfs=MmfsConfig(
            heads=2,
            points=4,
            value_width=128,
            levels=(0, 1, 2),
            base_grid=8,
            images=50,
            images_seen=49,
            null_slot=False,
            offset_init=3.0,
        ),
        image_decoder=ImageDecoderConfig(
            resampler=ResamplerConfig(
                form="perceiver",
                queries=32,
                width=128,
                context_width=192,
                layers=1,
                heads=2,
                mlp_width=384,
                eps=1e-6,
            ),
            unet=UnetConfig(
                latent_side=16,
                latent_channels=4,
                block_widths=(64, 96, 96),
                layers_per_block=1,
                condition_width=128,
                attention_heads=(1, 2, 2),
                attention_blocks=(False, True, True),
                mmfs_at="up_blocks",
                norm_groups=8,
            ),
            mmfs=MmfsConfig(
                heads=2,
                points=4,
                value_width=128,
                levels=(0, 1, 2, 3),
                base_grid=None,
                images=10,
                images_seen=9,
                null_slot=False,
                offset_init=1.0,
            ),
            vae=VaeConfig(
                block_widths=(64,),
                layers_per_block=1,
                latent_channels=4,
                scaling_factor=1.0,
                norm_groups=8,
                mid_attention=False,
                patch=4,
            ),
            # Stable Diffusion's 0.012 leaves a trace of the picture in the noisiest latents. With
            # flat shapes that trace reveals every colour: the U-Net would learn to copy it from the
            # noise instead of following the condition.
            diffusion=DiffusionConfig(prediction="v_prediction", beta_end=0.03),
        ),
    )


def emoji(vocab: int) -> ModelConfig:
    """`tiny` for emoji: more words, and finer pictures by more channels in latents and U-Net."""
    config = tiny()
    decoder = config.image_decoder
    return replace(
        config,
        name="emoji",
        llama=replace(config.llama, vocab=vocab),
        image_decoder=replace(
            decoder,
            unet=replace(decoder.unet, latent_channels=8, block_widths=(96, 128, 192)),
            vae=replace(decoder.vae, latent_channels=8),
        ),
    )


def _clip_large(image_size: int = 224) -> VisionConfig:
    return VisionConfig(
        image_size=image_size, patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096
    )


def _stable_diffusion_2() -> tuple[UnetConfig, VaeConfig]:
    unet = UnetConfig(
        latent_side=64,
        latent_channels=4,
        block_widths=(320, 640, 1280, 1280),
        layers_per_block=2,
        condition_width=1024,
        attention_heads=(5, 10, 20, 20),
        attention_blocks=(True, True, True, False),
        mmfs_at="skips",
    )
    vae = VaeConfig(
        block_widths=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    return unet, vae


def released_13b() -> ModelConfig:
    """The published checkpoint: CLIP-L/14, Vicuna-13B v1.3, Stable Diffusion 2.1-base."""
    unet, vae = _stable_diffusion_2()
    return ModelConfig(
        name="released_13b",
        tokens=TokenConfig(bos=1, eos=2, pad=31999, boi=32000, image=32001),
        vision=_clip_large(),
        vision_resampler=ResamplerConfig(
            form="qformer",
            queries=64,
            width=768,
            context_width=1024,
            layers=12,
            heads=12,
            mlp_width=3072,
            cross_every=2,
            qk_norm=True,
            dropout=0.1,
        ),
        llama=LlamaConfig(
            vocab=32002,
            width=5120,
            layers=40,
            heads=40,
            kv_heads=40,
            mlp_width=13824,
            context=2048,
            mmfs_every=4,
        ),
        llm_mmfs=MmfsConfig(
            heads=16,
            points=8,
            value_width=1024,
            levels=(1, 2, 3),
            base_grid=16,
            images=50,
            images_seen=49,
            null_slot=True,
            offset_init=3.0,
        ),
        image_decoder=ImageDecoderConfig(
            resampler=ResamplerConfig(
                form="qformer",
                queries=77,
                width=1024,
                context_width=5120,
                layers=1,
                heads=16,
                mlp_width=3072,
            ),
            unet=unet,
            mmfs=MmfsConfig(
                heads=16,
                points=8,
                value_width=1024,
                levels=(0, 1, 2, 3),
                base_grid=None,
                images=10,
                images_seen=1,
                null_slot=True,
                offset_init=1.0,
            ),
            vae=vae,
            diffusion=DiffusionConfig(prediction="epsilon"),
        ),
    )


def paper_13b() -> ModelConfig:
    """The paper's reading at the released sizes (Sec. 3.2, Sec. 4.1 and Table 11)."""
    released = released_13b()
    decoder = released.image_decoder
    return replace(
        released,
        name="paper_13b",
        vision_resampler=replace(
            released.vision_resampler,
            form="perceiver",
            width=1024,
            heads=16,
            mlp_width=4096,
            cross_every=1,
            qk_norm=False,
            dropout=0.0,
            eps=1e-5,
        ),
        llm_mmfs=replace(released.llm_mmfs, null_slot=False),
        image_decoder=replace(
            decoder,
            resampler=replace(decoder.resampler, form="perceiver", mlp_width=4096, eps=1e-5),
            unet=replace(decoder.unet, mmfs_at="up_blocks"),
            mmfs=replace(decoder.mmfs, null_slot=False, images_seen=9),
        ),
    )


def ablation_3b() -> ModelConfig:
    """The paper's ablation model: OpenLLaMA-3B v2, CLIP-L/14, Stable Diffusion 1.x, 256 px out.

    32 visual tokens, one 16x16 level and the nearest image only; widen `llm_mmfs.levels`,
    `image_decoder.mmfs.levels`, and their `images` and `images_seen`, for the multi-scale and
    multi-image rows.
    """
    paper = paper_13b()
    decoder = paper.image_decoder
    return replace(
        paper,
        name="ablation_3b",
        tokens=TokenConfig(bos=1, eos=2, pad=31999, boi=32000, image=32001),
        vision_resampler=replace(paper.vision_resampler, queries=32),
        llama=LlamaConfig(
            vocab=32002,
            width=3200,
            layers=26,
            heads=32,
            kv_heads=32,
            mlp_width=8640,
            context=2048,
            mmfs_every=4,
        ),
        llm_mmfs=replace(paper.llm_mmfs, levels=(2,), images=2, images_seen=1),
        image_decoder=replace(
            decoder,
            resampler=replace(
                decoder.resampler, width=768, heads=12, context_width=3200, mlp_width=3072
            ),
            unet=replace(
                decoder.unet,
                latent_side=32,
                condition_width=768,
                attention_heads=(8, 8, 8, 8),
                linear_projection=False,
            ),
            mmfs=replace(decoder.mmfs, levels=(2,), images=2, images_seen=1),
        ),
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    preset.__name__: preset for preset in (tiny, ablation_3b, paper_13b, released_13b)
}


def preset(name: str) -> ModelConfig:
    """The configuration of the preset `name`; raises `ConfigError` that lists all presets."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}", expected=", ".join(PRESETS))
    return PRESETS[name]()
