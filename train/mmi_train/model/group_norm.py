"""Group normalisation computed in the type of its weights.

Under bf16 autocast the maps are bf16, in which PyTorch's group normalisation is several times
slower on a CPU, and less exact, than in fp32.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that first casts its input to the type of its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(
            x.to(self.weight.dtype), self.num_groups, self.weight, self.bias, self.eps
        )


def with_exact_group_norms(module: Model) -> Model:
    """Replace every `nn.GroupNorm` of `module` by a `GroupNorm` of the same parameters, in
    place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.GroupNorm:
                norm = GroupNorm(child.num_groups, child.num_channels, eps=child.eps)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(parent, name, norm)
    return module
