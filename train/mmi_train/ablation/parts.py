"""Parts that ablations put in the place of the model's own: no MMFS, dense attention, no resampler.

Each has the interface of the part that it replaces, so that the model runs unchanged.

Letters: b batch, q queries, m image slots, h heads, d channels per head, n encoded images,
s feature cells, c channels, v visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_deploy.spec.config import ResamplerConfig
from mmi_train.model.attention import join_heads, split_heads
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.model.mmfs import Mmfs
from mmi_train.model.resampler import Resampler


class DenseAttention(nn.Module):
    """Cross-attention of every query to all cells of the images that it sees, in the place of an
    MMFS layer (paper Table 6, "Dense").

    `tokens`: a resampler, with as many queries, stands between the cells and the attention (Table
    6, transition "Resampler", Flamingo's cross-attention); None: none does.
    """

    def __init__(self, mmfs: Mmfs, tokens: int | None = None) -> None:
        super().__init__()
        self.heads = mmfs.config.heads
        query_width, cell_width = mmfs.query_proj.in_features, mmfs.value_proj.in_features
        width = mmfs.config.value_width
        self.transition: nn.Module = nn.Identity()
        if tokens is not None:
            self.transition = Resampler(
                ResamplerConfig(
                    form="perceiver",
                    queries=tokens,
                    width=cell_width,
                    context_width=cell_width,
                    layers=1,
                    heads=mmfs.config.heads,
                    mlp_width=2 * cell_width,
                    eps=1e-6,
                )
            )
        # The output of pictures that see nothing is that of this value, as in `Mmfs`.
        self.register_buffer("null_value", torch.zeros(width), persistent=False)
        self.query_proj = nn.Linear(query_width, width)
        self.key_value_proj = nn.Linear(cell_width, 2 * width)
        self.output_proj = nn.Linear(width, mmfs.output_proj.out_features)
        for layer in (self.query_proj, self.key_value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def values(self, features: Tensor) -> Tensor:
        """Features [n, s, c] -> keys and values [n, s, h, 2 * d]; with a resampler s is its number
        of queries."""
        keys, values = self.key_value_proj(self.transition(features)).chunk(2, -1)
        split = [part.unflatten(-1, (self.heads, -1)) for part in (keys, values)]
        return torch.cat(split, -1)

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        image_slot: Tensor,
        image_position: Tensor,
        reference: Tensor,
    ) -> Tensor:
        """Arguments as `Mmfs.forward`; the reference points are not used. A query that sees no
        image gets the output of a value of zero."""
        keys_values = value[image_slot.clamp(min=0).long()]  # [b, m, s, h, 2 * d]
        cells = keys_values.shape[2]
        keys_values = F.pad(keys_values.flatten(1, 2), (0, 0, 0, 0, 0, 1))  # a zero for all to see
        key, values = keys_values.transpose(1, 2).chunk(2, -1)  # [b, h, m * s + 1, d]
        seen = (image_position > 0).repeat_interleave(cells, -1)  # [b, q | 1, m * s]
        mask = F.pad(seen, (0, 1), value=True)[:, None]
        attended = F.scaled_dot_product_attention(
            split_heads(self.query_proj(query), self.heads), key, values, mask
        )
        return self.output_proj(join_heads(attended))


class LearnedTokens(nn.Module):
    """Learned embeddings, the same for every image, in the place of the resampler of the visual
    tokenizer (paper Table 8)."""

    def __init__(self, resampler: Resampler) -> None:
        super().__init__()
        shape = (1, resampler.config.queries, resampler.config.width)
        self.rows = nn.Parameter(torch.randn(shape))

    def forward(self, context: Tensor) -> Tensor:
        """Context [n, s, c] -> [n, v, c]."""
        return self.rows.expand(len(context), -1, -1)


def mmfs_layers(model: MMInterleaved) -> Iterator[nn.Module]:
    """Modules that hold an MMFS layer as `mmfs`: of the language model, then of the U-Net."""
    yield from model.llm.mmfs_layers
    yield from model.image_decoder.unet.look_back


def without_mmfs(model: MMInterleaved) -> None:
    """Let MMFS add zero; as `FROZEN` says, it stays so."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("look_back.gate") or (".look_back." in name and ".conv." in name):
                parameter.zero_()


def _dense(model: MMInterleaved, tokens: int | None = None) -> None:
    for layer in mmfs_layers(model):
        assert isinstance(layer.mmfs, Mmfs)
        layer.mmfs = DenseAttention(layer.mmfs, tokens)


def dense_resampled(model: MMInterleaved) -> None:
    """Dense attention to as many resampled tokens as the model has visual tokens."""
    _dense(model, model.config.visual_tokens)


def without_resampler(model: MMInterleaved) -> None:
    """Learned embeddings as visual tokens."""
    assert isinstance(model.vision.resampler, Resampler)
    model.vision.resampler = LearnedTokens(model.vision.resampler)  # type: ignore[assignment]


# Changes of a model by name, in which rows of studies say them.
PARTS: Mapping[str, Callable[[MMInterleaved], None]] = {
    "no MMFS": without_mmfs,
    "dense": _dense,
    "dense, resampled": dense_resampled,
    "no resampler": without_resampler,
}

# Weights of MMFS, as a pattern of names.
MMFS = r"look_back\."

# Weights that a change keeps from learning, as patterns of names.
FROZEN: Mapping[str, str] = {"no MMFS": MMFS}
