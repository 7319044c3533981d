"""Functions for ONNX operators without a counterpart in PyTorch.

During export each function emits one node; in eager mode it computes the same result, so that
modules which call it can be tested without ONNX.

Letters: b batch, t tokens, w wanted positions, k keys, a key-value heads, d channels per head,
c channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmi_deploy.spec.graphs import MMFS_DOMAIN, MMFS_OPERATOR, MMFS_VERSION, OPSET
from mmi_train.model.deformable import multi_image_deformable_attention


def mmfs(
    value: Tensor,
    image_slot: Tensor,
    offsets: Tensor,
    logits: Tensor,
    offset_table: Tensor,
    logit_table: Tensor,
    image_position: Tensor,
    reference: Tensor,
    null_value: Tensor,
    *,
    level_sides: Sequence[int],
    base_grid: float,
    null_slot: bool,
) -> Tensor:
    """Apply the MMFS operator to square maps; shapes as in `multi_image_deformable_attention`."""
    inputs = (
        value,
        image_slot,
        offsets,
        logits,
        offset_table,
        logit_table,
        image_position,
        reference,
        null_value,
    )
    if not torch.compiler.is_exporting():
        return multi_image_deformable_attention(
            *inputs,
            level_heights=level_sides,
            level_widths=level_sides,
            base_grid=base_grid,
            null_slot=null_slot,
        )
    sides = list(level_sides)
    attributes: dict[str, int | float | Sequence[int]] = {
        "level_heights": sides,
        "level_widths": sides,
        "base_grid": float(base_grid),
        "null_slot": int(null_slot),
    }
    batch, queries = logits.shape[:2]
    return torch.onnx.ops.symbolic(
        f"{MMFS_DOMAIN}::{MMFS_OPERATOR}",
        inputs,
        attributes,  # type: ignore[arg-type]
        dtype=value.dtype,
        shape=(batch, queries, value.shape[2] * value.shape[3]),
        version=MMFS_VERSION,
    )


def tensor_scatter(cache: Tensor, update: Tensor, write_index: Tensor) -> Tensor:
    """Write `update` [b, a, t, d] into `cache` [b, a, k, d] from slot `write_index[b]` on."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (cache, update, write_index),
            {"axis": 2, "mode": "linear"},
            dtype=cache.dtype,
            shape=cache.shape,
            version=OPSET,
        )
    slots = write_index[:, None] + torch.arange(update.shape[2])  # [b, t]
    return cache.scatter(2, slots[:, None, :, None].expand_as(update), update)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Gather `rows` [b, t, c] at `index` [b, w] of each batch entry: [b, w, c]."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "GatherND",
            (rows, index.unsqueeze(-1)),
            {"batch_dims": 1},
            dtype=rows.dtype,
            shape=(*index.shape, rows.shape[2]),
            version=OPSET,
        )
    return rows.take_along_dim(index.unsqueeze(-1), 1)
