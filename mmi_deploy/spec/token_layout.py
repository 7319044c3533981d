"""Token layout of packed rows: positions of images, their visibility, and contexts of pictures.

Training, generation and the runtime share this definition. A row may hold several documents, each
from one `<s>` to the next. Image i of a row belongs to its i-th begin-of-image token (BoI); the
image's visual tokens follow the BoI, or none if the picture is only drawn.

Letters: b batch, t tokens, m image slots, v visual tokens, c channels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.config import TokenConfig

_NOWHERE = np.iinfo(np.int64).max


def image_count(token_ids: ArrayLike, tokens: TokenConfig) -> int:
    """Largest number of images in any row of `token_ids` [b, t]."""
    ids = np.asarray(token_ids)
    return int((ids == tokens.boi).sum(axis=1).max(initial=0))


def document_starts(token_ids: ArrayLike, tokens: TokenConfig) -> NDArray[np.int64]:
    """Column of the start of each token's document, [b, t]: the last `<s>` at or before the token,
    -1 if there is none."""
    ids = np.asarray(token_ids)
    here = np.where(ids == tokens.bos, np.arange(ids.shape[1]), -1)
    return np.maximum.accumulate(here, axis=1)


def boi_columns(token_ids: ArrayLike, tokens: TokenConfig, images: int) -> NDArray[np.int64]:
    """Column of each image's BoI, [b, m]; the largest int64 where a row has fewer images.

    Raises `DocumentError` if a row has more than `images`.
    """
    ids = np.asarray(token_ids)
    is_boi = ids == tokens.boi
    most = int(is_boi.sum(axis=1).max(initial=0))
    if most > images:
        raise DocumentError("a row has too many images", expected=f"at most {images}", got=most)
    columns = np.full((len(ids), images), _NOWHERE, dtype=np.int64)
    row, column = np.nonzero(is_boi)
    columns[row, np.cumsum(is_boi, axis=1)[row, column] - 1] = column
    return columns


def image_positions(
    token_ids: ArrayLike, tokens: TokenConfig, images: int, seen: int
) -> NDArray[np.int32]:
    """Relative position of each image as seen from each token, [b, t, m]: 1 nearest, 0 hidden.

    An image is visible from the token after its BoI up to the next `<s>` (paper Sec. 3.2: a token
    sees the images before it), if it is among the `seen` nearest.
    """
    ids = np.asarray(token_ids)
    first = boi_columns(ids, tokens, images)[:, None, :]  # [b, 1, m]
    column = np.arange(ids.shape[1])[None, :, None]
    start = document_starts(ids, tokens)[:, :, None]
    visible = (first < column) & (first >= start)
    position = np.cumsum(visible[:, :, ::-1], axis=2)[:, :, ::-1] * visible
    return np.where(position <= seen, position, 0).astype(np.int32)


def picture_positions(
    token_ids: ArrayLike, tokens: TokenConfig, images: int, seen: int
) -> NDArray[np.int32]:
    """Relative position of each image as seen from each picture, [b, m (picture), m (image)]: 1 for
    the image before the picture, 0 hidden.

    The `seen` nearest of the earlier images of the same document are visible.
    """
    ids = np.asarray(token_ids)
    columns = boi_columns(ids, tokens, images)
    start = context_ranges(ids, tokens, images)[:, :, None, 0]  # [b, m, 1]
    back = np.arange(images)[:, None] - np.arange(images)[None, :]
    present = columns != _NOWHERE
    visible = (back > 0) & (back <= seen) & (columns[:, None, :] >= start) & present[:, :, None]
    return np.where(visible, back, 0).astype(np.int32)


def context_ranges(token_ids: ArrayLike, tokens: TokenConfig, images: int) -> NDArray[np.int64]:
    """Columns [start, end) of the context from which each picture is drawn, [b, m, 2].

    The context begins with the picture's `<s>` (the row's first token if there is none) and ends
    with its BoI. (0, 0) where a row has fewer images.
    """
    ids = np.asarray(token_ids)
    columns = boi_columns(ids, tokens, images)
    present = columns != _NOWHERE
    at = np.where(present, columns, 0)
    start = np.maximum(np.take_along_axis(document_starts(ids, tokens), at, axis=1), 0)
    return np.stack([np.where(present, start, 0), np.where(present, at + 1, 0)], axis=2)


def visual_index(
    token_ids: ArrayLike, tokens: TokenConfig, image_slot: ArrayLike, visual_tokens: int
) -> NDArray[np.int64]:
    """Row of the flattened visual tokens [v, c] that replaces each token's embedding, [b, t]; -1
    for ordinary tokens.

    `image_slot` [b, m]: index of the encoded image of each image of the row; -1: its BoI has no
    visual tokens. `visual_tokens`: number of visual tokens per image. Raises `DocumentError` if the
    image tokens after a BoI do not agree with `image_slot`.
    """
    ids, slot = np.asarray(token_ids), np.asarray(image_slot, dtype=np.int64)
    columns = boi_columns(ids, tokens, slot.shape[1])
    is_image = ids == tokens.image
    row, image = np.nonzero((columns != _NOWHERE) & (slot >= 0))
    place = columns[row, image][:, None] + 1 + np.arange(visual_tokens)  # [images, visual_tokens]
    index = np.full(ids.shape, -1, dtype=np.int64)
    inside = place.max(initial=-1) < ids.shape[1]
    if inside:
        index[row[:, None], place] = slot[row, image][:, None] * visual_tokens + np.arange(
            visual_tokens
        )
    if not inside or not np.array_equal(index >= 0, is_image):
        raise DocumentError(
            "the image tokens of a row do not agree with its images",
            expected=f"{visual_tokens} image tokens right after each begin-of-image token",
            got=f"{int(is_image.sum())} image tokens for {len(row)} images",
        )
    return index


def only_seen(
    image_slot: NDArray[np.integer], position: NDArray[np.integer]
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Drop hidden images from `image_slot` [b, m] and `position` [b, ..., m].

    The results have as many columns as the row that sees most images needs, at least one. The
    order of the visible images is kept.
    """
    seen = (position > 0).reshape(len(position), -1, position.shape[-1]).any(axis=1)  # [b, m]
    columns = max(int(seen.sum(axis=1).max(initial=0)), 1)
    kept = np.argsort(~seen, axis=1, kind="stable")[:, :columns]
    between = (1,) * (position.ndim - 2)
    index = kept.reshape(len(kept), *between, columns)
    return (
        np.take_along_axis(image_slot, kept, axis=1),
        np.take_along_axis(
            position, np.broadcast_to(index, (*position.shape[:-1], columns)), axis=-1
        ),
    )
