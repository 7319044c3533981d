"""Small models with random weights for the export tests: both readings, nothing at zero."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.presets import tiny
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.model_folder import TOKENIZER, save_model


def paper_reading() -> ModelConfig:
    """The tiny preset with fewer layers and 32 px images, so that an export takes seconds."""
    config = tiny()
    decoder = config.image_decoder
    return replace(
        config,
        name="paper_reading",
        vision=replace(config.vision, image_size=32, position_grid=4, layers=1, interactions=1),
        vision_resampler=replace(config.vision_resampler, queries=4, layers=1),
        llama=replace(config.llama, layers=2, mmfs_every=1, context=64),
        image_decoder=replace(
            decoder,
            resampler=replace(decoder.resampler, queries=6, layers=1),
            unet=replace(
                decoder.unet,
                latent_side=8,
                block_widths=(32, 64),
                attention_heads=(1, 2),
                attention_blocks=(False, True),
            ),
        ),
    )


def released_reading() -> ModelConfig:
    """Small configuration in the released checkpoint's reading: Q-Formers, null slots, MMFS on the
    skips, the nearest image only in the U-Net, epsilon; also grouped-query attention."""
    config = paper_reading()
    decoder = config.image_decoder
    return replace(
        config,
        name="released_reading",
        vision_resampler=replace(
            config.vision_resampler, form="qformer", layers=2, cross_every=2, qk_norm=True
        ),
        llama=replace(config.llama, width=256, heads=4, kv_heads=2, mmfs_every=2),
        llm_mmfs=replace(config.llm_mmfs, null_slot=True),
        image_decoder=replace(
            decoder,
            resampler=replace(decoder.resampler, form="qformer", context_width=256),
            unet=replace(decoder.unet, mmfs_at="skips"),
            mmfs=replace(decoder.mmfs, null_slot=True, images_seen=1),
            diffusion=replace(decoder.diffusion, prediction="epsilon"),
        ),
    )


def write_small_model(
    folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32
) -> Path:
    """Model folder of a random model that knows the words of the drawn world."""
    save_model(random_model(config), folder, dtype)
    build_tokenizer().save(str(folder / TOKENIZER))
    return folder


def random_model(config: ModelConfig, seed: int = 0) -> MMInterleaved:
    """A model none of whose parts is silent: what starts at zero (gates, last convolutions, MMFS
    projections) is drawn, and gates are wide open."""
    torch.manual_seed(seed)
    model = MMInterleaved(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        for layer in model.llm.mmfs_layers:
            layer.gate.fill_(0.8)
        for layer in (*model.llm.mmfs_layers, *model.image_decoder.unet.look_back):
            mmfs = layer.mmfs
            mmfs.image_index.weight.normal_()
            mmfs.weight_proj.weight.normal_(std=0.3)
            mmfs.null_value.normal_()
    return model
