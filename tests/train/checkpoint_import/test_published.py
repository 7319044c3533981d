"""Every tensor of the published checkpoint has one place in our model, and the other way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mmi_deploy.errors import WeightsError
from mmi_deploy.spec.presets import released_13b
from mmi_train.checkpoint_import.misfits import compact
from mmi_train.checkpoint_import.published import DerivedConstant, published_name, rename
from mmi_train.checkpoint_import.state_dict import (
    bare_shape,
    convert_state,
    published_module,
)
from mmi_train.golden import configs
from mmi_train.golden.configs import PUBLISHED, Section
from mmi_train.golden.units import read_unit
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.model.visual_tokenizer import VisualTokenizer

TOKENIZER = {"theirs": "visual_tokenizer.", "ours": "vision."}


@pytest.fixture(scope="module")
def released() -> MMInterleaved:
    """The published model at full size, without memory."""
    with torch.device("meta"):
        return MMInterleaved(released_13b())


@pytest.fixture(scope="module")
def keys(repository: Path) -> dict[str, list[int]]:
    """Names and shapes of the published checkpoint."""
    return json.loads((repository / "tests/golden/release_state_keys.json").read_text())


def test_2659_published_tensors_map_onto_our_parameters_one_to_one(released, keys):
    """All of our tensors are filled, and all of theirs are used."""
    assert len(keys) == 2659
    own, constants = released.state_dict(), dict(released.named_buffers())
    hit: dict[str, str] = {}
    derived = []
    for name, shape in keys.items():
        found = rename(name)
        if isinstance(found, DerivedConstant):
            derived.append(name)
            target = constants[found.buffer]
        else:
            assert found not in hit, f"{name} and {hit[found]} both become {found}"
            hit[found] = name
            target = own[found]
        assert bare_shape(target.shape) == bare_shape(torch.Size(shape)), name
    assert hit.keys() == own.keys()
    kinds = {name.rsplit(".", 1)[-1] for name in derived}
    assert kinds == {"pos_embed", "clip_mean", "clip_std", "position_ids"}
    assert len(derived) == 1 + 2 + 1 + 13  # the tokenizer's, and one table per U-Net block


def test_names_translate_back(keys):
    for name in keys:
        found = rename(name)
        ours = found.buffer if isinstance(found, DerivedConstant) else found
        assert published_name(ours) == name


def test_the_middle_block_comes_after_the_skips():
    theirs = "image_decoder.decoder.mmfs_module.mmfs_mid_block.conv.weight"
    assert rename(theirs) == "image_decoder.unet.look_back.12.conv.weight"
    assert rename(theirs, skips=8) == "image_decoder.unet.look_back.8.conv.weight"
    assert published_name("image_decoder.unet.look_back.8.conv.weight", skips=8) == theirs


def test_unknown_names_are_refused():
    with pytest.raises(WeightsError, match="mm_decoder.layers.0.self_attn.rotary_emb.inv_freq"):
        rename("mm_decoder.layers.0.self_attn.rotary_emb.inv_freq")
    assert published_name("llm.layers.0.nothing") is None


def test_a_checkpoint_of_the_right_shapes_is_taken_whole(released, keys):
    state = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    assert convert_state(released, state).keys() == released.state_dict().keys()


@pytest.fixture(scope="module")
def tokenizer(repository: Path):
    """A published visual tokenizer's state, and how to build the module that takes it."""
    unit = read_unit(repository / "tests/golden/visual_tokenizer_224")
    vision = configs.vision(Section(unit.config).section("clip"), 224, unit.state)
    resampler = configs.qformer(
        Section(unit.config).section("perceiver"), PUBLISHED.vision_resampler, unit.state
    )

    def build() -> nn.Module:
        return VisualTokenizer(vision, resampler, 128)

    return build, dict(unit.state)


def test_loaded_values_are_the_published_ones(tokenizer):
    build, state = tokenizer
    module = published_module(build, state, **TOKENIZER)
    assert torch.equal(module.output_proj.weight, state["proj.weight"])
    layer = module.encoder.interactions[3].extra_extractors[1]
    name = "encoder.vision_model.adapter_interactions.3.extra_extractors.1.ffn.dwconv.dwconv.weight"
    assert torch.equal(layer.ffn.conv.weight, state[name])
    assert not module.training


@pytest.mark.parametrize("lacking", ["proj.bias", "clip_mean", "pos_embed", "pos_ln.weight"])
def test_missing_tensors_are_named_as_published(tokenizer, lacking):
    build, state = tokenizer
    del (state := dict(state))[lacking]
    with pytest.raises(WeightsError, match=f"missing: {lacking}$"):
        published_module(build, state, **TOKENIZER)


