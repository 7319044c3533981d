"""The factored U-Net: against diffusers' own forward pass and the published MMFS blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmi_deploy.spec.config import MmfsConfig, UnetConfig
from mmi_deploy.spec.presets import released_13b, tiny
from mmi_train.checkpoint_import.state_dict import published_module
from mmi_train.golden.configs import Section, unet
from mmi_train.golden.unet import set_base_grids
from mmi_train.model.unet import MmfsBlock, UNet, diffusers_unet

SIDES = (8, 4, 2, 1)
FEATURES = 24
MMFS = MmfsConfig(
    heads=2,
    points=3,
    value_width=16,
    levels=(0, 1, 2, 3),
    base_grid=None,
    images=4,
    images_seen=3,
    null_slot=False,
    offset_init=1.0,
)
SHAPE = UnetConfig(
    latent_side=8,
    latent_channels=4,
    block_widths=(16, 24, 24),
    layers_per_block=1,
    condition_width=20,
    attention_heads=(1, 2, 3),
    attention_blocks=(False, True, True),
    mmfs_at="up_blocks",
    norm_groups=4,
)
SHAPES = {
    "three blocks": SHAPE,
    "convolutions project": replace(SHAPE, linear_projection=False, attention_heads=(2, 2, 4)),
    "published layout": replace(
        SHAPE,
        block_widths=(16, 16, 24, 24),
        attention_heads=(2, 2, 3, 3),
        attention_blocks=(True, True, True, False),
        layers_per_block=2,
        mmfs_at="skips",
    ),
}


def build(config: UnetConfig = SHAPE, mmfs: MmfsConfig = MMFS) -> UNet:
    """A U-Net whose MMFS blocks are awake: their last convolutions start at zero otherwise."""
    torch.manual_seed(0)
    model = UNet(config, mmfs, FEATURES, SIDES)
    for block in model.look_back:
        nn.init.normal_(block.conv.weight, std=0.3)
        nn.init.normal_(block.mmfs.weight_proj.weight, std=0.3)
        nn.init.normal_(block.mmfs.offset_proj.weight, std=0.3)
    return model.eval()


def inputs(config: UnetConfig = SHAPE, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps, condition."""
    generator = torch.Generator().manual_seed(1)
    side = config.latent_side
    return (
        torch.randn(rows, config.latent_channels, side, side, generator=generator),
        torch.tensor([0, 500, 999])[:rows],
        torch.randn(rows, 5, config.condition_width, generator=generator),
    )


def images(count: int = 4) -> Tensor:
    cells = sum(side * side for side in SIDES)
    return torch.randn(count, cells, FEATURES, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", SHAPES)
def test_without_images_it_is_diffusers_unet(name: str) -> None:
    """1e-5 of the greatest entry: fp32 sums in another order."""
    config = SHAPES[name]
    model = build(config)
    theirs = diffusers_unet(config).eval()
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("look_back.")}
    theirs.load_state_dict(own)
    latents, timestep, condition = inputs(config)
    with torch.no_grad():
        expected = theirs(latents, timestep, condition).sample
        got = model(latents, timestep, condition)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", SHAPES)
def test_parts_and_maps_are_as_the_configuration_counts_them(name: str) -> None:
    """Quantities of the deployment contract: widths of time rows and condition keys, MMFS maps."""
    config = SHAPES[name]
    model = build(config)
    latents, timestep, condition = inputs(config)
    assert model.time_rows(timestep).shape == (3, sum(config.resnet_widths))
    widths = [key.shape[2] for key, _ in model.condition_keys_values(condition)]
    assert tuple(widths) == config.cross_attention_widths
    values = model.image_values(images())
    assert len(values) == config.mmfs_blocks
    assert values[0].shape == (4, 85, MMFS.heads, MMFS.head_width)

    maps = []
    for block in model.look_back:
        block.register_forward_hook(lambda _, given, __: maps.append(given[0].shape[1:3]))
    place = torch.zeros(3, 1, dtype=torch.int32)
    model(latents, timestep, condition, images(), place, place)
    assert tuple(tuple(shape) for shape in maps) == config.mmfs_maps


