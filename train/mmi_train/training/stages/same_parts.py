"""Blank inputs, with which all ranks run the same parts of the model on different micro-batches.

Ranks gather parameters and average gradients together, part by part. A rank whose micro-batch has
no images to encode, no pictures to draw or no images that a picture sees runs that part on a blank
image or picture if another rank needs it: the losses, and the gradients of this rank, stay as they
are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from mmi_deploy.spec.config import ModelConfig
from mmi_train.model.layout import PictureLayout
from mmi_train.model.mm_interleaved import Batch
from mmi_train.model.vae import Posterior


class Parts(NamedTuple):
    """Parts of the model that a batch runs: the visual tokenizer on its `images`, the image decoder
    on its `pictures`, and that one's MMFS, because a picture is `seeing` an image."""

    images: bool
    pictures: bool
    seeing: bool


def parts_of(batch: Batch) -> Parts:
    """Parts that a batch with its layout runs."""
    assert batch.layout is not None
    pictures = batch.layout.pictures
    return Parts(
        images=batch.pixels is not None and len(batch.pixels) > 0,
        pictures=pictures is not None,
        seeing=pictures is not None and (pictures.seeing is None or len(pictures.seeing) > 0),
    )


def all_parts(parts: Iterable[Parts]) -> Parts:
    """The parts that any of `parts` has."""
    return Parts(*map(any, zip(*parts, strict=True)))


def with_parts(batch: Batch, wanted: Parts, config: ModelConfig) -> Batch:
    """The batch, which runs at least the `wanted` parts."""
    own = parts_of(batch)
    if wanted.images and not own.images:
        side = config.vision.image_size
        batch = replace(batch, pixels=torch.zeros(1, 3, side, side, device=_device(batch)))
        batch = replace(batch, blank=True)
    if wanted.pictures and not own.pictures:
        batch = _with_blank_picture(batch, config)
    if wanted.seeing and not own.seeing:
        assert batch.layout is not None and batch.layout.pictures is not None
        # MMFS on pictures whose images are all hidden gives them the null value.
        seeing = replace(batch.layout.pictures, seeing=None)
        batch = replace(batch, layout=replace(batch.layout, pictures=seeing))
    return batch


def _device(batch: Batch) -> torch.device:
    return batch.token_ids.device


def _with_blank_picture(batch: Batch, config: ModelConfig) -> Batch:
    """The batch with one picture of weight zero in the place of all those that are not drawn."""
    assert batch.layout is not None
    device, unet = _device(batch), config.image_decoder.unet
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    layout = PictureLayout(
        row=index,
        column=index,
        real=torch.ones_like(index, dtype=torch.bool),
        length=torch.ones_like(index[0]),
        used=index[0],
        slot=index,
        position=index,
        seeing=index[0, :0],
    )
    latents = torch.zeros(
        1, unet.latent_channels, unet.latent_side, unet.latent_side, device=device
    )
    return replace(
        batch,
        pictures=torch.zeros(1, 2, dtype=torch.int64, device=device),
        target_pixels=None,
        target_posterior=Posterior(latents, latents),
        picture_weight=torch.zeros(1, device=device),
        layout=replace(batch.layout, drawn=index[0], pictures=layout),
    )
