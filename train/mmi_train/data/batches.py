"""Batches of the model, made from rows of documents.

A picture has two sizes: that of the encoder, where it is given, and that of the image decoder,
where it is drawn.

Letters: b batch, m image slots.
"""

from __future__ import annotations

import numpy as np
import torch

from mmi_deploy.spec.config import ModelConfig
from mmi_train.data.packing import PackedRow
from mmi_train.data.pixels import pixels_at
from mmi_train.data.rows import Rows
from mmi_train.model.layout import layout_of
from mmi_train.model.losses import text_targets
from mmi_train.model.mm_interleaved import Batch


def batch_of(rows: Rows, config: ModelConfig, *, isolated: bool = True) -> Batch:
    """Make the model's batch from rows; only tokens with a weight are targets. `isolated`: the
    documents of a row do not see each other."""
    token_ids = torch.from_numpy(rows.token_ids)
    image_slot = torch.from_numpy(rows.image_slot)
    weight = torch.from_numpy(rows.weight)
    pictures = torch.from_numpy(rows.pictures) if len(rows.pictures) else None
    target = text_targets(token_ids, config.tokens, real=weight > 0)
    return Batch(
        token_ids=token_ids,
        image_slot=image_slot,
        pixels=pixels_at(rows.images, config.vision.image_size) if rows.images else None,
        pictures=pictures,
        target_pixels=(
            pixels_at(rows.targets, config.image_decoder.image_size) if rows.targets else None
        ),
        text_target=target,
        token_weight=weight,
        layout=layout_of(token_ids, image_slot, pictures, target, config, isolated=isolated),
    )


def packed_batch(
    rows: list[PackedRow[np.ndarray]], config: ModelConfig, *, only_after_image: bool = False
) -> Batch:
    """Make the model's batch from packed rows: every image is encoded, and drawn from its context.

    An image that begins a document has an empty context; the model leaves its loss out (paper
    Sec. 4.1). `only_after_image`: no loss on text before a document's first image.
    """
    tokens = config.tokens
    width = max(len(row.token_ids) for row in rows)
    most = max(len(row.images) for row in rows)
    token_ids = torch.full((len(rows), width), tokens.pad)
    real = torch.zeros(token_ids.shape, dtype=torch.bool)
    slot = torch.full((len(rows), most), -1, dtype=torch.int32)
    pictures: list[tuple[int, int]] = []
    images: list[np.ndarray] = []
    for b, row in enumerate(rows):
        token_ids[b, : len(row.token_ids)] = torch.from_numpy(row.token_ids)
        real[b, : len(row.token_ids)] = True
        for m, image in enumerate(row.images):
            slot[b, m] = len(images)
            pictures.append((b, m))
            images.append(image)
    target = text_targets(token_ids, tokens, real=real, only_after_image=only_after_image)
    places = torch.tensor(pictures)
    return Batch(
        token_ids=token_ids,
        image_slot=slot,
        pixels=pixels_at(images, config.vision.image_size),
        pictures=places,
        target_pixels=pixels_at(images, config.image_decoder.image_size),
        text_target=target,
        layout=layout_of(token_ids, slot, places, target, config),
    )