def test_one_time_row_serves_all_pictures_of_a_step() -> None:
    model = build()
    latents, _, condition = inputs()
    pairs = model.condition_keys_values(condition)
    each = model.step(latents, model.time_rows(torch.tensor([7, 7, 7])), pairs, None)
    shared = model.step(latents, model.time_rows(torch.tensor([7])), pairs, None)
    # One row and three rows of a linear layer are summed in different orders.
    torch.testing.assert_close(shared, each, rtol=0, atol=5e-6)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_shallow_step_with_its_own_deep_features_is_the_whole_step(config: UnetConfig) -> None:
    """And with those of other latents it is not: they matter."""
    model = build(config)
    latents, timestep, condition = inputs(config)
    pairs, values = model.condition_keys_values(condition), model.image_values(images())
    slot, position = torch.tensor([[0, 1]] * 3), torch.tensor([[2, 1], [1, 0], [0, 0]])
    rows = model.time_rows(timestep)
    whole, deep = model.step_and_deep(latents, rows, pairs, values, slot, position)
    assert deep.shape == (3, config.deep_width, config.latent_side, config.latent_side)
    outer = (
        [pairs[index] for index in config.outer_cross_attentions],
        [values[index] for index in config.outer_mmfs_blocks],
    )
    shallow = model.shallow_step(latents, deep, rows, *outer, slot, position)
    torch.testing.assert_close(shallow, whole, rtol=0, atol=1e-6)
    stale = model.shallow_step(latents, deep.roll(1, 0), rows, *outer, slot, position)
    assert (stale - whole).abs().max() > 1e-3


def test_an_encoder_at_448_pixels_has_the_published_base_grids() -> None:
    """`grid_scale` says in the configuration what the published code computes from the sides."""
    config, sides = SHAPES["published layout"], (128, 64, 32, 16)
    config = replace(config, latent_side=64)
    made = UNet(config, replace(MMFS, grid_scale=2), FEATURES, sides)
    wanted = [block.mmfs.base_grid for block in made.look_back]
    set_base_grids(made, 512, sides)
    assert [block.mmfs.base_grid for block in made.look_back] == wanted


@pytest.mark.parametrize("place", ["up_blocks", "skips"])
def test_mmfs_blocks_add_nothing_before_training(place: str) -> None:
    """The published blocks end in a 1x1 convolution that starts at zero."""
    model = UNet(replace(SHAPE, mmfs_at=place), MMFS, FEATURES, SIDES).eval()
    given = inputs()
    slot, position = torch.tensor([[0], [1], [2]]), torch.ones(3, 1, dtype=torch.int32)
    looked = model(*given, images(), slot, position)
    torch.testing.assert_close(looked, model(*given), rtol=0, atol=0)


@pytest.mark.parametrize("place", ["up_blocks", "skips"])
def test_a_picture_depends_on_the_images_it_sees_and_on_no_other(place: str) -> None:
    model = build(replace(SHAPE, mmfs_at=place))
    given, features = inputs(), images()
    slot = torch.tensor([[0, 1], [2, 3], [3, 0]])
    position = torch.tensor([[2, 1], [1, 0], [0, 0]])
    before = model(*given, features, slot, position)
    # Image 0 is seen by picture 0 alone, 1 by 0, 2 by 1, and 3 by nobody.
    for image, seers in enumerate([{0}, {0}, {1}, set()]):
        changed = features.clone()
        changed[image] += 1.0
        after = model(*given, changed, slot, position)
        moved = {row for row in range(3) if not torch.equal(after[row], before[row])}
        assert moved == seers, f"image {image}"


def test_order_of_images_is_known_by_position_alone() -> None:
    """The same images in other slots and columns give the same picture; other positions do not."""
    model = build()
    given, features = inputs(), images()
    slot, position = torch.tensor([[0, 1]] * 3), torch.tensor([[2, 1]] * 3)
    expected = model(*given, features, slot, position)
    turned = model(*given, features.flip(0), 3 - slot.flip(1), position.flip(1))
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-5)
    swapped = model(*given, features, slot, position.flip(1))
    assert (swapped - expected).abs().max() > 1e-4


