"""LLaMA with MMFS between self-attention and MLP of every few blocks.

Paper Sec. 3.2, "Multi-modal LLM with MMFS". Without MMFS this is LLaMA, or one of its descendants
(Mistral, Qwen2, Qwen3, SmolLM3) as the configuration says, with Hugging Face's names and its
half-split rotary embedding.

Letters: b batch, t tokens, k keys, m image slots, h heads, a key-value heads, d channels per head,
n encoded images, s feature cells, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.config import LlamaConfig, MmfsConfig
from mmi_train.model.mmfs import Mmfs, take_levels
from mmi_train.model.positions import with_values


def rotary_tables(
    context: int, head_width: int, theta: float, divisors: Sequence[float] = ()
) -> tuple[Tensor, Tensor]:
    """Tabulate the rotary embedding: (cos, sin) [context, head_width / 2] in fp32; row = position,
    column = frequency. divisors: of the frequencies, highest first; none: 1."""
    frequency = 1.0 / theta ** (torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    if divisors:
        frequency = frequency / torch.tensor(divisors, dtype=torch.float32)
    angle = torch.arange(context, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (channel i, channel i + d/2) of x [b,h,t,d] by its angle [b,1,t,d/2]."""
    first, second = x.chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return rotated.to(x.dtype)


