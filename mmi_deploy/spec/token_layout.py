"""Where the images of packed token rows are, who may see them, and what each picture is drawn from.

One definition for training, generation and the runtime. A row may hold several documents, each
from one `<s>` to the next. Image k of a row is the one that its k-th begin-of-image token (BoI)
announces; the image's visual tokens follow it, or none when its picture is only drawn.

Letters: b rows, t tokens, m images of a row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.config import TokenConfig

_NOWHERE = np.iinfo(np.int64).max


def image_count(token_ids: ArrayLike, tokens: TokenConfig) -> int:
    """The most images that any row of `token_ids` [b, t] holds."""
    ids = np.asarray(token_ids)
    return int((ids == tokens.boi).sum(axis=1).max(initial=0))


def document_starts(token_ids: ArrayLike, tokens: TokenConfig) -> NDArray[np.int64]:
    """[b, t]: where each token's document starts, the latest `<s>` at or before it; -1 if none."""
    ids = np.asarray(token_ids)
    here = np.where(ids == tokens.bos, np.arange(ids.shape[1]), -1)
    return np.maximum.accumulate(here, axis=1)


def boi_columns(token_ids: ArrayLike, tokens: TokenConfig, images: int) -> NDArray[np.int64]:
    """[b, m]: the column of each image's BoI; the greatest int64 where a row has fewer images.

    Raises `DocumentError` when a row has more than `images`.
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
    """[b, t, m]: how far back each image lies from each token: 1 the nearest, 0 hidden.

    Image k is visible from the token after its BoI up to the next `<s>` (paper Sec. 3.2: a token
    sees the images before it), as far as it is among the `seen` nearest.
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
    """[b, m, m]: for picture i of a row, how far back image k lies: 1 the one before, 0 hidden.

    Visible are the earlier images of its document, as far as they are among the `seen` nearest.
    """
    ids = np.asarray(token_ids)
    columns = boi_columns(ids, tokens, images)
    start = context_ranges(ids, tokens, images)[:, :, None, 0]  # [b, m, 1]
    back = np.arange(images)[:, None] - np.arange(images)[None, :]
    present = columns != _NOWHERE
    visible = (back > 0) & (back <= seen) & (columns[:, None, :] >= start) & present[:, :, None]
    return np.where(visible, back, 0).astype(np.int32)


def context_ranges(token_ids: ArrayLike, tokens: TokenConfig, images: int) -> NDArray[np.int64]:
    """[b, m, 2]: first and one past the last column of the context that each picture is drawn from.

    The context reaches from the picture's `<s>` (the row's first token where it has none) to its
    BoI, both included. (0, 0) where a row has fewer images.
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
    """[b, t]: the row of the flattened visual tokens [n * visual_tokens, c] that stands in each
    token's place; -1 for ordinary tokens.

    `image_slot` [b, m]: which encoded image each image of the row is; -1: its BoI has no visual
    tokens. Raises `DocumentError` when the image ids after a BoI do not agree with that.
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
    """Drop the images that nobody looks at: `image_slot` [b, m] and `position` [b, ..., m] with as
    few columns as the row that sees most needs, one at least. The order of the others is kept."""
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
