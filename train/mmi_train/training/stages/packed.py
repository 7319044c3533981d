"""Packed stage, the paper's: documents packed into rows of the context length, masks and losses.

A row is causal from its first token to its last, so packed documents see each other through
self-attention, as in the published run; MMFS and the image decoder stop at `<s>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mmi_deploy.spec.config import TokenConfig, to_json
from mmi_train.data.packing import PackedRow, Truncation, pack
from mmi_train.data.pixels import pixels_from_images
from mmi_train.data.rows import TokenDocument
from mmi_train.model.losses import text_targets
from mmi_train.model.mm_interleaved import Batch, MMInterleaved

# An endless stream of documents whose images are all encoded; all draws come from the generator.
DocumentSource = Callable[[np.random.Generator], Iterator[TokenDocument]]


def packed_batch(
    rows: list[PackedRow[np.ndarray]], tokens: TokenConfig, *, only_after_image: bool = False
) -> Batch:
    """Make the model's batch from packed rows: every image is encoded, and drawn from its context.

    An image that begins a document has an empty context; the model leaves its loss out (paper
    Sec. 4.1). `only_after_image`: no loss on text before a document's first image.
    """
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
    pixels = pixels_from_images(images)
    return Batch(
        token_ids=token_ids,
        image_slot=slot,
        pixels=pixels,
        pictures=torch.tensor(pictures),
        target_pixels=pixels,
        text_target=text_targets(token_ids, tokens, real=real, only_after_image=only_after_image),
    )


@dataclass
class PackedStage:
    """Micro-batches of `rows` rows of `length` tokens and at most `max_images` images. `data`:
    description of `source`, so that a run does not resume with other data."""

    model: MMInterleaved
    source: DocumentSource
    data: str
    length: int
    rows: int = 4
    max_images: int | None = None
    truncation: Truncation = "image"
    image_weight: float = 10.0
    only_after_image: bool = False
    name: str = field(default="packed", init=False)

    def model_state(self, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Averaged weights of the model, under the model's names."""
        return dict(average)

    @property
    def module(self) -> nn.Module:
        return self.model

    def describe(self) -> str:
        settings = (
            self.data,
            self.length,
            self.rows,
            self.max_images,
            self.truncation,
            self.image_weight,
            self.only_after_image,
        )
        return f"{to_json(self.model.config)} {settings}"

    def losses(self, rng: np.random.Generator) -> dict[str, Tensor]:
        tokens = self.model.config.tokens
        packed = pack(
            ((document.token_ids.tolist(), document.images) for document in self.source(rng)),
            tokens,
            length=self.length,
            visual_tokens=self.model.config.visual_tokens,
            truncation=self.truncation,
            max_images=self.max_images,
        )
        rows = [row for _, row in zip(range(self.rows), packed, strict=False)]
        batch = packed_batch(rows, tokens, only_after_image=self.only_after_image)
        losses = self.model(batch, image_weight=self.image_weight)
        return {"total": losses.total, "text": losses.text, "image": losses.image}
