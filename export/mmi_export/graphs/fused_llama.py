"""LLaMA's attention and MLP as a runtime wants them: fewer, larger operators, the same numbers.

Queries and keys turn by their rotary angles in one operator; attention is one operator over the
whole cache with an explicit mask. The fused forms also make one matrix product of the linear maps
of one input, which needs a copy of their weights: on a CPU a decode step of a small model is mostly
the dispatch of small operators.

Letters: b batch, t tokens, k cache slots, h query heads, g key heads, d channels per head,
c channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_train.model.llama import Attention, KvCache, Mlp


class DeployedAttention(nn.Module):
    """`llama.Attention` with a cache and a bool mask, which it must be given."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.layer, self.head_width = attention.layer, attention.head_width
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, _ = (proj.out_features // self.head_width for proj in projections)
        self.query_heads, self.key_heads = query, key
        self._take(projections)
        self.o_proj = attention.o_proj

    def _take(self, projections: Sequence[nn.Linear]) -> None:
        self.q_proj, self.k_proj, self.v_proj = projections

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: KvCache
    ) -> Tensor:
        """hidden [b, t, c], rotary: cos, sin [b, 1, t, d/2], mask bool [b, 1, t, k] -> [b, t, c]"""
        cos, sin = (table.squeeze(1) for table in rotary)  # [b, t, d/2]
        queries, keys, values = self._turned(hidden, cos, sin)
        keys, values = cache.update(self.layer, keys, values)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=self.query_heads > self.key_heads
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _turned(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, h, t, d] and keys [b, g, t, d], both turned, and values [b, g, t, d]."""
        query, key, value = (
            proj(hidden).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        turned = (torch.onnx.ops.rotary_embedding(heads, cos, sin) for heads in (query, key))
        return (*turned, value)


class FusedAttention(DeployedAttention):
    """The same with one matrix product and one operator that turns; its weight is a copy."""

    def _take(self, projections: Sequence[nn.Linear]) -> None:
        self.qkv_weight = _stacked(projections)

    def _turned(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key = self.query_heads, self.key_heads
        heads = F.linear(hidden, self.qkv_weight).unflatten(-1, (query + 2 * key, self.head_width))
        heads = heads.transpose(1, 2)  # [b, h + 2g, t, d]
        turning, values = heads.split((query + key, key), 1)
        queries, keys = torch.onnx.ops.rotary_embedding(turning, cos, sin).split((query, key), 1)
        return queries, keys, values


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
