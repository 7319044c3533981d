"""Packing of token documents into rows of the context length, as in the published run.

Documents are concatenated into one stream, which is cut into rows. A document that is cut continues
in the next row without a new begin-of-document token; an image is never cut in two.

Letters: t tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import TokenConfig

ImageT = TypeVar("ImageT")
Truncation = Literal["image", "document"]


@dataclass(frozen=True)
class PackedRow(Generic[ImageT]):
    """One row: token ids [t] and its images in order. `document_start[i]` is the position of the
    latest begin-of-document token strictly before the begin-of-image token of image i, 0 without
    one."""

    token_ids: np.ndarray
    images: tuple[ImageT, ...]
    document_start: tuple[int, ...]


def _cut_at_length(
    ids: np.ndarray, length: int, tokens: TokenConfig, span: int, by: Truncation
) -> int:
    """Position of the cut in a stream of at least `length` tokens: `length`, or, if that lies
    within an image (`span` tokens, begin-of-image token included), before the image or its
    document."""
    boi = np.flatnonzero(ids[:length] == tokens.boi)
    if boi.size == 0 or boi[-1] + span <= length:
        return length
    if by == "document":
        starts = np.flatnonzero(ids[:length] == tokens.bos)
        if starts.size and starts[-1] > 0:
            return int(starts[-1])
    return int(boi[-1])


def _cut_at_images(
    ids: np.ndarray, images: int, tokens: TokenConfig, span: int, by: Truncation
) -> int | None:
    """Position of the cut in a stream with more than `images` images, else None: right after the
    last allowed image, or, for whole documents, before the next begin-of-document or begin-of-image
    token."""
    boi = np.flatnonzero(ids == tokens.boi)
    if boi.size <= images:
        return None
    end = int(boi[images - 1]) + span
    if by == "image":
        return end
    following = np.flatnonzero((ids[end:] == tokens.bos) | (ids[end:] == tokens.boi))
    return end + int(following[0])


def pack(
    documents: Iterable[tuple[Sequence[int], Sequence[ImageT]]],
    tokens: TokenConfig,
    *,
    length: int,
    visual_tokens: int,
    truncation: Truncation = "image",
    max_images: int | None = None,
) -> Iterator[PackedRow[ImageT]]:
    """Pack (token ids, images) documents into rows of at most `length` tokens and `max_images`
    images.

    Rows without an image are dropped. The remainder at the end of the documents is not yielded: the
    stream of a training run is endless. Raises `ConfigError` if no image fits into a row.
    """
    stream = np.empty(0, np.int64)
    waiting: list[ImageT] = []
    span = 1 + visual_tokens
    if length < span:
        raise ConfigError(
            "a row is shorter than one image", expected=f"at least {span} tokens", got=length
        )
    for ids, images in documents:
        stream = np.concatenate([stream, np.asarray(ids, np.int64)])
        waiting.extend(images)
        while True:
            cut = (
                _cut_at_images(stream[:length], max_images, tokens, span, truncation)
                if max_images
                else None
            )
            if cut is None:
                if stream.size < length:
                    break
                cut = _cut_at_length(stream, length, tokens, span, truncation)
            row, stream = stream[:cut], stream[cut:]
            boi = np.flatnonzero(row == tokens.boi)
            inside, waiting = waiting[: boi.size], waiting[boi.size :]
            starts = np.flatnonzero(row == tokens.bos)
            nearest = [int(starts[starts < at].max(initial=0)) for at in boi]
            if inside:
                yield PackedRow(row, tuple(inside), tuple(nearest))
