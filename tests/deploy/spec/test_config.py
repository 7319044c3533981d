"""A configuration is checked when it is made and when it is read, and derives what graphs need."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import ModelConfig, from_json, read_config, to_json
from mmi_deploy.spec.presets import PRESETS, ablation_3b, paper_13b, released_13b, tiny


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
        ("image_decoder.mmfs.value_width", 7, "not a multiple of 2, its number of heads"),
    ],
)
def test_parts_that_do_not_fit_are_refused(path: str, value: Any, what: str):
    with pytest.raises(ConfigError, match=what):
        from_json(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("llama.heads", 0, "llama.heads: Input should be greater than or equal to 1; got 0"),
        ("llama.layers", -2, "llama.layers: .*; got -2"),
        ("vision.patch_size", 0, "vision.patch_size: .*; got 0"),
        ("vision.activation", "relu6", "activation: .*'quick_gelu' or 'gelu'; got 'relu6'"),
        ("vision.pixel_std", [1, 0, 1], "vision.pixel_std.1: .* greater than 0; got 0"),
        ("vision.heads", 3, "vision: width 128 is not a multiple of 3, its number of heads"),
        ("vision.adapter_heads", 3, "vision: the adapter's value width 64 is not a multiple of 3"),
        ("vision_resampler.heads", 5, "vision_resampler: width 128 is not a multiple of 5"),
        ("llama.heads", 5, "llama: width 192 is not a multiple of 5, its number of heads"),
        ("llama.kv_heads", 2, "llama: heads 3 is not a multiple of 2, its kv_heads"),
        ("llama.heads", 64, "llama: heads 64 is not a multiple of 3, its kv_heads"),
        ("llama.channels_per_head", 31, "llama: head width 31 is not a multiple of 2"),
        ("llama.rope_divisors", [1.0], "llama: it has 1 rope_divisors for the 32 frequencies"),
        ("llama.rope_divisors", [1.0] * 31 + [0], r"llama.rope_divisors.31: .* than 0; got 0"),
        ("llama.layers_without_rope", [3, 1], r"layers_without_rope \[3, 1\] are not layers of"),
        ("llama.layers_without_rope", [99], r"layers_without_rope \[99\] are not layers of"),
        ("llama.qk_norm", "rms", "llama.qk_norm: .*; got 'rms'"),
        ("llama.vocab", 4, "tokens: id 4 is beyond the vocabulary, whose 4 ids end at 3"),
        ("tokens.eos", 1, "tokens: two special tokens have the same id"),
        ("tokens.bos", -1, "tokens.bos: .*; got -1"),
        ("llm_mmfs.levels", [], "llm_mmfs.levels: .* at least 1 item"),
        ("llm_mmfs.levels", [0, 4], "llm_mmfs.levels.1: .*; got 4"),
        ("llm_mmfs.levels", [1, 0], r"llm_mmfs: the levels \[1, 0\] are not in order"),
        ("llm_mmfs.base_grid", 0, "llm_mmfs.base_grid: .*; got 0"),
        ("image_decoder.resampler.dropout", 1.0, "dropout: .* less than 1; got 1.0"),
        ("image_decoder.unet.attention_heads", [1, 2], "3 block_widths, 2 attention_heads and 3"),
        ("image_decoder.unet.attention_heads", [1, 5, 2], "block width 96 is not a multiple of 5"),
        ("image_decoder.unet.norm_groups", 7, "block width 64 is not a multiple of 7, its norm_g"),
        ("image_decoder.unet.latent_side", 10, "latent_side 10 is not a multiple of 4"),
        ("image_decoder.vae.norm_groups", 7, "vae: block width 64 is not a multiple of 7"),
        ("image_decoder.vae.scaling_factor", 0, "scaling_factor: .*; got 0"),
        ("image_decoder.diffusion.beta_end", 1.5, "beta_end: .*; got 1.5"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_what_they_are(path: str, value: Any, what: str):
    with pytest.raises(ConfigError, match=what) as caught:
        from_json(changed(path, value))
    assert "\n" not in str(caught.value)
    assert "mmi inspect --preset tiny" in str(caught.value)


def test_tokens_need_a_base_grid():
    document = json.loads(to_json(tiny()))
    document["llm_mmfs"]["base_grid"] = None
    with pytest.raises(ConfigError, match="llm_mmfs.base_grid: tokens have no map of their own"):
        from_json(json.dumps(document))


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


def test_several_tokens_end_a_text_and_configurations_with_one_are_as_before() -> None:
    """LLaMA-3 instruct names three. Checkpoints compare the JSON: one end token adds no field."""
    one = tiny().tokens
    assert one.ends == (one.eos,) and "other_eos" not in to_json(tiny())
    several = replace(tiny(), tokens=replace(one, other_eos=(9, one.bos, one.pad)))
    assert several.tokens.ends == (one.eos, 9, one.bos, one.pad)
    assert json.loads(to_json(several))["tokens"]["other_eos"] == [9, one.bos, one.pad]
    assert from_json(to_json(several)) == several


@pytest.mark.parametrize("other", [(2,), (9, 9), (3,), (4,)])
def test_an_end_token_is_named_once_and_is_no_mark_of_a_picture(other: tuple[int, ...]) -> None:
    document = json.loads(to_json(tiny()))
    document["tokens"]["other_eos"] = other
    with pytest.raises(ConfigError, match="tokens: two special tokens have the same id"):
        from_json(json.dumps(document))


def test_end_tokens_are_within_the_vocabulary() -> None:
    document = json.loads(to_json(tiny()))
    document["tokens"]["other_eos"] = [9, tiny().llama.vocab]
    with pytest.raises(ConfigError, match=f"tokens: id {tiny().llama.vocab} is beyond"):
        from_json(json.dumps(document))


def test_a_plain_llama_is_written_as_before_its_descendants():
    """Checkpoints compare this text; folders from before the fields are read."""
    written = json.loads(to_json(tiny()))["llama"]
    later = {"channels_per_head", "qkv_bias", "qk_norm", "rope_divisors", "layers_without_rope"}
    assert not later & written.keys()
    llama = tiny().llama
    heads = replace(llama, channels_per_head=32, rope_divisors=(2.0,) * 16, qkv_bias=True)
    config = replace(tiny(), llama=replace(heads, layers_without_rope=(0, 1)))
    assert from_json(to_json(config)) == config
    assert config.llama.head_width == 32 and llama.head_width == 64
