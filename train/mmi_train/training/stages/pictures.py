"""Pictures stage: the image decoder learns alone, at several noise levels of each picture.

Encoder and language model are frozen, so that a document is read once, without gradients, for all
its noise levels: most of a step goes into the U-Net, which takes the most steps to learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmi_train.model.mm_interleaved import Batch
from mmi_train.training.stages.interleaved import InterleavedStage


class PicturesStage:
    """The image loss of the paper (Eq. 5) on the documents of `source`, each picture at `draws`
    timesteps. The optimiser's rules freeze all but the image decoder."""

    name = "pictures"

    def __init__(self, source: InterleavedStage, draws: int = 4) -> None:
        self.source, self.model, self.draws = source, source.model, draws

    @property
    def module(self) -> nn.Module:
        return self.model

    def describe(self) -> Mapping[str, object]:
        return {**self.source.describe(), "draws": self.draws}

    def batch(self, index: int, rng: np.random.Generator) -> Any:
        return self.source.batch(index, rng)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        # No dropout in the frozen parts.
        self.model.eval()
        self.model.image_decoder.train()
        assert batch.layout is not None and batch.layout.pictures is not None
        with torch.no_grad():
            images = self.model.encode_images(batch.pixels)
            hidden = self.model.read_rows(batch.token_ids, images, batch.layout.rows)
        inputs = self.model.picture_inputs(hidden, images, batch).repeated(self.draws)
        decoder = self.model.image_decoder
        loss = decoder.losses(*inputs, decoder.random_draws(len(inputs.condition))).mean()
        return {"total": loss, "image": loss}
