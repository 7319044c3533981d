"""Flamingo's Perceiver Resampler in float64 NumPy, one row at a time, as its appendix A.1.1 has it:
x = x + attention(q=x, kv=concat([context, x])); x = x + ffw(x); pre-norm, a norm at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

erf = np.vectorize(math.erf)


def norm(x, scale, shift, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * scale + shift


def perceiver(state: Mapping[str, np.ndarray], context, layers: int, heads: int, eps: float):
    """state: our names without a prefix; context [x, context_width] -> [queries, width]"""

    def normed(name, x):
        return norm(x, state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(name, x):
        return x @ state[f"{name}.weight"].T

    if "context_proj.weight" in state:
        context = linear("context_proj", context) + state["context_proj.bias"]
    x = state["queries"][0]
    for index in range(layers):
        layer = f"layers.{index}"
        query = normed(f"{layer}.query_norm", x)
        keys = np.concatenate([normed(f"{layer}.context_norm", context), query])
        q, k, v = (
            linear(f"{layer}.attention.{name}_proj", source)
            for name, source in (("query", query), ("key", keys), ("value", keys))
        )
        d = q.shape[1] // heads
        mixed = np.empty_like(q)
        for head in range(heads):
            own = slice(head * d, (head + 1) * d)
            logits = q[:, own] @ k[:, own].T / np.sqrt(d)
            weight = np.exp(logits - logits.max(-1, keepdims=True))
            mixed[:, own] = weight / weight.sum(-1, keepdims=True) @ v[:, own]
        x = x + linear(f"{layer}.attention.output_proj", mixed)
        hidden = linear(f"{layer}.ffn.1", normed(f"{layer}.ffn.0", x))
        hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
        x = x + linear(f"{layer}.ffn.3", hidden)
    return normed("norm", x)
