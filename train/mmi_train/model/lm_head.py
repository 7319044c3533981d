"""LM head: a pre-trained linear layer, and one for the two tokens that MM-Interleaved adds.

Letters: b batch, t tokens, c channels, u vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_train.model.autocast import without_autocast
from mmi_train.model.positions import with_values


class LmHead(nn.Module):
    """Hidden states [b,t,c] -> logits [b,t,u].

    `head` may be pre-trained and frozen; `head_new` learns the logits of `new_ids` (begin of image,
    image). The sum of both biases starts at -5 there: possible, but improbable.
    """

    new_ids: Tensor

    def __init__(self, width: int, vocab: int, new_ids: Sequence[int]) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocab)
        self.head_new = nn.Linear(width, len(new_ids))
        with with_values():
            ids = torch.tensor(list(new_ids))
        self.register_buffer("new_ids", ids, persistent=False)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        nn.init.zeros_(self.head_new.weight)
        nn.init.constant_(self.head_new.bias, 95.0)
        with torch.no_grad():
            self.head.weight[list(new_ids)] = 0.0
            self.head.bias[list(new_ids)] = -100.0

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits in float32, those of the new tokens from float32 products: the biases of -100 and
        +95 would leave them no fraction in bfloat16, whose step is 0.5 there."""
        logits = self.head(hidden).float()  # [b, t, u]
        with without_autocast(hidden.device):
            rows = F.linear(hidden.float(), *self._new_rows())
        return logits.index_copy_(-1, self.new_ids, rows)

    def _new_rows(self) -> tuple[Tensor, Tensor]:
        """Both heads' weight and bias of the new tokens in one, in float32."""
        weight, bias = self.head.weight[self.new_ids], self.head.bias[self.new_ids]
        return weight.float() + self.head_new.weight, bias.float() + self.head_new.bias

    def folded(self) -> tuple[Tensor, Tensor]:
        """Fold both heads into one linear layer: (weight [u,c], bias [u])."""
        weight = self.head.weight.index_add(0, self.new_ids, self.head_new.weight)
        return weight, self.head.bias.index_add(0, self.new_ids, self.head_new.bias)