@pytest.mark.parametrize("null_slot", [False, True])
@pytest.mark.parametrize("position", [[[1, 0], [0, 0], [2, 1]], [[0, 0]] * 3])
def test_training_skips_pictures_that_see_nothing_without_changing_anything(
    null_slot: bool, position: list[list[int]]
) -> None:
    model = build(mmfs=replace(MMFS, null_slot=null_slot))
    for block in model.look_back:
        nn.init.normal_(block.mmfs.output_proj.bias)
        nn.init.normal_(block.mmfs.null_value)
        if not null_slot:
            block.mmfs.null_value.zero_()
    slot, outputs, gradients = torch.tensor([[0, 1]] * 3), [], []
    for mode in (True, False):
        model.train(mode).zero_grad()
        output = model(*inputs(), images(), slot, torch.tensor(position))
        output.square().mean().backward()
        outputs.append(output)
        gradients.append([0 * p if p.grad is None else p.grad for p in model.parameters()])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_checkpointing_gives_the_same_gradients() -> None:
    model = build()
    gradients = []
    for switch in (False, True):
        model.gradient_checkpointing = switch
        model.zero_grad()
        model(*inputs()).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_group_norms_stay_in_fp32_under_autocast() -> None:
    model = build()
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    kinds = set()
    for norm in norms:
        norm.register_forward_hook(lambda _, given, out: kinds.add((given[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(*inputs())
    assert (torch.bfloat16, torch.float32) in kinds
    assert {out for _, out in kinds} == {torch.float32}


def test_tiny_preset_draws_with_the_papers_placement() -> None:
    config = tiny()
    decoder = config.image_decoder
    assert decoder.unet.mmfs_at == "up_blocks"
    model = UNet(decoder.unet, decoder.mmfs, config.vision.width, config.vision.level_sides)
    assert len(model.look_back) == len(decoder.unet.block_widths) == len(model.up_blocks)


def test_published_unet(golden: Callable) -> None:
    """Two images per picture, one of them or both hidden: every map before and after MMFS."""
    run = golden("sd_unet_mmfs_256")
    given, out = ({k: torch.from_numpy(v) for k, v in run.part(p).items()} for p in ("in", "out"))
    maps = [given[f"feats.{level}"] for level in range(4)]
    features = torch.cat([level.flatten(3).transpose(2, 3) for level in maps], 2)  # [b, m, s, c]
    sides, width = [level.shape[-1] for level in maps], features.shape[-1]
    state = {name: torch.from_numpy(value) for name, value in run.part("state").items()}
    config = unet(Section(run.about["config"]).section("unet"), given["sample"].shape[-1], state)
    model = published_module(
        lambda: UNet(config, released_13b().image_decoder.mmfs, width, sides),
        state,
        theirs="image_decoder.decoder.",
        ours="image_decoder.unet.",
    )
    flow: list[tuple[Tensor, Tensor]] = []
    for block in model.look_back:
        block.register_forward_hook(
            lambda _, arguments, result: flow.append((arguments[0], result))
        )
    mask = given["mask"]
    position = mask.flip(1).cumsum(1).flip(1) * mask
    slot = torch.arange(mask.numel()).view(mask.shape)
    call = given["sample"], given["timestep"], given["context"]
    with torch.no_grad():
        got = {"eps_without_mmfs": model(*call)}
        got["eps"] = model(*call, features.flatten(0, 1), slot, position)
    names = [("skip_in", "skip_out", f".{i}") for i in range(12)] + [("mid_in", "mid_out", "")]
    for (before, after, number), (x, y) in zip(names, flow, strict=True):
        got[before + number], got[after + number] = x, y
    assert got.keys() == out.keys()
    for name, expected in out.items():
        worst = (got[name] - expected).abs().max().item() / expected.abs().max().item()
        assert worst < 1e-5, f"{name}: {worst}"


def test_position_table_starts_from_the_finest_map() -> None:
    """Coarser maps get the finest map's sin/cos table, resized (architecture of the release)."""
    block = MmfsBlock(MMFS, 16, 4, 8, FEATURES, SIDES)
    assert block.table.shape == (64, 16) and block.positions.shape == (16, 16)
    rows = block.table.view(8, 8, 16)
    # Between cells 0 and 1 along both axes; bicubic weights (-3, 19, 19, -3) / 32, edge repeated.
    weight = torch.tensor([-3, 19, 19, -3]) / 32
    first = torch.tensor([0, 0, 1, 2])
    expected = torch.einsum("y,x,yxc->c", weight, weight, rows[first][:, first])
    np.testing.assert_allclose(block.positions[0], expected, atol=1e-6)
