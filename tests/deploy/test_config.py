"""A configuration is checked when it is made and when it is read, and derives what graphs need."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mmi_deploy.config import ModelConfig, from_json, read_config, to_json
from mmi_deploy.errors import ConfigError
from mmi_deploy.presets import PRESETS, ablation_3b, paper_13b, released_13b, tiny


@pytest.mark.parametrize("name", PRESETS)
def test_json_and_back_is_the_same(name: str):
    config = PRESETS[name]()
    assert from_json(to_json(config)) == config
    assert json.loads(to_json(config))["name"] == name


def changed(path: str, value: Any) -> str:
    """The JSON of `tiny` with one field changed."""
    document = json.loads(to_json(tiny()))
    *sections, field = path.split(".")
    part = document
    for section in sections:
        part = part[section]
    if value is None:
        del part[field]
    else:
        part[field] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("llama.width", "wide"),
        ("llama.layers", None),
        ("llm_mmfs.levels", [0, "one"]),
        ("image_decoder.unet.mmfs_at", "everywhere"),
        ("image_decoder.diffusion.prediction", "sample"),
        ("vision_resampler.form", "mlp"),
        ("tokens.sep", 7),
    ],
)
def test_a_wrong_field_is_named(path: str, value: Any):
    with pytest.raises(ConfigError) as caught:
        from_json(changed(path, value), "the file")
    assert str(caught.value).startswith(f"the file is not a valid model configuration: {path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("vision.width", 64, "vision width"),
        ("llama.width", 48, "LLM width"),
        ("image_decoder.unet.condition_width", 7, "U-Net condition"),
        ("image_decoder.vae.latent_channels", 8, "latent channels"),
        ("llm_mmfs.images_seen", 50, "table rows"),
        ("image_decoder.mmfs.value_width", 7, "no multiple of its"),
    ],
)
def test_parts_that_do_not_fit_are_refused(path: str, value: Any, what: str):
    with pytest.raises(ConfigError, match=what):
        from_json(changed(path, value))


def test_a_configuration_cannot_be_changed_or_made_wrong():
    config = tiny()
    with pytest.raises(FrozenInstanceError):
        config.name = "mine"
    with pytest.raises(ValidationError):
        replace(config, llama=replace(config.llama, width=7))


def test_no_json_and_no_file_are_readable_errors(tmp_path: Path):
    with pytest.raises(ConfigError, match="not a valid model configuration"):
        from_json("{")
    with pytest.raises(ConfigError, match="cannot read .*config.json.*give a model folder"):
        read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(to_json(tiny()))
    assert read_config(tmp_path / "config.json") == tiny()


def with_input(config: ModelConfig, image_size: int) -> ModelConfig:
    return replace(config, vision=replace(config.vision, image_size=image_size))


def test_feature_maps_at_224_and_448_pixels():
    """Strides 1/4, 1/2, 1 and 2 of CLIP's patch grid, as published."""
    assert released_13b().vision.level_sides == (64, 32, 16, 8)
    assert with_input(released_13b(), 448).vision.level_sides == (128, 64, 32, 16)
    assert released_13b().vision.grid == 16


def test_mmfs_looks_from_the_skips_and_the_middle_as_released():
    """On the 12 skip connections, in the order in which they are made, then in the middle."""
    unet = released_13b().image_decoder.unet
    channels = [320] * 4 + [640] * 3 + [1280] * 5 + [1280]
    sides = [64, 64, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8, 8]
    assert unet.mmfs_maps == tuple(zip(channels, sides, strict=True))


def test_mmfs_looks_after_the_up_blocks_as_in_the_paper():
    """Sec. 3.2. Each up block but the last ends in an up-sampling: its map is twice as wide."""
    unet = paper_13b().image_decoder.unet
    assert unet.mmfs_maps == ((1280, 16), (1280, 32), (640, 64), (320, 64))
    assert [side for _, side in ablation_3b().image_decoder.unet.mmfs_maps] == [8, 16, 32, 32]


def test_llm_layers_that_look_back():
    """Every fourth of forty, beginning with the first."""
    assert released_13b().llama.mmfs_layers == (0, 4, 8, 12, 16, 20, 24, 28, 32, 36)


def test_derived_widths_and_sizes():
    released = released_13b()
    assert released.llama.head_width == 128
    assert released.llm_mmfs.head_width == 64
    assert released.visual_tokens == 64
    assert released.image_decoder.vae.factor == 8
    assert released.image_decoder.image_size == 512
    assert len(released.image_decoder.unet.resnet_widths) == 22
    assert len(released.image_decoder.unet.cross_attention_widths) == 16
    tiny_decoder = tiny().image_decoder
    assert tiny_decoder.image_size == tiny_decoder.unet.latent_side * tiny_decoder.vae.factor == 64
