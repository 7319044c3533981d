"""Check of the MMFS layer: units `mmfs_llm` and `mmfs_unet`.

Letters: b batch, q queries, m image slots, s feature cells, c channels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmi_train.checkpoint_import.state_dict import published_module
from mmi_train.golden import configs
from mmi_train.golden.compare import Checks
from mmi_train.golden.configs import PUBLISHED, Section
from mmi_train.golden.units import Unit, UnitError
from mmi_train.model.mmfs import Mmfs

_PREFIXES = {
    "theirs": "mm_decoder.layers.0.llama_cross_attn.attn.",
    "ours": "llm.layers.0.look_back.mmfs.",
}


def image_positions(visible: Tensor) -> Tensor:
    """Visibility [..., m] to image positions: 1 the nearest visible image, 0 hidden."""
    visible = visible.long()
    return (visible.flip(-1).cumsum(-1).flip(-1) * visible).to(torch.int32)


def check(unit: Unit, checks: Checks) -> None:
    """Run the MMFS layer of a unit on its inputs and compare the output."""
    section = Section(unit.config).section("ctor")
    features = unit.input("input_flatten")  # [b, m, s, c]
    batch, images = features.shape[:2]
    queries = unit.input("query").shape[1]
    sides = _sides(unit.input("input_spatial_shapes"), images, section)
    base = float(section.get("base_spatial_shape", PUBLISHED.llm_mmfs.base_grid or 1))
    shapes = section.get("spatial_shapes", sides)
    config = replace(PUBLISHED.llm_mmfs, levels=tuple(range(len(sides))))
    config = configs.mmfs(section, unit.state, config)
    widths = (
        section.count("d_query", configs.size(unit.state, "dynamic_offset_mask.weight", 0)),
        section.count("d_value", configs.size(unit.state, "value_proj.weight", 1)),
        section.count("d_out", configs.size(unit.state, "output_proj.weight", 0)),
    )
    grid = base_grid(base, shapes, sides)
    module = published_module(lambda: Mmfs(config, *widths, sides, grid), unit.state, **_PREFIXES)

    mask = unit.input("attention_mask")  # [b, q, m] or [b, m]
    mask = mask[:, None] if mask.ndim == 2 else mask
    if mask.shape[1] not in (1, queries):  # a single new token has the last row
        mask = mask[:, -1:]
    reference = unit.input("reference_points")
    if reference.shape[0] != 1 or reference.shape[2:] != (1, 2):
        raise UnitError(
            "in.reference_points has an unknown shape", expected="[1, q, 1, 2]", got=reference.shape
        )
    slot = torch.arange(batch * images, dtype=torch.int32).view(batch, images)
    value = module.values(features.flatten(0, 1))
    output = module(unit.input("query"), value, slot, image_positions(mask), reference[0, :, 0])
    checks.compare("output", output)


def _sides(spatial_shapes: Tensor, images: int, section: Section) -> tuple[int, ...]:
    """Sides of one image's maps, given (height, width) of every map of every image."""
    shapes = [(int(height), int(width)) for height, width in spatial_shapes.tolist()]
    levels = section.count("n_levels", len(shapes) // images)
    own = shapes[:levels]
    if shapes != own * images or any(height != width for height, width in own):
        raise UnitError(
            "in.input_spatial_shapes are not the same square maps for every image", got=shapes
        )
    return tuple(height for height, _ in own)


def base_grid(base: float, configured: tuple[int, ...], actual: tuple[int, ...]) -> float:
    """Side of the grid whose cells are the unit of offsets.

    The published code shifts a point by offset * s / base cells of a map that was configured with
    side s, that is by offset / (base * actual / s) of the side of any map."""
    if len(configured) != len(actual):
        raise UnitError("the levels disagree", expected=f"sides like {configured}", got=actual)
    grids = {base * now / then for then, now in zip(configured, actual, strict=True)}
    if len(grids) != 1:
        raise UnitError(
            "the base grid differs between levels",
            expected=f"sides like {configured}",
            got=actual,
        )
    return grids.pop()
