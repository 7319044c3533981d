"""Interleaved stage, the main one: text and image losses on packed documents of a corpus.

Letters: b batch, t tokens, j pictures to draw, y condition tokens, x context tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor, nn

from mmi_deploy.spec.config import to_json
from mmi_train.data.batches import batch_of
from mmi_train.data.corpus import Corpus, Split
from mmi_train.data.rows import TokenDocument, each_alone, make_rows, tokens_of
from mmi_train.model.layout import PictureLayout
from mmi_train.model.mm_interleaved import Batch, MMInterleaved
from mmi_train.training.stages import MODEL_PREFIX
from mmi_train.training.stages.auxiliary_heads import RecallHead, SketchHead

# Loss weight of a kind's text, 1 by default: the next change of a story is random.
TEXT_WEIGHT = MappingProxyType({"story": 0.2})


class InterleavedStage:
    """Both losses of the paper (Eq. 5) on freshly drawn documents, packed into rows of
    `row_length` tokens.

    `image_weight` is the paper's lambda; 0 leaves the U-Net out. The autoencoder is frozen by the
    optimiser's rules. `mixture`: documents of each kind, by default the corpus's. `recall_weight`
    and `sketch_weight`: of the two `auxiliary_heads`, which are not run if both are 0.
    """

    def __init__(
        self,
        model: MMInterleaved,
        tokenizer: Tokenizer,
        corpus: Corpus,
        mixture: Mapping[str, int] | None = None,
        *,
        name: str = "interleaved",
        row_length: int = 112,
        text_weight: float = 1.0,
        image_weight: float = 10.0,
        recall_weight: float = 0.5,
        sketch_weight: float = 3.0,
    ) -> None:
        self.model, self.tokenizer, self.corpus = model, tokenizer, corpus
        self.mixture = corpus.mixture if mixture is None else mixture
        self.name, self.row_length = name, row_length
        self.weights = {
            "text": text_weight,
            "image": image_weight,
            "recall": recall_weight,
            "sketch": sketch_weight,
        }
        width = model.config.image_decoder.resampler.width
        self.recall = RecallHead(width, model.config.llama.vocab)
        self.sketch = SketchHead(width)
        self.module = nn.ModuleDict({"model": model, "recall": self.recall, "sketch": self.sketch})

    def describe(self) -> dict[str, object]:
        return {
            "model": to_json(self.model.config),
            "world": self.corpus.describe(),
            "mixture": dict(self.mixture),
            "row_length": self.row_length,
            "weights": self.weights,
        }

    def model_state(self, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Averaged weights of the model without the auxiliary heads, under the model's names."""
        return {
            name.removeprefix(MODEL_PREFIX): value
            for name, value in average.items()
            if name.startswith(MODEL_PREFIX)
        }

    def documents(self, rng: np.random.Generator, split: Split = "train") -> list[TokenDocument]:
        """Token documents of one micro-batch."""
        config = self.model.config
        made = []
        for kind, count in self.mixture.items():
            for _ in range(count):
                document = self.corpus.document(kind, rng, split)
                tokens = tokens_of(
                    document.parts, each_alone(self.tokenizer), config.tokens, config.visual_tokens
                )
                factor = TEXT_WEIGHT.get(kind, 1.0)
                is_text = tokens.token_ids != config.tokens.boi
                tokens.weight[is_text] *= factor
                made.append(tokens)
        return made

    def batch(self, index: int, rng: np.random.Generator, split: Split = "train") -> Batch:
        config = self.model.config
        rows = make_rows(self.documents(rng, split), config.tokens, self.row_length)
        return batch_of(rows, config)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.layout is not None
        images = self.model.encode_images(batch.pixels)
        hidden = self.model.read_rows(batch.token_ids, images, batch.layout.rows)
        losses = {"text": self.model.text_loss(hidden, batch)}
        if self.weights["image"]:
            losses["image"], _ = self.model.image_loss(hidden, images, batch)
        auxiliary = self.weights["recall"] or self.weights["sketch"]
        if auxiliary and batch.layout.pictures is not None:
            losses |= self._auxiliary_losses(hidden, batch, batch.layout.pictures)
        total = sum(
            (self.weights[name] * loss for name, loss in losses.items()), hidden.new_zeros(())
        )
        return {"total": total, **losses}

    def _auxiliary_losses(
        self, hidden: Tensor, batch: Batch, layout: PictureLayout
    ) -> dict[str, Tensor]:
        """Losses of the auxiliary heads: recall of the text, and a sketch of the picture."""
        assert batch.layout is not None and batch.target_pixels is not None
        condition = self.model.condition(hidden, layout)  # [j, y, c]
        context = batch.token_ids[layout.row, layout.column]  # [j, x]
        counts = layout.real & (context != self.model.config.tokens.image)
        return {
            "recall": self.recall.loss(condition, context, counts),
            "sketch": self.sketch.loss(condition, batch.target_pixels[batch.layout.drawn]),
        }
