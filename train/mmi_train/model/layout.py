"""Layout of a batch: the indices by which tokens find their images, and pictures their contexts.

Made from token ids alone, with NumPy, wherever the batch is made: with a layout in the batch the
model's forward pass copies nothing from a GPU to the host, and waits for nothing.

Letters: b batch, t tokens, m image slots, w wanted positions, j pictures to draw, x context tokens,
n encoded images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmi_deploy.spec import token_layout
from mmi_deploy.spec.config import ModelConfig
from mmi_train.model.losses import IGNORE

# Context tokens, `<s>` and begin-of-image, of a picture with nothing before it: it is not trained.
EMPTY_CONTEXT = 2

BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class RowLayout:
    """Images of each token. `visual_index` [b, t]: see `token_layout.visual_index`. `image_slot`
    [b, m] and `image_position` [b, t, m]: the images that any token sees, and their positions.

    `position` [b, t]: rotary positions. `mask` bool [b, 1, t, t]: True where a key may be seen;
    None: a row is causal from its first token on.
    """

    visual_index: Tensor
    image_slot: Tensor
    image_position: Tensor
    position: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class PictureLayout:
    """Contexts of pictures, and the earlier images that each sees.

    `row` [j, 1] and `column` [j, x]: context tokens from the begin-of-image token backwards, `real`
    [j, x] where there is one, `length` [j]. `used` [n]: the encoded images that any picture sees;
    `slot` [j, m] (row of `used`) and `position` [j, m] (0 hidden, 1 the image before). `seeing`:
    the pictures that see any image, at most j numbers; None: all.
    """

    row: Tensor
    column: Tensor
    real: Tensor
    length: Tensor
    used: Tensor
    slot: Tensor
    position: Tensor
    seeing: Tensor | None


@dataclass(frozen=True)
class Layout:
    """Layout of a whole batch. `drawn` [j]: which of the batch's pictures have a context and a
    weight, and so a loss; `pictures`: their layout, None without any. `target_row`, `target_column`
    [w]: text targets that count."""

    rows: RowLayout
    drawn: Tensor
    pictures: PictureLayout | None
    target_row: Tensor
    target_column: Tensor


def row_layout(
    token_ids: NDArray[Any],
    image_slot: NDArray[Any],
    config: ModelConfig,
    *,
    isolated: bool = False,
) -> RowLayout:
    """Layout of rows; see `Batch` for `token_ids` [b, t] and `image_slot` [b, m].

    `isolated`: positions restart at every `<s>` and a mask hides earlier documents, so that a
    packed document gives what it gives alone. Raises `DocumentError`.
    """
    slot, position = token_layout.only_seen(
        image_slot, image_positions(token_ids, image_slot, config)
    )
    column = np.arange(token_ids.shape[1])
    mask = None
    places = np.broadcast_to(column, token_ids.shape)
    if isolated:
        starts = token_layout.document_starts(token_ids, config.tokens).clip(min=0)
        places = column - starts
        if starts.any():
            causal = column[None, :] <= column[:, None]
            mask = (causal & (column[None, None, :] >= starts[:, :, None]))[:, None]
    index = token_layout.visual_index(token_ids, config.tokens, image_slot, config.visual_tokens)
    return RowLayout(
        _tensor(index),
        _tensor(slot.clip(min=0)),
        _tensor(position),
        _tensor(places),
        None if mask is None else _tensor(mask),
    )


def image_positions(
    token_ids: NDArray[Any], image_slot: NDArray[Any], config: ModelConfig
) -> NDArray[np.int32]:
    """Position of every image as seen from each token, [b, t, m]: 1 the nearest image, 0 hidden;
    images without visual tokens are hidden."""
    position = token_layout.image_positions(
        token_ids, config.tokens, image_slot.shape[1], config.llm_mmfs.images_seen
    )
    return position * (image_slot >= 0)[:, None]


def picture_layout(
    token_ids: NDArray[Any],
    image_slot: NDArray[Any],
    pictures: NDArray[Any],
    config: ModelConfig,
) -> PictureLayout:
    """Layout of `pictures` [j, 2]: (row, image of the row).

    Images that no picture sees are dropped, and so are unused columns, so that no MMFS value is
    computed unnecessarily.
    """
    row, image = pictures.T
    images = max(token_layout.image_count(token_ids, config.tokens), 1)
    start, stop = token_layout.context_ranges(token_ids, config.tokens, images)[row, image].T
    length = stop - start
    backwards = stop[:, None] - 1 - np.arange(length.max(initial=1))  # [j, x]
    real = backwards >= start[:, None]
    seen = config.image_decoder.mmfs.images_seen
    positions = token_layout.picture_positions(token_ids, config.tokens, image_slot.shape[1], seen)
    slot, position = token_layout.only_seen(
        image_slot[row], positions[row, image] * (image_slot[row] >= 0)
    )
    used = np.unique(slot[position > 0])
    used = used if len(used) else np.zeros(1, slot.dtype)
    seeing = np.flatnonzero((position > 0).any(axis=1))
    return PictureLayout(
        row=_tensor(row[:, None]),
        column=_tensor(np.where(real, backwards, 0)),
        real=_tensor(real),
        length=_tensor(length),
        used=_tensor(used),
        slot=_tensor(np.searchsorted(used, slot).clip(max=len(used) - 1)),
        position=_tensor(position),
        seeing=None if len(seeing) == len(position) else _tensor(seeing),
    )


def layout_of(
    token_ids: Tensor,
    image_slot: Tensor,
    pictures: Tensor | None,
    text_target: Tensor,
    config: ModelConfig,
    *,
    picture_weight: Tensor | None = None,
    isolated: bool = False,
) -> Layout:
    """Layout of a batch on the CPU; see `Batch` for the arguments. Raises `DocumentError`."""
    ids, slots = token_ids.numpy(), image_slot.numpy()
    target_row, target_column = np.nonzero(text_target.numpy() != IGNORE)
    drawn, layout = np.zeros(0, np.int64), None
    if pictures is not None and len(pictures):
        wanted = pictures.numpy()
        images = max(token_layout.image_count(ids, config.tokens), 1)
        ranges = token_layout.context_ranges(ids, config.tokens, images)
        start, stop = ranges[wanted[:, 0], wanted[:, 1]].T
        counts = stop - start > EMPTY_CONTEXT
        if picture_weight is not None:
            counts &= picture_weight.numpy() != 0
        drawn = np.flatnonzero(counts)
        if len(drawn):
            layout = picture_layout(ids, slots, wanted[drawn], config)
    return Layout(
        row_layout(ids, slots, config, isolated=isolated),
        _tensor(drawn),
        layout,
        _tensor(target_row),
        _tensor(target_column),
    )


def map_tensors(batch: BatchT, function: Callable[[Tensor], Tensor]) -> BatchT:
    """Copy of a batch with `function` of each tensor, in dataclasses and tuples at any depth."""
    if isinstance(batch, Tensor):
        return function(batch)  # type: ignore[return-value]
    if isinstance(batch, tuple):
        parts = [map_tensors(part, function) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)  # type: ignore[return-value]
    if is_dataclass(batch) and not isinstance(batch, type):
        values = {
            field.name: map_tensors(getattr(batch, field.name), function) for field in fields(batch)
        }
        return type(batch)(**values)
    return batch


def moved(batch: BatchT, device: torch.device) -> BatchT:
    """Copy of a batch on `device`; pinned memory is copied without waiting."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array))  # a copy: broadcast arrays cannot be written to
