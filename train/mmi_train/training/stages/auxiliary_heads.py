"""Auxiliary heads on the U-Net's condition, used in training from scratch only.

Without pre-trained parts the denoising loss teaches the language model and the resampler very
little while the U-Net cannot draw, and the U-Net learns to ignore a condition without information.
The resampler then learns within a few hundred steps to attend to its own queries, and pictures
never depend on their text. An auxiliary head bypasses the U-Net: its loss is low only if the
condition contains the information.

Letters: j pictures to draw, y condition tokens, c channels, x context tokens, q queries, h heads,
d channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_train.model.losses import IGNORE

# Side of a sketch, in cells.
SKETCH_SIDE = 16


class RecallHead(nn.Module):
    """Linear head that predicts, from condition token i, the token i places before the picture."""

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.told = nn.Linear(width, vocab)  # the name in training checkpoints

    def loss(self, condition: Tensor, context: Tensor, counts: Tensor) -> Tensor:
        """Mean cross-entropy; condition [j, y, c], context [j, x] token ids from the picture
        backwards, counts [j, x] bool: True for tokens to predict."""
        tokens = min(condition.shape[1], context.shape[1])
        target = context[:, :tokens].masked_fill(~counts[:, :tokens], IGNORE)
        logits = self.told(condition[:, :tokens])
        return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=IGNORE)


class SketchHead(nn.Module):
    """Head that draws a small picture: every cell attends to the condition tokens once.

    The U-Net's cross-attention can do the same, so a condition that suits this head suits the
    U-Net, which then does not have to follow a condition that still changes.
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
        """Condition tokens [j, y, c] to sketches [j, 3, side, side] in about [-1, 1]; a query for
        each cell."""
        tokens = self.norm(condition)
        key, value, query = (
            part.unflatten(-1, (self.heads, -1))
            for part in (self.key(tokens), self.value(tokens), self.query)
        )  # [j, y, h, d] twice, [q, h, d]
        logits = torch.einsum("qhd,jyhd->jhqy", query, key) / query.shape[-1] ** 0.5
        attended = torch.einsum("jhqy,jyhd->jqhd", logits.softmax(-1), value).flatten(2)
        return self.colour(attended).transpose(1, 2).unflatten(-1, (self.side, self.side))

    def loss(self, condition: Tensor, pixels: Tensor) -> Tensor:
        """Mean squared error of the sketches; pixels [j, 3, height, width] in [0, 1]."""
        target = F.adaptive_avg_pool2d(2 * pixels - 1, self.side)
        return (self(condition).float() - target).square().mean()
