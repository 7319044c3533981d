"""Two readers of the condition, trained beside the model and thrown away: what training from
nothing needs so that pictures hear of their text.

The denoising loss tells the language model and the resampler very little while the U-Net cannot
draw, and the U-Net learns to do without a condition that means nothing. Left alone the resampler
learns within a few hundred steps to attend to its own queries, and pictures never hear of their
text. A reader is a shortcut past the U-Net: its loss is low only if the condition tells what there
is to tell.

Letters: k pictures, q condition tokens, c channels, t context tokens, s cells of the sketch, h
heads, d channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SKETCH_SIDE = 16
"""Cells along a side of a sketch."""


class RecallHead(nn.Module):
    """Tells from the j-th condition token, linearly, which token stands j places before the
    picture."""

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.told = nn.Linear(width, vocab)

    def loss(self, condition: Tensor, context: Tensor, counts: Tensor) -> Tensor:
        """Mean cross-entropy; condition [k, q, c], context [k, t] token ids from the picture
        backwards, counts [k, t] bool: which of them to tell."""
        tokens = min(condition.shape[1], context.shape[1])
        counts = counts[:, :tokens]
        logits = self.told(condition[:, :tokens][counts])
        return F.cross_entropy(logits.float(), context[:, :tokens][counts])


class SketchHead(nn.Module):
    """Draws a small picture in one look: every cell attends once to the condition tokens.

    That is what the U-Net's cross-attention can do as well, so a condition that serves the reader
    serves the U-Net, which then need not wait for one that is still moving.
    """

    def __init__(self, width: int, heads: int = 4, side: int = SKETCH_SIDE) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(0.5 * torch.randn(side * side, width))
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.colour = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3))

    def forward(self, condition: Tensor) -> Tensor:
        """Condition tokens [k, q, c] to sketches [k, 3, side, side] in about [-1, 1]."""
        tokens = self.norm(condition)
        key, value, query = (
            part.unflatten(-1, (self.heads, -1))
            for part in (self.key(tokens), self.value(tokens), self.query)
        )
        logits = torch.einsum("shd,kqhd->khsq", query, key) / query.shape[-1] ** 0.5
        looked = torch.einsum("khsq,kqhd->kshd", logits.softmax(-1), value).flatten(2)
        return self.colour(looked).transpose(1, 2).unflatten(-1, (self.side, self.side))

    def loss(self, condition: Tensor, pixels: Tensor) -> Tensor:
        """Mean squared error of the sketches of pictures `pixels` [k, 3, height, width] in
        [0, 1]."""
        wanted = F.adaptive_avg_pool2d(2 * pixels - 1, self.side)
        return (self(condition).float() - wanted).square().mean()
