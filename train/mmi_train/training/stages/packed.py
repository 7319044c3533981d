"""Packed stage, the paper's: documents packed into rows of the context length, masks and losses.

A row is causal from its first token to its last, so packed documents see each other through
self-attention, as in the published run; MMFS and the image decoder stop at `<s>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from mmi_deploy.spec.config import to_json
from mmi_train.data.batches import packed_batch
from mmi_train.data.packing import Truncation, pack
from mmi_train.data.rows import TokenDocument
from mmi_train.model.mm_interleaved import Batch, MMInterleaved

# An endless stream of documents whose images are all encoded; all draws come from the generator.
DocumentSource = Callable[[np.random.Generator], Iterator[TokenDocument]]


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

    def describe(self) -> dict[str, object]:
        return {
            "model": to_json(self.model.config),
            "data": self.data,
            "length": self.length,
            "rows": self.rows,
            "max_images": self.max_images,
            "truncation": self.truncation,
            "image_weight": self.image_weight,
            "only_after_image": self.only_after_image,
        }

    def batch(self, index: int, rng: np.random.Generator) -> Batch:
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
        return packed_batch(rows, self.model.config, only_after_image=self.only_after_image)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        losses = self.model(batch, image_weight=self.image_weight)
        return {"total": losses.total, "text": losses.text, "image": losses.image}
