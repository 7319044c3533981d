"""Fold successive linear maps of MMFS into one, by exact algebra.

The paper's Eq. (4) projects every query once per image, W(W_q f + e_m). Since W is linear,

    W_p (W_q f + b_q + e_m) + b_p = (W_p W_q) f + [W_p (b_q + e_m) + b_p]

is one small projection of the query plus a row of a table by relative image position, and likewise
for W_A. The released form's extra output per (head, level), which nothing reads, is dropped. What
follows the output projection (the gate of the language model, the 1x1 convolution of the U-Net) is
folded into it. All products are taken in float64 and rounded once.

Letters: b batch, q queries, n encoded images, m image slots, s feature cells, l levels, h heads,
p points, d channels per head, c channels, r table rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmi_export.graphs import operators
from mmi_train.model import llama, unet
from mmi_train.model.mmfs import Mmfs


class Affine(NamedTuple):
    """Affine map x -> weight x + bias, in float64."""

    weight: Tensor
    bias: Tensor

    def after(self, first: Affine) -> Affine:
        """Compose: the map that applies `first`, then this one."""
        return Affine(self.weight @ first.weight, self.weight @ first.bias + self.bias)


def affine(layer: nn.Linear | nn.Conv2d) -> Affine:
    """Weight and bias of a linear layer or a 1x1 convolution, in float64."""
    assert layer.bias is not None
    return Affine(layer.weight.detach().double().flatten(1), layer.bias.detach().double())


class FoldedMmfs(nn.Module):
    """`Mmfs` with its projections folded; `output` replaces its output projection."""

    def __init__(self, mmfs: Mmfs, output: Affine) -> None:
        super().__init__()
        config = mmfs.config
        self.heads, self.points = config.heads, config.points
        self.level_sides, self.base_grid = mmfs.level_sides, mmfs.base_grid
        self.null_slot = config.null_slot
        query = affine(mmfs.query_proj)
        shifted = mmfs.image_index.weight.detach().double() + query.bias  # [r, c]
        offset, weight = affine(mmfs.offset_proj), affine(mmfs.weight_proj)
        offset_table = mmfs.offsets(F.linear(shifted, *offset))  # [r, h, p, 2]
        logit_table = mmfs.logits(F.linear(shifted, *weight))  # [r, h, l, p]
        logit_rows = mmfs.logits((weight.weight @ query.weight).T).flatten(1).T  # [h*l*p, c]
        self.query_weight = _constant(torch.cat([offset.weight @ query.weight, logit_rows]))
        self.offset_table = _constant(offset_table)
        self.logit_table = _constant(logit_table)
        self.null_value = _constant(mmfs.null_value.detach().view(self.heads, -1))
        self.output_weight, self.output_bias = _constant(output.weight), _constant(output.bias)

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        image_slot: Tensor,
        image_position: Tensor,
        reference: Tensor,
    ) -> Tensor:
        """Compute `Mmfs.forward`: query [b, q, c], value [n, s, h, d], ... -> [b, q, c]."""
        widths = (self.heads * self.points * 2, self.heads * len(self.level_sides) * self.points)
        offsets, logits = F.linear(query, self.query_weight).split(widths, -1)
        sampled = operators.mmfs(
            value,
            image_slot,
            offsets.unflatten(-1, (self.heads, self.points, 2)),
            logits.unflatten(-1, (self.heads, len(self.level_sides), self.points)),
            self.offset_table,
            self.logit_table,
            image_position,
            reference,
            self.null_value,
            level_sides=self.level_sides,
            base_grid=self.base_grid,
            null_slot=self.null_slot,
        )
        return F.linear(sampled, self.output_weight, self.output_bias)


class FoldedGatedMmfs(nn.Module):
    """`llama.GatedMmfs` with its gate folded into the output projection."""

    def __init__(self, layer: llama.GatedMmfs) -> None:
        super().__init__()
        self.query_norm = layer.query_norm
        gate = layer.gate.detach().double().tanh()
        output = affine(layer.mmfs.output_proj)
        self.mmfs = FoldedMmfs(layer.mmfs, Affine(gate * output.weight, gate * output.bias))
        self.centre = _constant(torch.full((1, 2), 0.5))

    def forward(
        self, hidden: Tensor, value: Tensor, image_slot: Tensor, image_position: Tensor
    ) -> Tensor:
        query = self.query_norm(hidden)
        return self.mmfs(query, value, image_slot, image_position, self.centre)


class FoldedMmfsBlock(nn.Module):
    """`unet.MmfsBlock` with its convolution folded into the output projection."""

    def __init__(self, block: unet.MmfsBlock) -> None:
        super().__init__()
        self.query_norm = block.query_norm
        output = affine(block.conv).after(affine(block.mmfs.output_proj))
        self.mmfs = FoldedMmfs(block.mmfs, output)
        self.positions = _constant(block.get_buffer("positions"))
        self.reference = _constant(block.get_buffer("reference"))

    def forward(
        self, x: Tensor, value: Tensor, image_slot: Tensor, image_position: Tensor
    ) -> Tensor:
        cells = x.permute(0, 2, 3, 1)  # [b, side, side, c]
        query = self.query_norm(cells.flatten(1, 2)) + self.positions
        update = self.mmfs(query, value, image_slot, image_position[:, None], self.reference)
        return x + update.view_as(cells).permute(0, 3, 1, 2)


class FoldedValues(nn.Module):
    """`values` of several MMFS layers of one kind: one norm without weights, a projection each."""

    def __init__(self, layers: Sequence[llama.GatedMmfs] | Sequence[unet.MmfsBlock]) -> None:
        super().__init__()
        first = layers[0].value_norm
        assert first.eps is not None
        self.eps = first.eps
        self.centred = isinstance(first, nn.LayerNorm)
        self.heads = layers[0].mmfs.config.heads
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for layer in layers:
            norm = layer.value_norm
            assert type(norm) is type(first) and norm.eps == first.eps
            weight, bias = affine(layer.mmfs.value_proj)
            if isinstance(norm, nn.LayerNorm):
                bias = bias + weight @ norm.bias.detach().double()
            self.weights.append(_constant(weight * norm.weight.detach().double()))
            self.biases.append(_constant(bias))

    def forward(self, features: Tensor) -> list[Tensor]:
        """Project features [n, s, c] of the layers' levels to values [n, s, h, d] of each layer."""
        width = features.shape[-1:]
        if self.centred:
            normed = F.layer_norm(features, width, eps=self.eps)
        else:
            normed = F.rms_norm(features, width, eps=self.eps)
        return [
            F.linear(normed, weight, bias).unflatten(-1, (self.heads, -1))
            for weight, bias in zip(self.weights, self.biases, strict=True)
        ]


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.float().contiguous(), requires_grad=False)
