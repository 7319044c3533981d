"""The language model's head: a head for the words it knew and one for the two new tokens.

Letters: b batch, t tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LmHead(nn.Module):
    """Hidden states [b,t,c] -> logits [b,t,vocab].

    `head` may be a frozen, pre-trained one; `head_new` learns the tokens in `new_ids` (begin of
    image, image). Together their biases start those at -5: known, but unlikely.
    """

    new_ids: Tensor

    def __init__(self, width: int, vocab: int, new_ids: Sequence[int]) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocab)
        self.head_new = nn.Linear(width, len(new_ids))
        self.register_buffer("new_ids", torch.tensor(list(new_ids)), persistent=False)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        nn.init.zeros_(self.head_new.weight)
        nn.init.constant_(self.head_new.bias, 95.0)
        with torch.no_grad():
            self.head.weight[list(new_ids)] = 0.0
            self.head.bias[list(new_ids)] = -100.0

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        return logits.index_add_(-1, self.new_ids, self.head_new(hidden))

    def folded(self) -> tuple[Tensor, Tensor]:
        """(weight [vocab,c], bias [vocab]) of the one linear layer that equals both heads."""
        weight = self.head.weight.index_add(0, self.new_ids, self.head_new.weight)
        return weight, self.head.bias.index_add(0, self.new_ids, self.head_new.bias)
