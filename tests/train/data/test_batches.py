"""Batches: a picture is given at the encoder's size and drawn at the decoder's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmi_deploy.documents.images import resize, to_pixels
from mmi_deploy.spec.presets import tiny
from mmi_train.data.batches import batch_of, packed_batch
from mmi_train.data.packing import pack
from mmi_train.data.rows import TokenDocument, make_rows
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.training.stages.packed import PackedStage

CONFIG = replace(tiny(), vision=replace(tiny().vision, image_size=32))
TOKENS = CONFIG.tokens
PICTURE = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)


def document() -> TokenDocument:
    """A word, a picture, a word, a picture."""
    image = [TOKENS.boi] + [TOKENS.image] * CONFIG.visual_tokens
    ids = [TOKENS.bos, 9, *image, 9, *image, TOKENS.eos]
    weight = np.ones(len(ids), np.float32)
    return TokenDocument(
        np.array(ids), weight, (PICTURE, PICTURE[:64, :64]), (True, True), (True, True)
    )


@pytest.mark.parametrize("packed", [False, True])
def test_pictures_have_the_sizes_of_encoder_and_decoder(packed: bool) -> None:
    made = document()
    if packed:
        rows = pack(
            [(made.token_ids.tolist(), made.images)],
            TOKENS,
            length=made.size,
            visual_tokens=CONFIG.visual_tokens,
        )
        batch = packed_batch(list(rows), CONFIG)
    else:
        batch = batch_of(make_rows([made], TOKENS), CONFIG)
    assert batch.pixels is not None and batch.target_pixels is not None
    for pixels, side in ((batch.pixels, 32), (batch.target_pixels, 64)):
        assert pixels.shape == (2, 3, side, side)
        for found, image in zip(pixels, made.images, strict=True):
            np.testing.assert_array_equal(found.numpy(), to_pixels(resize(image, side)))


def test_a_model_with_two_sizes_trains() -> None:
    torch.manual_seed(0)
    stage = PackedStage(
        MMInterleaved(CONFIG), lambda rng: iter([document()] * 4), "two", length=60, rows=2
    )
    losses = stage.losses(stage.batch(0, np.random.default_rng(0)))
    losses["total"].backward()
    assert torch.isfinite(losses["total"]) and losses["image"] > 0