class KvCache:
    """KV cache: keys and values of the tokens so far, in one buffer of a fixed capacity."""

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.layers, 2, batch, config.kv_heads, capacity, config.head_width)  # 2: k, v
        self.buffer = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.buffer.shape[4]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value [b,a,t,d] of one layer; returns those of all tokens [b,a,k,d].

        Raises `DocumentError` beyond the capacity. `length` advances only after all layers."""
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise DocumentError(
                "the document is longer than the key-value cache",
                expected=f"at most {self.capacity} tokens",
                got=end,
                fix="give the cache a larger capacity or shorten the document",
            )
        self.buffer[layer, 0, :, :, self.length : end] = key
        self.buffer[layer, 1, :, :, self.length : end] = value
        return self.buffer[layer, 0, :, :, :end], self.buffer[layer, 1, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Continue `rows` [n] of the batch in its place; a row may be taken several times."""
        self.buffer = self.buffer.index_select(2, rows)

    def advance(self, tokens: int) -> None:
        """Count `tokens` tokens that every layer has appended."""
        self.length += tokens


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions, in some layers without; its norms of
    queries and keys are the identity where the configuration has none."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_width = config.head_width
        self.group = config.heads // config.kv_heads
        self.rotary = layer not in config.layers_without_rope
        width, kv_width = config.heads * config.head_width, config.kv_heads * config.head_width
        self.q_proj = nn.Linear(config.width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.width, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.head_width, config.eps) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KvCache | None,
    ) -> Tensor:
        query, key, value = (
            proj(hidden).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # [b, h, t, d], [b, a, t, d] twice
        query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            key, value = cache.update(self.layer, key, value)  # [b, a, k, d]
        if self.training and query.device.type == "cpu":
            attended = self._attend_in_training(query, key, value, mask)
        else:
            causal = mask is None and query.shape[2] == key.shape[2]
            attended = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=self.group > 1
            )  # [b, h, t, d]
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _attend_in_training(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Attention as two matrix products: on a CPU their backward pass is faster than that of the
        fused attention."""
        if self.group > 1:
            key, value = (x.repeat_interleave(self.group, 1) for x in (key, value))
        score = (query * self.head_width**-0.5) @ key.transpose(2, 3)  # [b, h, t, k]
        if bias is not None:
            score = score + bias.to(score.dtype)
        return score.softmax(-1) @ value


class Mlp(nn.Module):
    """Gated MLP with SiLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class GatedMmfs(nn.Module):
    """MMFS in the language model: every token samples around the centre of each image it may see.

    The output is scaled by tanh(gate), which starts at 0, so that training starts from plain LLaMA.
    """

    def __init__(
        self, config: LlamaConfig, mmfs: MmfsConfig, feature_width: int, level_sides: Sequence[int]
    ) -> None:
        super().__init__()
        assert mmfs.base_grid is not None, "tokens have no map of their own: base_grid must be set"
        self.gate = nn.Parameter(torch.zeros(1))
        self.query_norm = nn.RMSNorm(config.width, config.eps)
        self.value_norm = nn.RMSNorm(feature_width, config.eps)
        self.mmfs = Mmfs(
            mmfs, config.width, feature_width, config.width, level_sides, mmfs.base_grid
        )

    def values(self, features: Tensor) -> Tensor:
        """Features [n,s,c] of this layer's levels -> values [n,s,h,d]."""
        return self.mmfs.values(self.value_norm(features))

    def forward(
        self, hidden: Tensor, value: Tensor, image_slot: Tensor, image_position: Tensor
    ) -> Tensor:
        """hidden [b,t,c], value [n,s,h,d], image_slot [b,m], image_position [b,t,m] -> [b,t,c]."""
        centre = torch.full((1, 2), 0.5, device=hidden.device)
        query = self.query_norm(hidden)
        return self.gate.tanh() * self.mmfs(query, value, image_slot, image_position, centre)


class Block(nn.Module):
    """Pre-norm residual block: self-attention, MMFS (in some blocks), MLP."""

    def __init__(self, config: LlamaConfig, layer: int, look_back: GatedMmfs | None) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, config.eps)
        self.self_attn = Attention(config, layer)
        self.look_back = look_back
        self.post_attention_layernorm = nn.RMSNorm(config.width, config.eps)
        self.mlp = Mlp(config)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KvCache | None,
        value: Tensor | None,
        image_slot: Tensor | None,
        image_position: Tensor | None,
    ) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, mask, cache)
        if self.look_back is not None and value is not None:
            hidden = hidden + self.look_back(hidden, value, image_slot, image_position)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Llama(nn.Module):
    """Embeddings to hidden states. `level_sides`: sides of all maps of an image, finest first."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, config: LlamaConfig, mmfs: MmfsConfig, feature_width: int, level_sides: Sequence[int]
    ) -> None:
        super().__init__()
        self.config = config
        self.levels = mmfs.levels
        self.level_sides = tuple(level_sides)
        # Recompute every block in the backward pass instead of keeping its activations.
        self.gradient_checkpointing = False
        own_sides = [self.level_sides[level] for level in mmfs.levels]
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        mmfs_layers = {
            layer: GatedMmfs(config, mmfs, feature_width, own_sides) for layer in config.mmfs_layers
        }
        self.layers = nn.ModuleList(
            Block(config, layer, mmfs_layers.get(layer)) for layer in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.width, config.eps)
        with with_values():
            cos, sin = rotary_tables(
                config.context, config.head_width, config.rope_theta, config.rope_divisors
            )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw LLaMA's N(0, 0.02), for W_q and W_A of MMFS too; biases are zero, norms one, and the
        rest of MMFS keeps its own initialisation."""
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for block in self.blocks:
            layers = [
                layer
                for part in (block.self_attn, block.mlp)
                for layer in part.modules()
                if isinstance(layer, nn.Linear)
            ]
            drawn: list[Tensor] = [layer.weight for layer in layers]
            for layer in layers:
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            if block.look_back is not None:
                mmfs = block.look_back.mmfs
                drawn += [mmfs.query_proj.weight, mmfs.weight_proj.weight]
            for weight in drawn:
                nn.init.normal_(weight, std=0.02)

    @property
    def blocks(self) -> list[Block]:
        """`layers` with its type."""
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def mmfs_layers(self) -> list[GatedMmfs]:
        """The MMFS layers, in running order: those of the blocks `config.mmfs_layers`."""
        return [block.look_back for block in self.blocks if block.look_back is not None]

    def image_values(self, features: Tensor) -> list[Tensor]:
        """Features [n,s,c] of all levels -> the values [n,s,h,d] of every MMFS layer, s the cells
        of its own levels."""
        own = take_levels(features, self.level_sides, self.levels)
        return [mmfs.values(own) for mmfs in self.mmfs_layers]

    def forward(
        self,
        embeddings: Tensor,
        position: Tensor,
        mask: Tensor | None = None,
        cache: KvCache | None = None,
        values: Sequence[Tensor] | None = None,
        image_slot: Tensor | None = None,
        image_position: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [b,t,c] -> hidden states [b,t,c] after the last norm.

        position [b,t]; mask bool [b,1,t,k], True where a key may be seen (None: causal); values
        from `image_values` with image_slot [b,m] (row of the pool) and image_position [b,t,m]
        (0 hidden, 1 nearest), or None for no images.
        """
        rotary = self.cos[position].unsqueeze(1), self.sin[position].unsqueeze(1)
        visible = self._attention_mask(embeddings, mask, cache)
        value_of = {} if values is None else dict(zip(self.config.mmfs_layers, values, strict=True))
        hidden = embeddings
        for layer, block in enumerate(self.layers):
            value = value_of.get(layer)
            arguments = (hidden, rotary, visible, cache, value, image_slot, image_position)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                hidden = checkpoint(block, *arguments, use_reentrant=False)
            else:
                hidden = block(*arguments)
        if cache is not None:
            cache.advance(embeddings.shape[1])
        return self.norm(hidden)

    def _attention_mask(
        self, embeddings: Tensor, mask: Tensor | None, cache: KvCache | None
    ) -> Tensor | None:
        """The mask as `Attention` takes it, built once for all layers: bool, a bias in fp32 for
        training on a CPU, or None for causal attention that needs no mask."""
        tokens = embeddings.shape[1]
        spelled_out = self.training and embeddings.device.type == "cpu"
        if mask is None:
            past = cache.length if cache is not None else 0
            if tokens == 1 or (past == 0 and not spelled_out):
                return None
            ones = torch.ones(tokens, past + tokens, dtype=torch.bool, device=embeddings.device)
            mask = ones.tril(past)
        if not spelled_out:
            return mask
        # The lowest number that is finite in fp32 and bf16: a fully masked row stays finite.
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.bfloat16).min)
