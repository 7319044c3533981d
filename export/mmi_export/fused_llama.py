"""LLaMA's attention and MLP as a runtime wants them: fewer, larger operators, the same numbers.

Linear maps of one input become one matrix product; queries and keys turn by their rotary angles
in one operator; attention is one operator over the whole cache with an explicit mask. On a CPU a
decode step is mostly the reading of weights and the dispatch of small operators.

Letters: b batch, t tokens, k cache slots, h query heads, g key heads, d channels per head,
c channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_train.model.llama import Attention, KvCache, Mlp


class FusedAttention(nn.Module):
    """`llama.Attention` with a cache and a bool mask, which it must be given."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.layer, self.head_width = attention.layer, attention.head_width
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, _ = (proj.out_features // self.head_width for proj in projections)
        self.query_heads, self.key_heads = query, key
        self.qkv_weight = _stacked(projections)
        self.o_proj = attention.o_proj

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: KvCache
    ) -> Tensor:
        """hidden [b, t, c], rotary: cos, sin [b, 1, t, d/2], mask bool [b, 1, t, k] -> [b, t, c]"""
        query, key = self.query_heads, self.key_heads
        heads = F.linear(hidden, self.qkv_weight).unflatten(-1, (query + 2 * key, self.head_width))
        heads = heads.transpose(1, 2)  # [b, h + 2g, t, d]
        cos, sin = (table.squeeze(1) for table in rotary)  # [b, t, d/2]
        turning, values = heads.split((query + key, key), 1)
        queries, keys = torch.onnx.ops.rotary_embedding(turning, cos, sin).split((query, key), 1)
        keys, values = cache.update(self.layer, keys, values)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=query > key
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class FusedMlp(nn.Module):
    """`llama.Mlp` with one projection into both of its halves."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.gate_up_weight = _stacked((mlp.gate_proj, mlp.up_proj))
        self.down_proj = mlp.down_proj

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = F.linear(hidden, self.gate_up_weight).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


def _stacked(layers: Sequence[nn.Linear]) -> nn.Parameter:
    assert all(layer.bias is None for layer in layers)
    weight = torch.cat([layer.weight.detach() for layer in layers])
    return nn.Parameter(weight, requires_grad=False)