def test_every_wrong_tensor_is_named_at_once(tokenizer):
    build, state = tokenizer
    state = dict(state)
    del state["post_ln.weight"], state["post_ln.bias"]
    state["proj.weight"] = state["proj.weight"][:, :-1]
    state["pos_ln.bias"] = torch.full_like(state["pos_ln.bias"], torch.nan)
    state["proj.scale"] = torch.ones(1)
    with pytest.raises(WeightsError) as caught:
        published_module(build, state, **TOKENIZER)
    text = str(caught.value)
    assert "missing: post_ln.weight, post_ln.bias" in text
    assert "unknown: proj.scale" in text
    assert "proj.weight has shape [128, 47], expected [128, 48]" in text
    assert "pos_ln.bias holds NaN or infinity" in text


def test_names_that_differ_in_a_number_are_told_together():
    lines = [f"a.{k}.b.{k}.c" for k in (0, 1)] + [f"x.{k}.y" for k in (7, 3, 4, 5, 0)]
    assert compact([*lines, "z", "x.1.w"]) == [
        "a.0.b.0.c",
        "a.1.b.1.c",
        "x.{0,3-5,7}.y",
        "z",
        "x.1.w",
    ]


def test_a_checkpoint_of_another_model_is_told_in_a_line(tokenizer):
    build, _ = tokenizer
    other = {f"transformer.h.{k}.weight": torch.ones(1) for k in range(500)}
    with pytest.raises(
        WeightsError, match="none of its 500 tensors belongs to this model"
    ) as error:
        convert_state(build(), other, **TOKENIZER)
    assert len(str(error.value)) < 200


def test_names_of_another_part_are_extra(tokenizer):
    build, state = tokenizer
    with pytest.raises(WeightsError, match="unknown: soi_token"):
        convert_state(build(), state | {"soi_token": torch.ones(1, 128)}, **TOKENIZER)


@pytest.mark.parametrize(
    "name", ["pos_embed", "clip_std", "encoder.vision_model.embeddings.position_ids"]
)
def test_derived_constants_are_compared(tokenizer, name):
    """A checkpoint made with other constants must not load silently."""
    build, state = tokenizer
    changed = state[name].clone()
    changed.view(-1)[-1] += 1
    with pytest.raises(WeightsError, match=f"{name} differs"):
        published_module(build, state | {name: changed}, **TOKENIZER)


def test_whole_numbers_do_not_pass_for_weights(tokenizer):
    build, state = tokenizer
    counts = state["proj.bias"].long()
    with pytest.raises(WeightsError, match="proj.bias holds integer numbers, expected floating"):
        published_module(build, state | {"proj.bias": counts}, **TOKENIZER)


POSITIONS = "encoder.vision_model.embeddings.position_embedding.weight"
IDS = "encoder.vision_model.embeddings.position_ids"


def twice_as_large(build):
    """The same visual tokenizer for images of twice the side, without what it is built of."""
    small = build()

    def build_large() -> nn.Module:
        vision = replace(small.config, image_size=2 * small.config.image_size)
        return VisualTokenizer(vision, small.resampler.config, small.output_proj.out_features)

    return small.config.grid, build_large


def test_a_checkpoint_for_224_pixels_loads_at_448(tokenizer):
    """The class token keeps its position, and so do the corners: align_corners=True."""
    build, state = tokenizer
    grid, build_large = twice_as_large(build)
    model = published_module(build_large, state, **TOKENIZER)
    loaded = model.encoder.embeddings.position_embedding.weight
    assert loaded.shape[0] == 1 + (2 * grid) ** 2
    assert torch.equal(loaded[0], state[POSITIONS][0])
    rows, columns = [0, 0, -1, -1], [0, -1, 0, -1]
    large = loaded[1:].reshape(2 * grid, 2 * grid, -1)[rows, columns]
    small = state[POSITIONS][1:].reshape(grid, grid, -1)[rows, columns]
    assert torch.allclose(large, small, atol=1e-6)
    pixels = torch.rand(1, 3, *2 * [model.config.image_size])
    features = model(pixels)
    assert features.tokens.isfinite().all()
    assert [level.shape[-1] for level in features.maps] == [8 * grid, 4 * grid, 2 * grid, grid]


@pytest.mark.parametrize("name", [POSITIONS, IDS])
def test_positions_that_are_no_grid_do_not_load_at_another_size(tokenizer, name):
    build, state = tokenizer
    _, build_large = twice_as_large(build)
    value = state[name][:-1] if name == POSITIONS else state[name].flip(-1)
    with pytest.raises(WeightsError, match=f"{name} (has shape|differs)"):
        published_module(build_large, state | {name: value}, **TOKENIZER)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_derived_constants_may_be_stored_in_half_precision(tokenizer, dtype):
    build, state = tokenizer
    halves = {name: state[name].to(dtype) for name in ("pos_embed", "clip_mean", "clip_std")}
    published_module(build, state | halves, **TOKENIZER)
