"""The presets have the sizes of what they name. Models are built on the meta device."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import Limits, graphs
from mmi_deploy.spec.presets import PRESETS, preset
from mmi_train.model.mm_interleaved import MMInterleaved

MILLION = 1e6

# The first pattern that a parameter's name begins with says which part it belongs to.
PARTS = {
    "LLM MMFS": r"llm\..*look_back\.",
    "LLM body": r"llm\.",
    "CLIP": r"vision\.encoder\.(embeddings|pre_norm|layers)\.",
    "ViT-Adapter": r"vision\.encoder\.",
    "visual resampler": r"vision\.resampler\.",
    "visual projection": r"vision\.output_proj\.",
    "position projection": r"vision\.position_proj\.",
    "LM head": r"head\.head\.",
    "new head": r"head\.head_new\.",
    "image resampler": r"image_decoder\.resampler\.",
    "context projection": r"image_decoder\.context_proj\.",
    "U-Net MMFS": r"image_decoder\.unet\.look_back\.",
    "U-Net": r"image_decoder\.unet\.",
    "VAE": r"image_decoder\.vae\.",
    "null condition": r"image_decoder\.null_condition",
    "rest": r"",
}

# Million parameters of the published model.
RELEASED = {
    "LLM body": 12852,
    "LLM MMFS": 363.0,
    "CLIP": 303.2,
    "ViT-Adapter": 23.2,
    "visual resampler": 101.7,
    "visual projection": 3.9,
    "position projection": 1.05,
    "LM head": 163.9,
    "new head": 0.01,
    "image resampler": 23.2,
    "context projection": 26.2,
    "U-Net": 865.9,
    "U-Net MMFS": 57.0,
    "VAE": 83.7,
    "null condition": 0.08,
}


@cache
def build(name: str) -> MMInterleaved:
    with torch.device("meta"):
        return MMInterleaved(preset(name))


@cache
def sizes(name: str) -> dict[str, int]:
    """Parameters of each part of a preset."""
    found = dict.fromkeys(PARTS, 0)
    for parameter, tensor in build(name).named_parameters():
        part = next(part for part, pattern in PARTS.items() if re.match(pattern, parameter))
        found[part] += tensor.numel()
    return found


@pytest.mark.parametrize("part", RELEASED)
def test_released_parts_have_their_published_sizes(part: str):
    digits = len(str(RELEASED[part]).partition(".")[2])
    assert round(sizes("released_13b")[part] / MILLION, digits) == RELEASED[part]


def test_the_released_model_has_14_913_billion_parameters():
    """With the sin/cos tables, which the published model stores as parameters and ours derives."""
    released = build("released_13b")
    buffers = dict(released.named_buffers())
    tables = [tensor.numel() for name, tensor in buffers.items() if name.endswith(".table")]
    assert len(tables) == 13
    assert round(sum(tables) / MILLION, 1) == 44.6
    derived = sum(tables) + buffers["vision.position_table"].numel()
    total = sum(sizes("released_13b").values()) + derived
    assert round(total / 1e9, 3) == 14.913


def test_the_paper_reading_differs_where_it_says():
    """Same bodies; other resamplers, no null slot, MMFS after the four up blocks alone."""
    paper, released = sizes("paper_13b"), sizes("released_13b")
    same = {"LLM body", "CLIP", "ViT-Adapter", "U-Net", "VAE", "LM head", "context projection"}
    assert {part for part in PARTS if paper[part] == released[part]} >= same
    config, own = preset("released_13b"), preset("paper_13b")
    dead = config.llm_mmfs.heads * len(config.llm_mmfs.levels) * (config.llama.width + 1)
    null = config.llm_mmfs.value_width
    layers = len(own.llama.mmfs_layers)
    assert released["LLM MMFS"] - paper["LLM MMFS"] == layers * (dead + null)
    blocks = {
        int(name.split(".")[3]) for name in names("paper_13b", "image_decoder.unet.look_back")
    }
    assert blocks == set(range(4))
    assert len(own.image_decoder.unet.mmfs_maps) == 4


def names(name: str, prefix: str) -> list[str]:
    return [key for key, _ in build(name).named_parameters() if key.startswith(prefix)]


def test_the_ablation_stands_on_open_llama_3b_and_stable_diffusion_1():
    """Both published: OpenLLaMA-3B has 3 426 473 600 parameters (32 000 words, no bias),
    the U-Net 859 520 964, the VAE 83 653 863."""
    found, width = sizes("ablation_3b"), preset("ablation_3b").llama.width
    two_new_words, head = 2 * width, 32000 * width
    assert found["LLM body"] - two_new_words + head == 3_426_473_600
    assert found["U-Net"] == 859_520_964
    assert found["VAE"] == 83_653_863
    assert preset("ablation_3b").visual_tokens == 32
    assert preset("ablation_3b").image_decoder.image_size == 256


def test_tiny_is_tiny():
    assert sum(sizes("tiny").values()) < 12 * MILLION


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_models_and_graphs(name: str):
    """Derived values of a configuration are those of its model; all its graphs can be declared."""
    config, model = preset(name), build(name)
    assert config.name == name
    looking = [index for index, block in enumerate(model.llm.layers) if block.look_back is not None]
    assert tuple(looking) == config.llama.mmfs_layers
    unet = config.image_decoder.unet
    resnets = model.image_decoder.unet.resnets()
    assert tuple(resnet.out_channels for resnet in resnets) == unet.resnet_widths
    attentions = [
        block.attn2.to_k.out_features
        for transformer in model.image_decoder.unet.transformers()
        for block in transformer.transformer_blocks
    ]
    assert tuple(attentions) == unet.cross_attention_widths
    assert len(model.image_decoder.unet.look_back) == unet.mmfs_blocks
    assert reads_all_images(config)
    declared = graphs(config, Limits(context=config.llama.context))
    assert len(declared["denoise_step"].names("unet_value")) == unet.mmfs_blocks


def reads_all_images(config: ModelConfig) -> bool:
    """Every row of the position tables but that of hidden images belongs to an image."""
    released_draws = config.name == "released_13b"  # has ten rows and looks at one image
    decoder = config.image_decoder.mmfs
    seen = decoder.images_seen == (1 if released_draws else decoder.images - 1)
    return seen and config.llm_mmfs.images_seen == config.llm_mmfs.images - 1


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="no preset 'huge'.*tiny, ablation_3b, paper_13b"):
        preset("huge")
