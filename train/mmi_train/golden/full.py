"""Check of the whole model: its weights, and the training forward of units `full_forward`.

Every encoded image is also a picture to draw.

Letters: b batch, t tokens, m image slots, j pictures to draw, x context tokens, s feature cells,
c channels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmi_deploy.spec.config import TokenConfig
from mmi_train.checkpoint_import.state_dict import published_module
from mmi_train.golden import configs
from mmi_train.golden.compare import Checks
from mmi_train.golden.configs import Section
from mmi_train.golden.gradients import check_gradients
from mmi_train.golden.hooks import recorded
from mmi_train.golden.unet import set_base_grids
from mmi_train.golden.units import Unit, UnitError
from mmi_train.model.generation import visible_keys
from mmi_train.model.image_decoder import CONDITION_DROP, RandomDraws
from mmi_train.model.layout import EMPTY_CONTEXT
from mmi_train.model.losses import IGNORE, text_loss, text_targets
from mmi_train.model.mm_interleaved import EncodedImages, MMInterleaved

# Data set of the total loss whose gradients are stored.
_GRADIENT_OF = "mmc4"

# Runs whose first `in.ignore_prompt_token_offset` tokens of each row are a prompt, no targets.
_PROMPTED = ("offset", "sft")


@dataclass(frozen=True)
class Weights:
    """A whole model and the constructor arguments of the published one."""

    model: MMInterleaved
    arguments: Section


def load(unit: Unit) -> Weights:
    """Load the model of a `full_forward` unit."""
    pixels = unit.input("image_tensors")
    config = configs.model(Section(unit.config), unit.state, pixels.shape[-1])
    model = published_module(lambda: MMInterleaved(config), unit.state)
    decoder = config.image_decoder
    set_base_grids(model.image_decoder.unet, decoder.image_size, config.vision.level_sides)
    return Weights(model, Section(unit.config).section("model"))


@dataclass(frozen=True)
class Rows:
    """Token rows with images: `ids` and `real` [b, t], `slot` [b, m] (-1: none), `pictures` [j, 2]
    (row, image of the row), `bounds` [b, t]: the ids with only those `<s>` that bound the context
    of pictures in the published code."""

    ids: Tensor
    real: Tensor
    slot: Tensor
    pictures: Tensor
    bounds: Tensor


def rows(unit: Unit, tokens: TokenConfig) -> Rows:
    """Rows of a unit. Without `in.nearest_bos_idxs` no `<s>` bounds the context of pictures."""
    ids = unit.input("text_ids")
    images = len(unit.input("image_tensors"))
    counts = unit.inputs.get("num_image_per_seq", (ids == tokens.boi).sum(1)).tolist()
    if len(counts) != len(ids) or sum(counts) != images:
        raise UnitError(
            "in.num_image_per_seq does not fit",
            expected=f"{len(ids)} counts that add up to {images}",
            got=counts,
        )
    if (ids == tokens.boi).sum(1).tolist() != counts:
        raise UnitError(
            "in.text_ids does not announce the images of in.num_image_per_seq", got=counts
        )
    slot = torch.full((len(ids), max(*counts, 1)), -1, dtype=torch.int64)
    pictures = [(row, image) for row, count in enumerate(counts) for image in range(count)]
    for index, (row, image) in enumerate(pictures):
        slot[row, image] = index
    bounds = ids.masked_fill(ids == tokens.bos, tokens.pad)
    starts = unit.inputs.get("nearest_bos_idxs", torch.zeros(0, dtype=torch.int64)).tolist()
    for start, (row, _) in zip(starts, pictures, strict=bool(starts)):
        bounds[row, start] = tokens.bos
    real = unit.inputs.get("attention_mask", torch.ones_like(ids)).bool()
    return Rows(ids, real, slot, torch.tensor(pictures).view(-1, 2), bounds)


def read(model: MMInterleaved, data: Rows, images: EncodedImages) -> Tensor:
    """Hidden states [b, t, c] of rows that may be padded on either side; positions count from the
    first column of a row."""
    return model.llm(
        model.embed_rows(data.ids, images, data.slot),
        torch.arange(data.ids.shape[1]).expand_as(data.ids),
        visible_keys(data.real),
        values=model.llm.image_values(images.features),
        image_slot=data.slot.clamp(min=0),
        image_position=model.image_positions(data.ids, data.slot),
    )


def check(unit: Unit, checks: Checks, weights: Weights) -> None:
    """Run the training forward of a unit and compare activations, losses and gradients."""
    with torch.enable_grad():
        loss = _forward(unit, checks, weights)
        again = partial(_forward, unit, Checks(unit), weights)
        check_gradients(checks, weights.model, loss, again)


def _forward(unit: Unit, checks: Checks, weights: Weights) -> Tensor | None:
    """Run the training forward; returns the loss whose gradients are stored, if there is one."""
    model = weights.model
    data = rows(unit, model.config.tokens)
    pixels = unit.input("image_tensors")
    parts = {"llm": model.llm, "resampler": model.image_decoder.resampler}
    with recorded(parts) as flow:
        images = model.encode_images(pixels)
        hidden = read(model, data, images)
        layout = model.picture_layout(data.bounds, data.slot, data.pictures)
        context, length = model.context(hidden, layout)
        condition = model.image_decoder.condition(context, length)
        _check_embeddings(checks, model, data, images, flow["llm"][0])
        checks.compare("last_hidden_state", hidden, mask=data.real)
        logits = model.head(hidden)
        checks.compare("text_logits", logits, mask=data.real)
        real = torch.arange(context.shape[1]) < length[:, None]  # [j, x]
        checks.compare("context_attention_mask", real, "exact")
        checks.compare("context_features", flow["resampler"][0], mask=real)
        checks.compare("resampled_context", condition)
        pictures = _picture_losses(unit, checks, weights, data, images, condition, length)
        return _check_losses(unit, checks, weights, data, logits, pictures)


def _check_embeddings(
    checks: Checks, model: MMInterleaved, data: Rows, images: EncodedImages, embeddings: Tensor
) -> None:
    config = model.config
    checks.compare("mm_embeds", embeddings, mask=data.real)
    seen = model.image_positions(data.ids, data.slot)  # [b, t, m]
    checks.compare("cross_attention_mask", seen > 0, "exact", data.real)
    ends = [0]
    for side in config.vision.level_sides:
        ends.append(ends[-1] + side * side)
    own = [images.features[:, ends[level] : ends[level + 1]] for level in config.llm_mmfs.levels]
    features = torch.cat(own, 1)[data.slot.clamp(min=0)]  # [b, m, s, c]
    checks.compare("mmfs_features_mm", features, mask=data.slot >= 0)


def _picture_losses(
    unit: Unit,
    checks: Checks,
    weights: Weights,
    data: Rows,
    images: EncodedImages,
    condition: Tensor,
    length: Tensor,
) -> Tensor:
    """The image loss of each picture, [j], 0 for an empty context."""
    model, decoder = weights.model, weights.model.image_decoder
    previous = model.previous_images(
        images, model.picture_layout(data.bounds, data.slot, data.pictures)
    )
    nearest = previous.position == 1  # [j, m]
    checks.compare("imgdec_mmfs_mask", nearest.any(1, keepdim=True), "exact")
    before = previous.slot.gather(1, nearest.int().argmax(1, keepdim=True))  # [j, 1]
    start = 0
    for level, side in enumerate(model.config.vision.level_sides):
        if checks.wants(f"imgdec_mmfs_level{level}"):
            cells = previous.features[before][:, :, start : start + side * side]  # [j, 1, s, c]
            maps = cells.transpose(2, 3).unflatten(3, (side, side))
            checks.compare(f"imgdec_mmfs_level{level}", maps, mask=nearest.any(1))
        start += side * side
    if not any(checks.wants(name) for name in unit.outputs if name.startswith(("loss", "grad."))):
        return condition.new_zeros(len(length))
    pixels = unit.inputs.get("image_tensors_dec", unit.input("image_tensors"))
    section = weights.arguments.section("image_decoder_config")
    draws = _draws(unit, len(data.pictures), section.get("uncond_prob", CONDITION_DROP))
    drawn = length > EMPTY_CONTEXT
    return decoder.losses(decoder.encode(pixels), condition, previous, draws) * drawn


def _draws(unit: Unit, pictures: int, drop_share: float) -> RandomDraws:
    """Random draws of the published code, in the order of its calls: condition drop (if its
    probability is not 0), posterior noise of each batch of latents, noise, timesteps."""
    calls: dict[str, list[Tensor]] = {}
    for name in sorted(name for name in unit.inputs if name.startswith("rng.")):
        match = re.fullmatch(r"rng\.\d+_(\w+)", name)
        if match:
            calls.setdefault(match[1], []).append(unit.inputs[name])
    for call in ("randn", "randn_like", "randint"):
        if call not in calls:
            raise UnitError(f"lacks the random draw in.rng.*_{call}")
    if drop_share > 0 and "rand_like" not in calls:
        raise UnitError("lacks the random draw in.rng.*_rand_like")
    drop = torch.ones(pictures)
    if "rand_like" in calls:
        drop[calls["rand_like"][0].flatten() < drop_share] = 0.0
    return RandomDraws(drop, torch.cat(calls["randn"]), calls["randn_like"][0], calls["randint"][0])


def _check_losses(
    unit: Unit, checks: Checks, weights: Weights, data: Rows, logits: Tensor, pictures: Tensor
) -> Tensor | None:
    arguments, tokens = weights.arguments, weights.model.config.tokens
    after_image = arguments.get("dataset_to_ignore_noimage_cond_loss", ())
    total = None
    for name in _data_sets(unit):
        target = text_targets(
            data.ids,
            tokens,
            real=data.real,
            prompt=_prompt(unit, name, len(data.ids)),
            only_after_image=name in after_image,
        )
        checks.compare(f"gt_text_ids_{name}", target, "exact")
        counts = target != IGNORE
        text = text_loss(logits[:, :-1][counts], target[counts])
        image = _image_loss(unit, name, pictures)
        own = _weight(unit, arguments, "loss_txt_weight", name, 1.0) * text
        own = own + _weight(unit, arguments, "loss_img_weight", name, 10.0) * image
        checks.compare(f"loss_img_{name}", image, "loss")
        if counts.any():
            checks.compare(f"loss_txt_{name}", text, "loss")
            checks.compare(f"loss_{name}", own, "loss")
        for kind in ("loss_txt", "loss"):
            if not counts.any():
                checks.skip(
                    f"{kind}_{name}", "no token counts: the published mean is not a number, ours 0"
                )
        if total is None or name == _GRADIENT_OF:
            total = own
    return total


def _given(unit: Unit, what: str, run: str) -> Tensor | None:
    """Input of one run, `in.<what>_<run>`, else that of all runs, `in.<what>`, if there is one."""
    return unit.inputs.get(f"{what}_{run}", unit.inputs.get(what))


def _prompt(unit: Unit, run: str, rows: int) -> Tensor:
    """Number of tokens at the start of each row that are no targets of a run, one or [b]."""
    own = unit.inputs.get(f"ignore_prompt_token_offset_{run}")
    if own is None and run in _PROMPTED:
        own = unit.inputs.get("ignore_prompt_token_offset")
    if own is None:
        return torch.zeros(1, dtype=torch.int64)
    if own.numel() not in (1, rows):
        raise UnitError(
            "in.ignore_prompt_token_offset does not fit",
            expected=f"one number or one for each of {rows} rows",
            got=list(own.shape),
        )
    return own.flatten()


def _image_loss(unit: Unit, run: str, pictures: Tensor) -> Tensor:
    """The published image loss: a mean over all pictures, in which a masked one counts as 0."""
    mask = _given(unit, "image_loss_mask", run)
    if mask is None:
        return pictures.mean()
    if mask.numel() != len(pictures):
        raise UnitError(
            "in.image_loss_mask does not fit",
            expected=f"a number for each of {len(pictures)} pictures",
            got=list(mask.shape),
        )
    return (pictures * mask.flatten()).mean()


def _weight(unit: Unit, arguments: Section, what: str, run: str, default: float) -> float:
    """Weight of a loss: the call's, else the configuration's."""
    given = _given(unit, what, run)
    return float(arguments.get(what, default) if given is None else given)


def _data_sets(unit: Unit) -> list[str]:
    """Names of the data sets whose losses or targets the unit holds."""
    names = (
        re.fullmatch(r"(?:loss(?:_txt|_img)?|gt_text_ids)_(\w+)", name) for name in unit.outputs
    )
    return sorted({match[1] for match in names if match})
