"""Check of the U-Net with MMFS on its skips: units `sd_unet_mmfs`.

Letters: b batch, m image slots, s feature cells, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmi_train.checkpoint_import.state_dict import published_module
from mmi_train.golden import configs
from mmi_train.golden.compare import Checks
from mmi_train.golden.configs import PUBLISHED, Section
from mmi_train.golden.hooks import recorded
from mmi_train.golden.mmfs import base_grid, image_positions
from mmi_train.golden.units import Unit, UnitError
from mmi_train.model.unet import MmfsBlock, UNet
from mmi_train.model.visual_tokenizer import flatten_maps

_MID_BLOCK = "mmfs_module.mmfs_mid_block.mmfs."

# Sides of the feature maps that the published U-Net is built for.
CONFIGURED_SIDES = (64, 32, 16, 8)

# Picture side, in pixels, at which these sides are its base grids too.
CONFIGURED_PIXELS = 512

_BLOCKS_PER_GRID = 3


def set_base_grids(
    unet: UNet, image_size: int, sides: Sequence[int], configured: Sequence[int] = CONFIGURED_SIDES
) -> None:
    """Set the base grid of each MMFS block of `unet` as the published code does for pictures of
    `image_size` pixels and feature maps of `sides`; it assumes three blocks per map size."""
    if not 0 < image_size <= CONFIGURED_PIXELS:
        raise UnitError(
            "config.image_size is out of range",
            expected=f"1 to {CONFIGURED_PIXELS}",
            got=image_size,
        )
    shrink = CONFIGURED_PIXELS // image_size
    last = len(unet.look_back) - 1
    for index, block in enumerate(unet.look_back):
        place = -1 if index == last else index // _BLOCKS_PER_GRID
        if place >= len(configured):
            raise UnitError("the published code has no base grid for so many blocks", got=last + 1)
        assert isinstance(block, MmfsBlock)
        block.mmfs.base_grid = base_grid(
            configured[place] // shrink, tuple(configured), tuple(sides)
        )


def check(unit: Unit, checks: Checks) -> None:
    """Run the U-Net of a unit and compare its prediction and the maps around every MMFS block."""
    sample, timestep, context = (unit.input(name) for name in ("sample", "timestep", "context"))
    maps = unit.inputs_of("feats")  # of each level [b, m, c, side, side]
    if not maps:
        raise UnitError("lacks the tensors in.feats.*")
    mask = unit.input("mask")  # [b, m]
    model = _build(unit, sample.shape[-1], maps)
    features = flatten_maps(tuple(level.flatten(0, 1) for level in maps))  # [b * m, s, c]
    slot = torch.arange(mask.numel(), dtype=torch.int32).view_as(mask)
    with recorded({str(index): block for index, block in enumerate(model.look_back)}) as flow:
        prediction = model(sample, timestep, context, features, slot, image_positions(mask))
    checks.compare("eps", prediction)
    last = len(model.look_back) - 1
    for index in range(len(model.look_back)):
        before, after = flow[str(index)]
        checks.compare("mid_in" if index == last else f"skip_in.{index}", before)
        checks.compare("mid_out" if index == last else f"skip_out.{index}", after)
    if checks.wants("eps_without_mmfs"):
        checks.compare("eps_without_mmfs", model(sample, timestep, context))


def _build(unit: Unit, latent_side: int, maps: Sequence[Tensor]) -> UNet:
    config = Section(unit.config)
    sides = tuple(level.shape[-1] for level in maps)
    default = replace(PUBLISHED.image_decoder.mmfs, levels=tuple(range(len(sides))))
    mmfs = configs.mmfs(config, unit.state, default, _MID_BLOCK)
    unet = configs.unet(config.section("unet"), latent_side, unit.state)
    width = config.count("mmfs_input_channel", PUBLISHED.vision.width)
    model = published_module(
        lambda: UNet(unet, mmfs, width, sides),
        unit.state,
        theirs="image_decoder.decoder.",
        ours="image_decoder.unet.",
    )
    image_size = config.count("image_size", PUBLISHED.image_decoder.image_size)
    set_base_grids(model, image_size, sides, config.get("spatial_shapes", CONFIGURED_SIDES))
    return model
