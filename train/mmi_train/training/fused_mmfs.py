"""The fused MMFS operator in training: Triton kernels on CUDA in the place of the definition.

The definition (`model.deformable`) is tensor algebra: it reads the pool of images through an
embedding bag and sorts its rows in the backward pass. The fused operator
(`mmi_plugins.torch.op`) is one kernel each way and keeps its inputs alone for the backward pass.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from mmi_deploy.spec.mmfs_operator import CHANNEL_STEP, MAX_CHANNELS, MAX_LEVELS, MAX_POINTS
from mmi_train.model.mmfs import Mmfs


def use_fused_mmfs(model: nn.Module, device: torch.device) -> int:
    """Let the MMFS layers of `model` run as the fused operator if it will train on a CUDA device
    where Triton is installed; elsewhere the definition is faster and stays. Returns the number of
    fused layers. Layers of sizes that the kernels do not take keep the definition."""
    if device.type != "cuda" or not find_spec("triton"):
        return 0
    layers = [layer for layer in model.modules() if isinstance(layer, Mmfs) and _fits(layer)]
    for layer in layers:
        layer.operator = fused_attention
    return len(layers)


def _fits(layer: Mmfs) -> bool:
    """True for a layer within the kernels' limits."""
    channels = layer.config.value_width // layer.config.heads
    return (
        channels % CHANNEL_STEP == 0
        and channels <= MAX_CHANNELS
        and len(layer.level_sides) <= MAX_LEVELS
        and layer.config.points <= MAX_POINTS
    )


def fused_attention(
    value: Tensor,
    image_slot: Tensor,
    offsets: Tensor,
    logits: Tensor,
    offset_table: Tensor,
    logit_table: Tensor,
    image_position: Tensor,
    reference: Tensor,
    null_value: Tensor,
    **attributes: Any,
) -> Tensor:
    """Run the fused operator on the inputs of `multi_image_deformable_attention`, each in the type
    that the kernels take: offsets and logits in that of `value`, tables in fp32, indices in int32.
    """
    from mmi_plugins.torch.op import multi_image_deformable_attention

    wide = torch.promote_types(value.dtype, torch.float32)
    return multi_image_deformable_attention(
        value,
        image_slot.to(torch.int32),
        offsets.to(value.dtype),
        logits.to(value.dtype),
        offset_table.to(wide),
        logit_table.to(wide),
        image_position.to(torch.int32),
        reference.to(wide),
        null_value.to(wide),
        **attributes,
    )
