"""Softmax attention of CLIP, the resamplers and the U-Net: fused, or two products on a CPU.

Letters: b batch, h heads, q queries, k keys, d channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

CLIP_IMPLEMENTATION = "mmi"


def trains_on_cpu(x: Tensor) -> bool:
    """True if `x` needs a gradient on a CPU and no export is running."""
    return x.requires_grad and x.device.type == "cpu" and not torch.compiler.is_exporting()


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Compute softmax(query key^T / sqrt(d)) value: query [b, h, q, d], key and value [b, h, k, d]
    -> [b, h, q, d].

    `mask`: bool, broadcast to [b, h, q, k], True where a key may be seen. A query that may see no
    key attends to all of them equally. `dropout` acts on the weights.

    Training on a CPU computes the two products separately, because the backward pass of PyTorch's
    fused attention is several times slower there; everything else, export included, is fused.
    """
    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
    if trains_on_cpu(query):
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # [b, h, q, k]
        weight = (logits if bias is None else logits + bias).softmax(-1)
        return F.dropout(weight, dropout, training=dropout > 0) @ value
    return F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[b, q, h * d] -> [b, h, q, d]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[b, h, q, d] -> [b, q, h * d]"""
    return x.transpose(1, 2).flatten(2)


def _clip_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """`attend` with the signature of transformers' attention functions; CLIP's vision tower has no
    mask."""
    assert attention_mask is None and scaling == query.shape[-1] ** -0.5
    return attend(query, key, value, dropout=dropout).transpose(1, 2), None


AttentionInterface.register(CLIP_IMPLEMENTATION, _clip_attention)
