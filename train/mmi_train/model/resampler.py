"""Resamplers to a fixed number of tokens: Flamingo's Perceiver Resampler, BLIP-2's Q-Former.

Letters: b batch, x context tokens, q queries, c channels, h heads, d channels per head.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import ResamplerConfig
from mmi_train.model.attention import attend, join_heads, split_heads


class Attention(nn.Module):
    """Multi-head attention with its projections: queries [b, q, c] over a context
    [b, x, context_width]."""

    def __init__(
        self,
        config: ResamplerConfig,
        context_width: int,
        *,
        bias: bool,
        qk_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, dropout
        self.query_proj = nn.Linear(config.width, config.width, bias)
        self.key_proj = nn.Linear(context_width, config.width, bias)
        self.value_proj = nn.Linear(context_width, config.width, bias)
        self.output_proj = nn.Linear(config.width, config.width, bias)
        self.query_norm, self.key_norm = (
            nn.LayerNorm(config.width // config.heads, eps=config.eps) if qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """query [b, q, c], context [b, x, context_width] -> [b, q, c]. `mask`: bool [b, 1, 1, x],
        True where the context is not padding."""
        q = self.query_norm(split_heads(self.query_proj(query), self.heads))  # [b, h, q, d]
        k = self.key_norm(split_heads(self.key_proj(context), self.heads))  # [b, h, x, d]
        v = split_heads(self.value_proj(context), self.heads)  # [b, h, x, d]
        # The learned queries are one row, shared by every row of the batch in the first layer.
        q = q.expand(k.shape[0], -1, -1, -1)
        return self.output_proj(
            join_heads(attend(q, k, v, mask, self.dropout if self.training else 0.0))
        )


class PerceiverLayer(nn.Module):
    """Flamingo, appendix A.1.1: x += attention(q=x, kv=[context; x]); x += ffw(x); pre-norm."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.context_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.query_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.attention = Attention(config, config.width, bias=False, dropout=config.dropout)
        self.ffn = nn.Sequential(
            nn.LayerNorm(config.width, eps=config.eps),
            nn.Linear(config.width, config.mlp_width, bias=False),
            nn.GELU(),
            nn.Linear(config.mlp_width, config.width, bias=False),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        query = self.query_norm(x)
        keys = torch.cat([self.context_norm(context), query], 1)  # [b, x + q, c]
        x = x + self.dropout(self.attention(query, keys, mask))
        return x + self.dropout(self.ffn(x))


class QFormerLayer(nn.Module):
    """BLIP-2: self-attention, cross-attention (in some layers), feed-forward; post-norm as BERT."""

    def __init__(self, config: ResamplerConfig, cross: bool) -> None:
        super().__init__()
        attention = partial(Attention, bias=True, qk_norm=config.qk_norm, dropout=config.dropout)
        self.self_attention = attention(config, config.width)
        self.self_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.cross_attention = attention(config, config.context_width) if cross else None
        self.cross_norm = nn.LayerNorm(config.width, eps=config.eps) if cross else None
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.ffn_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = self.self_norm(x + self.dropout(self.self_attention(x, x)))
        if self.cross_attention is not None and self.cross_norm is not None:
            x = self.cross_norm(x + self.dropout(self.cross_attention(x, context, mask)))
        return self.ffn_norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class Resampler(nn.Module):
    """Learned queries [q, c] that attend to a context of any length.

    `start`: initial queries. None: N(0, 0.02), as BLIP-2 and the published model. A position table
    [q, context_width] (perceiver only): sin/cos rows as the caller adds them to its context. Every
    query then starts as a blurred copy of the tokens at its own position, which training from
    scratch otherwise takes long to find; see `_start_at`.
    """

    def __init__(self, config: ResamplerConfig, start: Tensor | None = None) -> None:
        super().__init__()
        if config.form == "perceiver" and (config.qk_norm or config.cross_every != 1):
            raise ConfigError("a perceiver resampler has no qk_norm and attends in every layer")
        if start is not None and start.shape != (config.queries, config.context_width):
            raise ValueError(
                f"start is {tuple(start.shape)}, not {(config.queries, config.context_width)}"
            )
        self.config = config
        self.queries = nn.Parameter(torch.empty(1, config.queries, config.width).normal_(std=0.02))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)  # perceiver: of the output
        self.dropout = nn.Dropout(config.dropout)
        self.context_proj: nn.Module = nn.Identity()
        self.layers: nn.ModuleList
        if config.form == "perceiver":
            if config.context_width != config.width:  # [context; queries] needs one width
                self.context_proj = nn.Linear(config.context_width, config.width)
            self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.layers))
        else:
            self.layers = nn.ModuleList(
                QFormerLayer(config, cross=index % config.cross_every == 0)
                for index in range(config.layers)
            )
        self._reset()
        if start is not None:
            self._start_at(start)

    def _reset(self) -> None:
        """Initialise the linear layers: Xavier for the perceiver, BERT's N(0, 0.02) otherwise."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if self.config.form == "perceiver":
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.no_grad()
    def _start_at(self, positions: Tensor) -> None:
        """Initialise the queries to their projected positions, at a standard deviation of 0.3.

        The key projection starts as 4 times the query projection, so that equal positions attend to
        each other. The weight of the query norm starts at 0.5: with 1 every query is most similar
        to itself and four fifths of its attention stay among the queries; with 0.5 a twentieth
        does, and half of the attention lies within two positions.
        """
        if self.config.form != "perceiver":
            raise ConfigError(
                "only a perceiver resampler can start at positions", got=self.config.form
            )
        if self.queries.is_meta:
            return
        rows = self.context_proj(positions)
        self.queries.copy_(0.3 * (rows - rows.mean()) / rows.std())
        for layer in self.layers:
            assert isinstance(layer, PerceiverLayer)
            layer.attention.key_proj.weight.copy_(4 * layer.attention.query_proj.weight)
            layer.query_norm.weight.fill_(0.5)

    def forward(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """context [b, x, context_width], mask bool [b, x] (False: padding) -> [b, q, c]"""
        if self.config.form == "perceiver":
            context = self.context_proj(context)
            x = self.queries.expand(context.shape[0], -1, -1)  # [b, q, c]
            if mask is not None:
                mask = F.pad(mask, (0, x.shape[1]), value=True)  # keys are [context; queries]
        else:
            x = self.dropout(self.norm(self.queries))  # [1, q, c]
        if mask is not None:
            mask = mask[:, None, None]  # [b, 1, 1, x]
        for layer in self.layers:
            x = layer(x, context, mask)
        return self.norm(x) if self.config.form == "perceiver" else x
