"""LLaMA's attention and MLP in fewer, larger ONNX operators, with the same results.

Rotary embedding is one operator; attention is one operator over the whole cache with an explicit
mask. The fused forms also stack the linear maps of one input into one matrix product, which takes a
copy of their weights: on a CPU the dispatch of small operators dominates a decode step of a small
model.

Letters: b batch, t tokens, k keys, h heads, a key-value heads, d channels per head, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_train.model.llama import Attention, KvCache, Mlp


class DeployedAttention(nn.Module):
    """`llama.Attention` with a KV cache and a bool mask, both required."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.layer, self.head_width = attention.layer, attention.head_width
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, _ = (proj.out_features // self.head_width for proj in projections)
        self.query_heads, self.key_heads = query, key
        self._use_projections(projections)
        self.o_proj = attention.o_proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.rotary = attention.rotary

    def _use_projections(self, projections: Sequence[nn.Linear]) -> None:
        self.q_proj, self.k_proj, self.v_proj = projections

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: KvCache
    ) -> Tensor:
        """hidden [b, t, c], rotary: cos, sin [b, 1, t, d/2], mask bool [b, 1, t, k] -> [b, t, c]"""
        cos, sin = (table.squeeze(1) for table in rotary)  # [b, t, d/2]
        queries, keys, values = self._rotated(hidden, cos, sin)
        keys, values = cache.update(self.layer, keys, values)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=self.query_heads > self.key_heads
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _rotated(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [b, h, t, d] and keys [b, a, t, d], and values [b, a, t, d]."""
        query, key, value = (
            proj(hidden).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = self._rotate(self.q_norm(query), cos, sin)
        return query, self._rotate(self.k_norm(key), cos, sin), value

    def _rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.onnx.ops.rotary_embedding(heads, cos, sin) if self.rotary else heads


class FusedAttention(DeployedAttention):
    """`DeployedAttention` with one matrix product, and one rotary embedding unless queries and keys
    have norms of their own before it; copies its weights."""

    def _use_projections(self, projections: Sequence[nn.Linear]) -> None:
        self.qkv_weight, self.qkv_bias = _stacked(projections)

    def _rotated(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key = self.query_heads, self.key_heads
        heads = F.linear(hidden, self.qkv_weight, self.qkv_bias)
        heads = heads.unflatten(-1, (query + 2 * key, self.head_width))
        heads = heads.transpose(1, 2)  # [b, h + 2a, t, d]
        if isinstance(self.q_norm, nn.RMSNorm):
            queries, keys, values = heads.split((query, key, key), 1)
            queries = self._rotate(self.q_norm(queries), cos, sin)
            return queries, self._rotate(self.k_norm(keys), cos, sin), values
        rotating, values = heads.split((query + key, key), 1)
        queries, keys = self._rotate(rotating, cos, sin).split((query, key), 1)
        return queries, keys, values


class FusedMlp(nn.Module):
    """`llama.Mlp` with its gate and up projections stacked; copies their weights."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.gate_up_weight, _ = _stacked((mlp.gate_proj, mlp.up_proj))
        self.down_proj = mlp.down_proj

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = F.linear(hidden, self.gate_up_weight).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


def _stacked(layers: Sequence[nn.Linear]) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias of `layers`, of which all or none have a bias, as one linear map."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers))
    bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return nn.Parameter(weight, requires_grad=False), bias
